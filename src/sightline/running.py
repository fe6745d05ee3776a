"""Running. From a specification to a run: names become objects, `measure` does the work, everything is recorded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from sightline import models, viz
from sightline.classifier import Classifier, Method
from sightline.data import Dataset, Indexed, Sample, batches, collate
from sightline.datasets import DATASETS
from sightline.evaluation import Explain, Log, Subject, device, measure
from sightline.explanation import laid
from sightline.images import fit
from sightline.maps import degenerate
from sightline.methods import METHODS
from sightline.metrics import METRICS, Measure
from sightline.registry import find, load, unknown
from sightline.runs import Choice, Run, Scores, Spec, arguments, describe, provenance, write_bytes
from sightline.settings import bind

T = TypeVar("T")

SHOWN = 8
"""How many images of a run get a picture, besides the best and the worst."""

EXTREMES = 3
"""How many best and how many worst images get a picture."""

SIDE = 160
"""Longer side of a picture in pixels."""


@dataclass(frozen=True)
class Prepared:
    """The objects that a specification names."""

    classifier: Classifier
    dataset: Dataset
    samples: Indexed[Sample]
    method: Method
    metrics: Mapping[str, Measure]
    arguments: Mapping[str, Any]


def prepare(spec: Spec) -> Prepared:
    """Turn every name of a specification into an object.

    Raises:
        LookupError: an unknown name or setting; the message names the nearest ones.
        TypeError, ValueError, OSError: a setting, a file or a data set that does not fit, or a metric listed twice.
    """
    listed = [str(metric) for metric in spec.metrics]
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise ValueError(f"the metric {twice[0]} is listed twice")
    classifier = models.load(spec.model)
    classifier = classifier if spec.layer is None else classifier.at(spec.layer)
    reader = reader_of(spec.data, classifier)
    dataset: Dataset = reader()
    method = chosen(find(spec.method.name, METHODS, "methods").method, spec.method, spec.seed)
    factories = {str(c): chosen(find(c.name, METRICS, "metrics").metric, c, spec.seed) for c in spec.metrics}
    recorded = {
        "method": arguments(method),
        "metrics": {name: arguments(factory) for name, factory in factories.items()},
        "data": arguments(reader),
        "model": {
            "layer": classifier.layer,
            "mean": describe(classifier.mean),
            "std": describe(classifier.std),
            "size": describe(classifier.size),
        },
    }
    metrics = {name: factory() for name, factory in factories.items()}
    return Prepared(classifier, dataset, labeled(dataset, classifier), method, metrics, recorded)


def chosen(function: Callable[..., T], choice: Choice, seed: int) -> Callable[..., T]:
    """Return the function with the settings of a choice; the specification's seed where it takes one of its own."""
    seeds = {"seed": seed} if "seed" in signature(function).parameters else {}
    return bind(function, {**seeds, **choice.settings})


def reader_of(choice: Choice, classifier: Classifier) -> Callable[[], Dataset]:
    """Return the data set's reader with its settings; images come in the classifier's size unless said otherwise.

    Raises:
        LookupError: no such data set or setting.
        ValueError: a data set on disk without its folder.
    """
    entry = find(choice.name, DATASETS, "datasets")
    if entry.needs_root and "root" not in choice.settings:
        raise ValueError(f"{choice.name} needs root=, the folder that holds it")
    h, w = classifier.size
    size = h if h == w else (h, w)
    return bind(load(entry.load), {"size": size, **choice.settings})


@dataclass(frozen=True)
class Relabeled:
    """Samples whose labels are the numbers that the classifier gives to classes of the same names."""

    dataset: Dataset
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self.dataset[index]
        return sample if sample.label is None else replace(sample, label=self.numbers[sample.label])


def labeled(dataset: Dataset, classifier: Classifier) -> Indexed[Sample]:
    """Return the data set with the classifier's class numbers; classes meet by their names where both have names.

    Raises:
        ValueError: a class of the data set that the classifier does not have.
    """
    if not classifier.classes or not dataset.classes or dataset.classes == classifier.classes:
        return dataset
    if missing := [name for name in dataset.classes if name not in classifier.classes]:
        raise ValueError(
            f"{len(missing)} classes of the data are none of the classifier's: "
            f"{unknown(missing[0], classifier.classes, 'class')}; rename the folders, or read the data without labels "
            "(labels=false) and score the predicted class"
        )
    return Relabeled(dataset, tuple(classifier.classes.index(name) for name in dataset.classes))


def run(spec: Spec, *, folder: Path | None = None, report: Callable[[int, int], None] | None = None) -> Run:
    """Explain and score everything that a specification asks for.

    Args:
        spec: what to do.
        folder: where pictures go (the first images, the best and the worst); none are written without it.
        report: told how many images of how many are done.

    Raises:
        LookupError, TypeError, ValueError, OSError: see `prepare` and `measure`.
    """
    ready = prepare(spec)
    count = min(spec.images or len(ready.samples), len(ready.samples))
    told = None if report is None else lambda done: report(done, count)
    scores = measure(
        ready.method,
        ready.classifier,
        batches(ready.samples, spec.batch, range(count)),
        ready.metrics,
        explain=explained(spec),
        report=told,
    )
    named = tuple(replace(score, metric=choice) for score, choice in zip(scores.scores, spec.metrics, strict=True))
    scores = replace(scores, scores=named)
    pictures = {} if folder is None else draw(ready, spec, scores, folder)
    classes = ready.classifier.classes or ready.dataset.classes
    return Run(spec, scores, ready.arguments, provenance(), classes, dict(ready.dataset.skipped), pictures)


def explained(spec: Spec) -> Explain:
    """Return whose map is made; `measure` checks it."""
    return cast(Explain, spec.explain)


def draw(ready: Prepared, spec: Spec, scores: Scores, folder: Path) -> dict[str, dict[str, str]]:
    """Write image and overlay of the first images and of the best and worst ones; return their files by image."""
    pictures: dict[str, dict[str, str]] = {}
    signed = find(spec.method.name, METHODS, "methods").signed
    for index in worth_showing(scores):
        batch = collate([ready.samples[index]]).to(device(ready.classifier))
        subject = Subject(ready.method, ready.classifier, batch, Log())
        raw = subject.map("predicted" if spec.explain == "scored" else spec.explain)
        image = thumbnail(batch.x[0])
        files = {"image": put(folder, f"{index}.jpg", image)}
        if degenerate(raw)[0] is None:
            files["overlay"] = put(folder, f"{index}-{file_name(spec.method)}.jpg", laid(image, raw[0], signed=signed))
        pictures[scores.ids[index]] = files
    return pictures


def worth_showing(scores: Scores) -> list[int]:
    """Return the first images and, for each metric that keeps a number an image, the best and worst ones."""
    shown = set(range(min(SHOWN, len(scores.ids))))
    for score in scores.scores:
        order = sorted(range(len(score.per_image)), key=lambda index: score.per_image[index])
        shown |= {*order[:EXTREMES], *order[len(order) - EXTREMES :]} if len(order) >= EXTREMES else set()
    return sorted(shown)


def thumbnail(image: Tensor) -> Tensor:
    """Return an image with its longer side `SIDE` pixels."""
    height, width = (max(1, round(SIDE * side / max(image.shape[1:]))) for side in image.shape[1:])
    return fit(image.float().cpu(), (height, width), "direct")


def put(folder: Path, name: str, image: Tensor) -> str:
    """Write a thumbnail and return its name."""
    write_bytes(folder / name, viz.jpeg(image))
    return f"{folder.name}/{name}"


def file_name(choice: Choice) -> str:
    """Return a choice as a file name: letters, digits, and - for the rest."""
    return "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in str(choice)).strip("-")
