"""Evaluation. Objects in, numbers out: one method, one classifier, batches and measures."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from sightline.accumulate import Accumulate
from sightline.classifier import Classifier, Method, check_images, check_labels, check_range, probability
from sightline.data import Batch
from sightline.maps import degenerate, resize, unit
from sightline.metrics import Case, Measure
from sightline.runs import Choice, Score, Scores
from sightline.types import Images, Labels, Saliency

Explain: TypeAlias = Literal["scored", "label", "predicted", "second", "least"]

EXPLAIN = ("scored", "label", "predicted", "second", "least")


def measure(
    method: Method,
    classifier: Classifier,
    batches: Iterable[Batch],
    metrics: Mapping[str, Measure],
    *,
    explain: Explain = "scored",
    report: Callable[[int], None] | None = None,
) -> Scores:
    """Explain every image and score the maps.

    `explain` says whose map is made: the class that each metric scores (so a metric of the label and one of the
    predicted class each get their own map), the label, or the predicted, second or least probable class. Maps are
    resized to the image (bilinear) and scaled to [0, 1]; a map that is not finite is scored as zero everywhere, and
    every constant or non-finite map is listed in `degenerate`. `report` is told how many images are done.

    Raises:
        TypeError: images, or maps of the method, that are no float tensors.
        ValueError: images outside [0, 1], no batch, no metric, a metric of the label where an image has none, maps of
            another shape than (b, 1, i, j), or an unknown `explain`.
    """
    check_explain(explain)
    if not metrics:
        raise ValueError("expected at least one metric, got none")
    sums = {name: Accumulate(one).to(classifier.device) for name, one in metrics.items()}
    log = Log()
    for batch in batches:
        check_images(batch.x, classifier.channels)
        check_range(batch.x)
        subject = Subject(method, classifier, batch.to(classifier.device), log)
        places = torch.arange(len(log.ids), len(log.ids) + len(batch), device=subject.batch.x.device)
        log.note(subject)
        for name, one in metrics.items():
            scored = subject.label(one.scored, name)
            case = subject.case(one.scored if explain == "scored" else explain, one.scored, scored)
            sums[name].update(one(case), places)
        if report is not None:
            report(len(log.ids))
    if not log.ids:
        raise ValueError("no image was measured; the data set is empty")
    return log.scores(sums)


def check_explain(explain: str) -> None:
    """Check the choice of whose map is made.

    Raises:
        ValueError: no such choice.
    """
    if explain not in EXPLAIN:
        raise ValueError(f"expected explain to be one of {', '.join(EXPLAIN)}, got {explain!r}")


@dataclass(eq=False)
class Log:
    """What is noted of every image, and the time spent on maps."""

    ids: list[str] = field(default_factory=list[str])
    labels: list[int | None] = field(default_factory=list[int | None])
    predicted: list[int] = field(default_factory=list[int])
    probability: list[float] = field(default_factory=list[float])
    degenerate: dict[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0

    def note(self, subject: "Subject") -> None:
        """Note one batch."""
        predicted = subject.label("predicted")
        self.ids += subject.batch.ids
        self.labels += [sample.label for sample in subject.batch.samples]
        self.predicted += predicted.tolist()
        self.probability += probability(subject.logits.double(), predicted).tolist()

    def scores(self, sums: Mapping[str, Accumulate]) -> Scores:
        """Return the outcome."""
        scores = tuple(summed(Choice(name), one) for name, one in sums.items())
        lists = tuple(self.ids), tuple(self.labels), tuple(self.predicted), tuple(self.probability)
        return Scores(scores, *lists, self.seconds, self.degenerate)


def summed(metric: Choice, sums: Accumulate) -> Score:
    """Return one metric's outcome."""
    mean, per_image = (part.reshape(-1) for part in sums.compute())  # torchmetrics squeezes what holds one number
    curve = tuple(mean.tolist()) if sums.measure.width > 1 else ()
    return Score(metric, float(sums.finished(mean)), sums.measure.higher_is_better, tuple(per_image.tolist()), curve)


class Subject:
    """One batch under explanation: each map is made once, whatever asks for it."""

    def __init__(self, method: Method, classifier: Classifier, batch: Batch, log: Log) -> None:
        self.method, self.classifier, self.batch, self.log = method, classifier, batch, log
        with torch.no_grad():
            self.logits = classifier(batch.x)
        self.maps: dict[str, Saliency] = {}
        self.cases: dict[tuple[str, str], Case] = {}

    def label(self, kind: str, metric: str = "the map") -> Labels:
        """Return the class of each image that `kind` means.

        Raises:
            ValueError: the label is asked for and an image has none.
        """
        if kind == "label":
            if self.batch.y is None:
                name = next(sample.id for sample in self.batch.samples if sample.label is None)
                raise ValueError(f"{metric} needs the label, and {name!r} has none; use the predicted class")
            return check_labels(self.logits, self.batch.y)
        order = self.logits.argsort(dim=1, descending=True, stable=True)
        return order[:, {"predicted": 0, "second": 1, "least": -1}[kind]]

    def case(self, kind: str, scored: str, y: Labels) -> Case:
        """Return the batch with the map of class `kind`, to be scored for class y."""
        if (kind, scored) not in self.cases:
            raw = self.map(kind)
            x, size = self.batch.x, (self.batch.x.shape[2], self.batch.x.shape[3])
            saliency = unit(resize(finite(raw), size)).to(x.dtype)
            self.cases[kind, scored] = Case(self.classifier, x, y, saliency, raw, self.method, self.batch, self.logits)
        return self.cases[kind, scored]

    def map(self, kind: str) -> Saliency:
        """Return the maps of class `kind`; an image whose class another kind has explained is not explained again."""
        if kind not in self.maps:
            y = self.label(kind)
            self.maps[kind] = (
                self.renewed(*next(iter(self.maps.items())), y) if self.maps else self.timed(self.batch.x, y)
            )
            reasons = zip(self.batch.ids, degenerate(self.maps[kind]), strict=True)
            self.log.degenerate.update({name: reason for name, reason in reasons if reason is not None})
        return self.maps[kind]

    def renewed(self, known: str, maps: Saliency, y: Labels) -> Saliency:
        """Return the maps of class y, given those of the class `known`."""
        new = y != self.label(known)
        if not bool(new.any()):
            return maps
        renewed = maps.clone()
        renewed[new] = self.timed(self.batch.x[new], y[new])
        return renewed

    def timed(self, x: Images, y: Labels) -> Saliency:
        """Explain, and add to the time."""
        synchronize(x)
        start = time.perf_counter()
        saliency = checked(self.method(self.classifier, x, y), len(x))
        synchronize(x)
        self.log.seconds += time.perf_counter() - start
        return saliency


def checked(saliency: Any, count: int) -> Saliency:
    """Return what a method gave for `count` images, without its graph.

    Raises:
        TypeError: not a float tensor.
        ValueError: not (b, 1, i, j).
    """
    if not isinstance(saliency, Tensor) or not saliency.is_floating_point():
        given = saliency.dtype if isinstance(saliency, Tensor) else type(saliency).__name__
        raise TypeError(f"the method returned {given}; expected maps as a float tensor ({count}, 1, height, width)")
    if saliency.ndim != 4 or saliency.shape[:2] != (count, 1) or saliency.numel() == 0:
        raise ValueError(
            f"the method returned maps of shape {tuple(saliency.shape)}; expected ({count}, 1, height, width)"
        )
    return saliency.detach()


def finite(raw: Saliency) -> Saliency:
    """Return the maps, zero everywhere in place of one that is not finite."""
    return torch.where(raw.isfinite().flatten(1).all(1).view(-1, 1, 1, 1), raw, torch.zeros_like(raw))


def synchronize(x: Tensor) -> None:
    """Wait for an accelerator, so that the time is the work's."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
