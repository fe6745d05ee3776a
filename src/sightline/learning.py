"""Learning. From a recipe to a file: names become objects, a trainer does the work, everything is recorded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

from sightline import models
from sightline.classifier import Classifier, Method, classes_of, wrap
from sightline.classifier_training import ClassifierConfig, accuracy, mean_average_precision, replace_head, train
from sightline.data import Dataset, Indexed, Sample, batches
from sightline.evaluation import measure
from sightline.explainers import (
    CalmConfig,
    CasmConfig,
    Segmenter,
    SegmenterConfig,
    load_casm,
    save_casm,
    search,
    surgery,
    train_calm,
    train_casm,
    train_segmenter,
)
from sightline.interchange import read_names
from sightline.methods import METHODS
from sightline.models._files import checksums, meanings
from sightline.processes import first, leave, wait
from sightline.protocols import PROTOCOLS
from sightline.recipes import Recipe
from sightline.registry import find
from sightline.running import labeled, metric_of, protocol_of, reader_of
from sightline.runs import Choice, read_claim, write_bytes, write_text
from sightline.settings import bind
from sightline.training import Metrics, Progress, remember

Report = Callable[[Progress], None]

ACCURACY = "accuracy"

OF_LOGITS: Mapping[str, Callable[[Classifier, Indexed[Sample]], float]] = {
    ACCURACY: accuracy,
    "mean_average_precision": mean_average_precision,
}
"""What is measured of a classifier's logits, in place of a metric of maps; more is better."""

CLAIM = "training.json"
"""The file that says which training a folder belongs to."""


@dataclass(frozen=True)
class Learner:
    """What can be learned: its configuration, the network it starts from by default, how, and whose maps are judged.

    `network`: settings of a recipe that are not the configuration's but the network's, and their defaults.
    """

    config: Callable[..., Any]
    model: str
    learn: Callable[[Recipe, Any, Path, Report | None], Path]
    judged: Callable[[Path, Recipe], tuple[Method, Classifier]]
    network: Mapping[str, Any] = field(default_factory=dict[str, Any])
    select: str = ACCURACY
    """What is measured where a recipe does not say."""


def learn(kind: str, recipe: Recipe, out: Path | str, *, fresh: bool = True, report: Report | None = None) -> Path:
    """Train what a recipe says and return the file of its weights, OUT/KIND.safetensors, with its manifest beside it.

    The training goes on from the checkpoint in `out`. With trials each has a folder of its own below OUT/trials, and
    the files of the best one are copied. Of several processes the first one alone writes. Unless `fresh`, images that
    the training before has read, in this process, are not read again.

    Raises:
        LookupError: no such kind, setting, model, data set or metric.
        TypeError, ValueError, OSError: a setting, a file or a data set that does not fit.
        FloatingPointError: the training is not finite.
    """
    learner, folder = find(kind, LEARNERS, "learners"), Path(out)
    config = configured(kind, recipe)
    claim(kind, recipe, folder)
    if fresh:
        read.cache_clear()
    if recipe.trials and recipe.val is not None:
        path = best(kind, recipe, recipe.val, folder, report)
    else:
        path = learner.learn(recipe, config, folder, report)
    leave()
    if recipe.test is not None and first():
        name, value, _ = judge(learner, path, recipe, recipe.test)
        note(path, {"test": {"data": recipe.test.plain(), name: value}})
    return path


def claim(kind: str, recipe: Recipe, folder: Path) -> None:
    """Write into a folder which training it belongs to, and what weights that starts from, with their manifests.

    What only says how the result is stored or measured may change, and the number of trials; all may, as long as
    nothing is there but logs. An older claim, which does not say what the manifests were, fits any.

    Raises:
        ValueError: it belongs to another training.
    """
    plain = recipe.changed(settings={}).plain()
    apart = ("test", "half", "trials", *(() if recipe.trials else ("val", "select", "low", "high")))
    told = {"kind": kind} | {name: value for name, value in plain.items() if name not in apart}
    told |= {"weights": checksums(plain), "manifests": meanings(plain)}
    text, path = json.dumps(told, indent=1, sort_keys=True, default=list) + "\n", folder / CLAIM
    begun = path.exists() and any(one.name not in (CLAIM, "logs") for one in folder.iterdir())
    new = json.loads(text)
    old = {"manifests": new["manifests"], **read_claim(path)} if begun else new
    if names := [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]:
        differ = "; ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)
        raise ValueError(f"{folder} belongs to another training: {differ}; delete it, or take another --out")
    if first() and not begun:
        write_text(path, text)


def configured(kind: str, recipe: Recipe) -> Any:
    """Return the configuration that a recipe's settings make.

    Raises:
        LookupError, TypeError, ValueError: a setting that it does not have, or that does not fit.
    """
    learner: Learner = find(kind, LEARNERS, "learners")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.settings.items()}
    if learner.network:
        bind(surgery, {key: value for key, value in settings.items() if key in learner.network})
    return bind(learner.config, {key: value for key, value in settings.items() if key not in learner.network})()


def complete(kind: str, recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a recipe, defaults included.

    Raises:
        LookupError, TypeError, ValueError: as `configured`.
    """
    return {**LEARNERS[kind].network, **asdict(configured(kind, recipe)), **recipe.settings}


def best(kind: str, recipe: Recipe, val: Choice, folder: Path, report: Report | None) -> Path:
    """Try learning rates, each in a folder of its own, and return a copy of the best one's file."""
    learner: Learner = find(kind, LEARNERS, "learners")
    select = recipe.select or learner.select
    if direction(select, recipe.seed) is None:
        raise ValueError(f"trials are compared by what has a better side, and {select} has none; choose --select")

    def place(rate: float) -> Path:
        return folder / "trials" / f"{rate:.3e}"

    def run(rate: float) -> float:
        one = recipe.changed(settings={"lr": rate})
        path = learner.learn(one, configured(kind, one), place(rate), report)
        _, value, higher = judge(learner, path, recipe, val)
        return value if higher else -value

    found = search(run, trials=recipe.trials, low=recipe.low, high=recipe.high, seed=recipe.seed, out=folder)
    target = folder / f"{kind}.safetensors"
    if first():
        for suffix in (".safetensors", ".json"):
            content = (place(found.best) / target.name).with_suffix(suffix).read_bytes()
            write_bytes(target.with_suffix(suffix), content)
        note(target, {"search": {"val": val.plain(), "select": select, "trials": asdict(found)}})
    return target


def judge(learner: Learner, path: Path, recipe: Recipe, data: Choice) -> tuple[str, float, bool | None]:
    """Return what is measured of what was learned, its value on a data set, and whether higher is better."""
    method, classifier = learner.judged(path, recipe)
    samples, name = labeled(reader_of(data, classifier)(), classifier), recipe.select or learner.select
    if name in OF_LOGITS:
        return name, OF_LOGITS[name](classifier, samples), True
    choice = Choice.parse(name)
    if choice.name in PROTOCOLS:
        part, found = next(iter(protocol_of(choice, recipe.seed)(method, classifier, samples).items()))
        return f"{choice.name}.{part}", found.value, found.higher_is_better
    score = measure(method, classifier, batches(samples, 16), {name: metric_of(choice, recipe.seed)()})[name]
    return name, score.value, score.higher_is_better


def direction(name: str, seed: int) -> bool | None:
    """Return whether more of what is measured is better: of a protocol its first number counts.

    Raises:
        LookupError, TypeError, ValueError: no such metric, or a setting that does not fit.
    """
    choice = Choice.parse(name)
    if name in OF_LOGITS:
        return True
    if choice.name in PROTOCOLS:
        return next(iter(PROTOCOLS[choice.name].parts.values()))
    return metric_of(choice, seed)().higher_is_better


def learn_classifier(recipe: Recipe, config: ClassifierConfig, out: Path, report: Report | None) -> Path:
    """Train a classifier with as many classes as the data has."""
    built, stored = fitting(recipe.model, recipe.data, recipe.seed)
    dataset, samples = read(Source.of(recipe.data, built))
    history = train(built, samples, config, seed=recipe.seed, out=out, report=report)
    extra = recorded(recipe, config, dataset, history)
    return kept(
        partial(models.save, model=stored, extra=extra, half=recipe.half), built, out / "classifier.safetensors"
    )


def learn_casm(recipe: Recipe, config: CasmConfig, out: Path, report: Report | None) -> Path:
    """Train CASM's mapping against a pool of classifiers that starts with the recipe's model."""
    f0 = models.load(recipe.model)
    dataset, samples = read(Source.of(recipe.data, f0))
    mapping, history = train_casm(f0, samples, config, seed=recipe.seed, out=out, report=report)
    extra = recorded(recipe, config, dataset, history)
    save = partial(save_casm, encoder=models.recipe(recipe.model), extra=extra, half=recipe.half)
    return kept(save, mapping, out / "casm.safetensors")


def learn_calm(recipe: Recipe, config: CalmConfig, out: Path, report: Report | None) -> Path:
    """Train CALM on the body of the recipe's model, which was trained as a plain classifier."""
    backbone = models.load(recipe.model)
    dataset, samples = read(Source.of(recipe.data, backbone))
    made = {name: recipe.settings.get(name, default) for name, default in LEARNERS["calm"].network.items()}
    built = surgery(backbone, **made, seed=recipe.seed)
    history = train_calm(built, samples, config, seed=recipe.seed, out=out, report=report)
    extra = recorded(recipe, config, dataset, history)
    base = models.recipe(recipe.model)
    stored = Choice("calm", {"backbone": {"name": base.name, **base.settings, "layer": backbone.layer}, **made})
    return kept(partial(models.save, model=stored, extra=extra, half=recipe.half), built, out / "calm.safetensors")


def learn_segmenter(recipe: Recipe, config: SegmenterConfig, out: Path, report: Report | None) -> Path:
    """Train a segmenter with as many classes as the data has, on its masks or on pseudo labels.

    Of data without classes they are those that the labels' folder names. Pseudo labels go with the samples as they are
    read, which know how large the original pictures were.
    """
    known = () if config.labels is None else read_names(config.labels)[1:]
    built, stored = fitting(recipe.model, recipe.data, recipe.seed, classes=known)
    if not isinstance(built.model, Segmenter):
        raise ValueError(f"{recipe.model} is no segmenter; take mini_seg or lraspp, or the file of one")
    dataset, samples = read(Source.of(recipe.data, built, masks=config.labels is None))
    samples = samples if config.labels is None else labeled(dataset, built)
    history = train_segmenter(built, samples, config, seed=recipe.seed, out=out, report=report)
    extra = recorded(recipe, config, dataset, history)
    save = partial(models.save, model=stored, extra=extra, half=recipe.half)
    return kept(save, built, out / "segmenter.safetensors")


def kept(save: Callable[..., Path], learned: Any, path: Path) -> Path:
    """Save in the first process; return the path in all, when the file is there."""
    if first():
        save(learned, path)
    wait()
    return path


def note(path: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to what the manifest of a file says about how it was made."""
    manifest = path.with_suffix(".json")
    table = json.loads(manifest.read_text(encoding="utf-8"))
    table["extra"] |= entries
    write_text(manifest, json.dumps(table, indent=1, sort_keys=True) + "\n")


def recorded(recipe: Recipe, config: Any, dataset: Dataset, history: tuple[Metrics, ...]) -> dict[str, Any]:
    """Return what the manifest says about how the weights were made."""
    return {
        "recipe": recipe.plain(),
        "config": asdict(config),
        "images": len(dataset),
        "skipped": dict(dataset.skipped),
        "history": list(history),
    }


@dataclass(frozen=True)
class Source:
    """A data set for a classifier; two are equal that give the same samples."""

    key: str
    data: Choice = field(compare=False)
    classifier: Classifier = field(compare=False)
    masks: bool = False

    @classmethod
    def of(cls, data: Choice, classifier: Classifier, *, masks: bool = False) -> "Source":
        """Name what determines the samples."""
        seen = (data.plain(), classifier.size, classifier.channels, classifier.classes)
        return cls(repr(seen), data, classifier, masks)


@lru_cache(maxsize=1)
def read(source: Source) -> tuple[Dataset, Indexed[Sample]]:
    """Return a data set and its samples in the classifier's size and classes.

    They are read once, also by several trainings on the same data one after the other.

    Raises:
        ValueError: the data has another number of classes than a classifier whose classes have no names.
    """
    dataset, built = reader_of(source.data, source.classifier)(), source.classifier
    if dataset.classes and not built.classes and len(dataset.classes) != classes_of(built):
        raise ValueError(
            f"{source.data} has {len(dataset.classes)} classes and the network {classes_of(built)}, without names; "
            "train it on the data first: sightline train classifier"
        )
    return dataset, remember(labeled(dataset, source.classifier), masks=source.masks)


def fitting(model: Choice, data: Choice, seed: int, *, classes: tuple[str, ...] = ()) -> tuple[Classifier, Choice]:
    """Return a classifier with as many classes as the data has, and how to build it again.

    `classes` are those of data that has none of its own. Weights from a file stay, but for a head with another number
    of classes.

    Raises:
        ValueError: data without classes, or a network that is not trained as a classifier.
    """
    base = models.recipe(model)
    ours = base.name in models.MODELS
    empty = ours and {"classes", "seed"} <= {*signature(models.MODELS[base.name].builder).parameters}
    if ours and not empty:
        raise ValueError(f"{model} is no network that `train classifier` can train; take mini_resnet, say")
    trained = base.name != model.name
    seeds = {"seed": seed} if empty and not trained and "seed" not in model.settings else {}
    built = models.load(Choice(model.name, {**model.settings, **seeds}))
    classes = tuple(reader_of(data, built)().classes) or classes
    count = len(classes)
    if count < 2:
        raise ValueError(
            f"{data} has {count} classes; training needs at least two: one folder a class or, for a segmenter, label "
            "maps whose segment.json names them"
        )
    stored = Choice(base.name, {**base.settings, "classes" if empty else "num_classes": count})
    if isinstance(built.model, Segmenter) and trained and count != classes_of(built):
        raise ValueError(f"{model} segments {classes_of(built)} classes and {data} has {count}; start from {base.name}")
    if empty and not trained:
        built = models.load(Choice(model.name, {**model.settings, **seeds, "classes": count}))
    elif trained or model.name.startswith(("torchvision:", "timm:", "hf:")):
        network = replace_head(built.model, count, seed=seed) if count != classes_of(built) else built.model
        built = wrap(network, layer=built.layer, normalization=(built.mean, built.std), size=built.size)
    return replace(built, classes=classes), stored


LEARNERS: Mapping[str, Learner] = {
    "classifier": Learner(
        ClassifierConfig,
        "mini_resnet",
        learn_classifier,
        lambda path, recipe: (METHODS["grad_cam"].method, models.load(f"{path}?code=run")),
    ),
    "casm": Learner(
        CasmConfig,
        "creatures",
        learn_casm,
        lambda path, recipe: (load_casm(f"{path}?code=run"), models.load(recipe.model)),
        select="area?of=raw",
    ),
    "calm": Learner(
        CalmConfig,
        "creatures",
        learn_calm,
        lambda path, recipe: (METHODS["calm_attribution"].method, models.load(f"{path}?code=run")),
        {"finer": 0, "activation": "softplus", "detach": False},
    ),
    "segmenter": Learner(
        SegmenterConfig,
        "mini_seg",
        learn_segmenter,
        lambda path, recipe: (METHODS["segmenter"].method, models.load(f"{path}?code=run")),
        select="segmentation?compete=all&normalize=none&threshold=0.0",
    ),
}
"""Name -> what can be learned."""
