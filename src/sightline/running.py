"""Running. From a specification to a run: names become objects, `measure` does the work, everything is recorded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sightline import models, viz
from sightline.classifier import Classifier, Method
from sightline.data import Dataset, Indexed, Sample, batches
from sightline.datasets import DATASETS
from sightline.evaluation import Explain, Log, Subject, check_explain, checked, measure
from sightline.explanation import laid
from sightline.images import fit
from sightline.maps import degenerate
from sightline.metrics import METRICS, Measure
from sightline.registry import find, load, unknown
from sightline.runs import Choice, Run, Scores, Spec, arguments, describe, file_name, provenance, write_bytes
from sightline.settings import bind, method_of, seeded, signed
from sightline.types import Images, Labels, Saliency

SHOWN = 8
"""How many images of a run get a picture, besides the best and the worst."""

EXTREMES = 3
"""How many best and how many worst images get a picture."""

SIDE = 160
"""Longer side of a picture in pixels."""


KEPT = 256
"""How many of the last images and maps stay in memory."""


@dataclass(frozen=True)
class Scene:
    """What several methods are compared on: a classifier and a data set, with the settings of both in full."""

    classifier: Classifier
    dataset: Dataset
    samples: Indexed[Sample]
    arguments: Mapping[str, Any]


def scene(spec: Spec) -> Scene:
    """Open the classifier and the data set that a specification names.

    Raises:
        LookupError: an unknown name or setting; the message names the nearest ones.
        TypeError, ValueError, OSError: a setting, a file or a data set that does not fit.
    """
    classifier = models.load(spec.model)
    classifier = classifier if spec.layer is None else classifier.at(spec.layer)
    reader = reader_of(spec.data, classifier)
    dataset: Dataset = reader()
    model = {name: describe(getattr(classifier, name)) for name in ("layer", "mean", "std", "size")}
    recorded = {"data": arguments(reader), "model": model}
    return Scene(classifier, dataset, Recent(labeled(dataset, classifier)), recorded)


class Recent:
    """Samples of which the last `KEPT` that were read stay in memory."""

    def __init__(self, samples: Indexed[Sample]) -> None:
        self.samples = samples
        self.read = lru_cache(KEPT)(samples.__getitem__)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self.read(index)


class Recalled:
    """A method whose last `KEPT` maps stay in memory, so that pictures of what was scored cost nothing."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.maps: dict[tuple[bytes, int], Saliency] = {}

    def __call__(self, classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
        labels = classifier.labels(x, y) if y is None else y
        keys = [(image.cpu().numpy().tobytes(), int(label)) for image, label in zip(x, labels, strict=True)]
        new = [index for index, key in enumerate(keys) if key not in self.maps]
        if new:
            made = checked(self.method(classifier, x[new], labels[new]), len(new))
            self.maps |= {keys[index]: one for index, one in zip(new, made, strict=True)}
        found = torch.stack([self.maps[key] for key in keys])
        for key in list(self.maps)[: max(0, len(self.maps) - KEPT)]:
            del self.maps[key]
        return found


def named(spec: Spec) -> tuple[Method, dict[str, Callable[..., Measure]]]:
    """Return the method and the metrics with their settings: what can be checked before any work is done.

    Raises:
        LookupError, TypeError, ValueError: an unknown name, a setting that does not fit, or a metric listed twice.
    """
    check_explain(spec.explain)
    listed = [str(metric) for metric in spec.metrics]
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise ValueError(f"the metric {twice[0]} is listed twice")
    find(spec.data.name, DATASETS, "datasets")
    method = method_of(spec.method, spec.seed)
    factories = {str(c): seeded(find(c.name, METRICS, "metrics").metric, c.settings, spec.seed) for c in spec.metrics}
    for factory in factories.values():
        factory()
    return method, factories


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


def run(
    spec: Spec,
    *,
    on: Scene | None = None,
    folder: Path | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Run:
    """Explain and score everything that a specification asks for.

    Args:
        spec: what to do.
        on: the opened scene of this specification, where several methods share one.
        folder: where pictures go (the first images, the best and the worst); none are written without it.
        report: told how many images of how many are done.

    Raises:
        LookupError, TypeError, ValueError, OSError: see `named`, `scene` and `measure`.
    """
    function, factories = named(spec)
    method = Recalled(function)
    on = scene(spec) if on is None else on
    count = min(spec.images or len(on.samples), len(on.samples))
    scores = measure(
        method,
        on.classifier,
        batches(on.samples, spec.batch, range(count)),
        {name: factory() for name, factory in factories.items()},
        explain=cast(Explain, spec.explain),
        report=None if report is None else lambda done: report(done, count),
    )
    by_choice = zip(scores.scores, spec.metrics, strict=True)
    scores = replace(scores, scores=tuple(replace(score, metric=choice) for score, choice in by_choice))
    recorded = {
        **on.arguments,
        "method": arguments(function),
        "metrics": {name: arguments(factory) for name, factory in factories.items()},
    }
    pictures = {} if folder is None else draw(spec, on, method, scores, folder)
    classes = on.classifier.classes or on.dataset.classes
    return Run(spec, scores, recorded, provenance(), classes, dict(on.dataset.skipped), pictures)


def draw(spec: Spec, on: Scene, method: Method, scores: Scores, folder: Path) -> dict[str, dict[str, str]]:
    """Write image and overlay of the first images and of the best and worst ones; return their files by image."""
    pictures: dict[str, dict[str, str]] = {}
    is_signed = signed(method_of(spec.method))
    indices = worth_showing(scores)
    for batch in batches(on.samples, spec.batch, indices):
        subject = Subject(method, on.classifier, batch.to(on.classifier.device), Log())
        maps = subject.map("predicted" if spec.explain == "scored" else spec.explain)
        for name, x, raw in zip(batch.ids, batch.x, maps, strict=True):
            index, image = scores.ids.index(name), thumbnail(x)
            pictures[name] = {"image": put(folder, f"{index}.jpg", image)}
            if degenerate(raw[None])[0] is None:
                file = f"{index}-{file_name(str(spec.method))}.jpg"
                pictures[name]["overlay"] = put(folder, file, laid(image, raw, signed=is_signed))
    return pictures


def worth_showing(scores: Scores) -> list[int]:
    """Return the first images, and the best and worst ones of insertion, else of the first metric that ranks images."""
    shown = set(range(min(SHOWN, len(scores.ids))))
    ranking = [score for score in scores.scores if score.per_image]
    ranking.sort(key=lambda score: score.metric.name != "insertion")
    for score in ranking[:1]:
        order = sorted(range(len(score.per_image)), key=lambda index: score.per_image[index])
        shown |= {*order[:EXTREMES], *order[-EXTREMES:]}
    return sorted(shown)


def thumbnail(image: Tensor) -> Tensor:
    """Return an image with its longer side `SIDE` pixels."""
    height, width = (max(1, round(SIDE * side / max(image.shape[1:]))) for side in image.shape[1:])
    return fit(image.float().cpu(), (height, width), "direct")


def put(folder: Path, name: str, image: Tensor) -> str:
    """Write a thumbnail and return its name."""
    write_bytes(folder / name, viz.jpeg(image))
    return f"{folder.name}/{name}"
