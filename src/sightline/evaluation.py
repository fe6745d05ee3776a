"""Evaluation. Objects in, numbers out: one method, one classifier, batches and measures."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import (
    Absent,
    Classifier,
    Method,
    PerClass,
    check_images,
    check_labels,
    check_range,
    probability,
)
from sightline.data import Batch, Sample
from sightline.maps import degenerate, scaled
from sightline.metrics import Case, Measure, Scored, check_scored, finite
from sightline.runs import Choice, Score, Scores
from sightline.types import Images, Labels, Logits, Saliency

if TYPE_CHECKING:
    from sightline.accumulate import Accumulate

Explain: TypeAlias = Literal["scored", "label", "predicted", "second", "least"]

EXPLAIN = ("scored", "label", "predicted", "second", "least")

Shown: TypeAlias = dict[str, dict[int, str | None]]
"""Image -> class whose map was asked for -> why that map shows nothing, None where it shows something.

Of those that show something no more stand there than tell whether the image was asked about for several classes.
"""


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
    every constant or non-finite map is listed in `degenerate`, with its class where several classes of the image are
    explained. `report` is told how many images are done.

    Raises:
        TypeError: images, or maps of the method, that are no float tensors.
        ValueError: images outside [0, 1], no batch, no metric, a metric of the label where an image has none, maps of
            another shape than (b, 1, i, j), or an unknown `explain`.
    """
    check_explain(explain)
    if not metrics:
        raise ValueError("expected at least one metric, got none")
    done = 0

    def each(subject: Subject) -> None:
        nonlocal done
        done += len(subject.batch)
        if report is not None:
            report(done)

    return measured(Maps.of_method(method), classifier, batches, metrics, explain, each=each).scores(classifier.classes)


def measured(
    maps: "Maps",
    classifier: Classifier,
    batches: Iterable[Batch],
    metrics: Mapping[str, Measure],
    explain: Explain,
    *,
    start: int = 0,
    each: Callable[["Subject"], None] | None = None,
) -> "Tally":
    """Do the work of `measure`; without metrics it notes what the classifier says.

    `start` is the first image's place in the data set; `each` is called after every batch.
    """
    tally, before = Tally.empty(metrics, classifier), maps.seconds
    with maps.noted(classifier) as tally.log.shown:
        for batch in batches:
            subject = Subject(maps, classifier, checked_batch(batch, classifier))
            done = start + len(tally.log.ids)
            places = torch.arange(done, done + len(batch), device=subject.batch.x.device)
            tally.log.note(subject)
            for name, one in metrics.items():
                scored = subject.label(one.scored, name)
                case = subject.case(one.scored if explain == "scored" else explain, one.scored, scored)
                tally.sums[name].update(one(case), places)
            if each is not None:
                each(subject)
    tally.seconds = maps.seconds - before
    return tally


def cases(
    method: Method,
    classifier: Classifier,
    batches: Iterable[Batch],
    *,
    explain: Explain = "scored",
    scored: Scored = "label",
) -> Iterator[Case]:
    """Explain batches one by one; what a protocol goes through.

    Raises:
        TypeError, ValueError: as `measure`.
    """
    check_explain(explain)
    check_scored(scored)
    maps = Maps.of_method(method)
    for batch in batches:
        subject = Subject(maps, classifier, checked_batch(batch, classifier))
        yield subject.case(scored if explain == "scored" else explain, scored, subject.label(scored))


def checked_batch(batch: Batch, classifier: Classifier) -> Batch:
    """Return the batch on the classifier's device.

    Raises:
        TypeError, ValueError: images that are no float tensors in [0, 1] of the classifier's channels.
    """
    check_images(batch.x, classifier.channels)
    check_range(batch.x)
    return batch.to(classifier.device)


def check_explain(explain: str) -> None:
    """Check the choice of whose map is made.

    Raises:
        ValueError: no such choice.
    """
    if explain not in EXPLAIN:
        raise ValueError(f"expected explain to be one of {', '.join(EXPLAIN)}, got {explain!r}")


@runtime_checkable
class Named(Protocol):
    """What knows the maps of images by their names."""

    def of(self, ids: Sequence[str], y: Labels, size: tuple[int, int]) -> Float[Tensor, "n 1 i j"]: ...


class Maps:
    """A method that makes no map twice: the last ones stay in memory, by image and class, and the time is taken.

    `room` is how many bytes of images and maps are kept, at least those of one batch. As a method it is the one inside.
    """

    def __init__(self, method: Method, room: int = 2**30) -> None:
        self.method, self.room = method, room
        self.seconds = 0.0
        self.memory: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}
        self.classifiers: dict[int, Classifier] = {}  # kept, so that no other one gets the number of one that is gone
        self.notes: tuple[int, Shown] | None = None

    @classmethod
    def of_method(cls, method: Method) -> "Maps":
        """Return the method as maps; maps as they are."""
        return method if isinstance(method, Maps) else cls(method)

    def __call__(self, classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
        """Explain with the method inside."""
        return self.method(classifier, x, y)

    def of(self, classifier: Classifier, batch: Batch, y: Labels) -> Saliency:
        """Return the maps of a batch for the classes y; those that are in memory are not made again.

        Raises:
            TypeError, ValueError: maps of another kind or shape than (b, 1, i, j) floats.
        """
        self.classifiers[id(classifier)] = classifier
        keys = [(id(classifier), name, label) for name, label in zip(batch.ids, y.tolist(), strict=True)]
        images = [sample.image for sample in batch.samples]
        new = [i for i, (key, image) in enumerate(zip(keys, images, strict=True)) if not self.knows(key, image)]
        if new:
            made = self.made(classifier, batch, y, new)
            self.memory |= {keys[i]: (images[i], one) for i, one in zip(new, made, strict=True)}
        found = torch.stack([self.memory[key][1] for key in keys])
        self.trim(4 * len(batch))
        self.note(classifier, batch.ids, y.tolist(), found)
        return found

    def together(
        self, classifier: Classifier, batch: Batch, classes: Sequence[Sequence[int]], make: PerClass
    ) -> Float[Tensor, "n 1 _i _j"]:
        """Return the maps of several classes of each image, image after image; one call of `make` makes the new ones.

        An image with fewer new classes than another is asked about its last one again.

        Raises:
            TypeError, ValueError: as `of`.
        """
        self.classifiers[id(classifier)], images = classifier, [sample.image for sample in batch.samples]
        keys = [[(id(classifier), name, k) for k in labels] for name, labels in zip(batch.ids, classes, strict=True)]
        new = {i: [key for key in keys[i] if not self.knows(key, image)] for i, image in enumerate(images)}
        new = {i: missing for i, missing in new.items() if missing}
        if new:
            most = max(map(len, new.values()))
            y = torch.tensor([[key[2] for key in one + one[-1:] * (most - len(one))] for one in new.values()])
            with self.timed(batch.x):
                made = make(classifier, batch.x[list(new)], y.to(batch.x.device))
            rows = torch.split(checked(made.flatten(0, 1)[:, None], y.numel()), most)
            for (i, missing), maps in zip(new.items(), rows, strict=True):
                self.memory |= {key: (images[i], one) for key, one in zip(missing, maps, strict=False)}
        pairs = [key for one in keys for key in one]
        found = torch.stack([self.memory[key][1] for key in pairs])
        self.trim(len(pairs))
        self.note(classifier, [name for _, name, _ in pairs], [label for _, _, label in pairs], found)
        return found

    @contextmanager
    def timed(self, x: Images) -> Iterator[None]:
        """Add the time of what is done meanwhile, where x is."""
        synchronize(x)
        start = time.perf_counter()
        yield
        synchronize(x)
        self.seconds += time.perf_counter() - start

    @contextmanager
    def noted(self, classifier: Classifier) -> Iterator[Shown]:
        """Note which maps of a classifier are asked for meanwhile, whether they are new or not, and what they show."""
        before, found = self.notes, dict[str, dict[int, str | None]]()
        self.notes = id(classifier), found
        try:
            yield found
        finally:
            self.notes = before

    def note(self, classifier: Classifier, ids: Sequence[str], labels: Sequence[int], maps: Saliency) -> None:
        """Note maps that do not come from here, as `of` does its own; nothing is noted outside `noted`."""
        if self.notes is not None and self.notes[0] == id(classifier):
            for name, label, reason in zip(ids, labels, degenerate(maps), strict=True):
                add_shown(self.notes[1], name, label, reason)

    def recall(self, classifier: Classifier, entries: Iterable[tuple[str, int, Tensor, Tensor]]) -> None:
        """Have these maps alone in memory, the last ones as far as there is room: name, class, image, map."""
        self.classifiers[id(classifier)], self.memory = classifier, {}
        for name, label, image, one in entries:
            self.memory[id(classifier), name, label] = image, one
            self.trim(1)

    def trim(self, least: int) -> None:
        """Forget the oldest maps for which there is no room, but no fewer than so many stay."""
        last = next(reversed(self.memory.values()))
        most = max(least, self.room // sum(map(size_of, last)))
        for key in list(self.memory)[: max(0, len(self.memory) - most)]:
            del self.memory[key]

    def held(self, classifier: Classifier, ids: Sequence[str]) -> dict[tuple[str, int], Tensor]:
        """Return the maps of these images that are in memory, by image and class."""
        return {
            (name, label): one
            for (owner, name, label), (_, one) in self.memory.items()
            if owner == id(classifier) and name in ids
        }

    def knows(self, key: tuple[int, str, int], image: Tensor) -> bool:
        """Tell whether a map is in memory, and is of this very image."""
        known = self.memory.get(key)
        return known is not None and (known[0] is image or torch.equal(known[0], image))

    def made(self, classifier: Classifier, batch: Batch, y: Labels, new: Sequence[int]) -> Float[Tensor, "n 1 i j"]:
        """Explain some images of a batch, and add to the time."""
        x, labels = (batch.x, y) if len(new) == len(batch) else (batch.x[new], y[new])
        if isinstance(self.method, Named):
            ids, size = [batch.ids[i] for i in new], (x.shape[2], x.shape[3])
            return checked(self.method.of(ids, labels, size).to(x.device), len(x))
        with self.timed(x):
            return checked(self.method(classifier, x, labels), len(x))


@dataclass(eq=False)
class Log:
    """What is noted of every image."""

    ids: list[str] = field(default_factory=list[str])
    labels: list[int | None] = field(default_factory=list[int | None])
    predicted: list[int] = field(default_factory=list[int])
    probability: list[float] = field(default_factory=list[float])
    among: list[bool | None] = field(default_factory=list[bool | None])
    shown: Shown = field(default_factory=dict[str, dict[int, str | None]])

    def note(self, subject: "Subject") -> None:
        """Note one batch; where there is no classifier, the prediction is -1."""
        self.ids += subject.batch.ids
        self.labels += [sample.label for sample in subject.batch.samples]
        if isinstance(subject.classifier.model, Absent):
            self.predicted += [-1] * len(subject.batch)
            self.probability += [math.nan] * len(subject.batch)
            self.among += [None] * len(subject.batch)
            return
        predicted = subject.label("predicted")
        self.predicted += predicted.tolist()
        self.probability += probability(subject.logits.double(), predicted).tolist()
        self.among += [shows(one, k) for one, k in zip(subject.batch.samples, predicted.tolist(), strict=True)]

    def add(self, other: "Log") -> None:
        """Add what is noted of later images."""
        self.ids += other.ids
        self.labels += other.labels
        self.predicted += other.predicted
        self.probability += other.probability
        self.among += other.among
        self.show(other.shown)

    def show(self, shown: Shown) -> None:
        """Add what more maps show."""
        for name, classes in shown.items():
            for label, reason in classes.items():
                add_shown(self.shown, name, label, reason)

    def degenerate(self, classes: Sequence[str]) -> dict[str, str]:
        """Say why maps of an image show nothing, by image: with the classes where it was asked about for several."""
        reasons = {name: said(shown, classes) for name, shown in self.shown.items()}
        return {name: reason for name, reason in reasons.items() if reason}


def add_shown(shown: Shown, name: str, label: int, reason: str | None) -> None:
    """Add one map; of those that show something no more than two an image stay."""
    of_image = shown.setdefault(name, {})
    if reason is not None:
        of_image[label] = reason
    elif len(of_image) < 2:
        of_image.setdefault(label)


def said(shown: Mapping[int, str | None], classes: Sequence[str]) -> str:
    """Say why maps of one image show nothing: `all zero`, or `all zero (cat, dog), constant (bird)`."""
    listed: dict[str, list[str]] = {}
    for label, reason in sorted(shown.items()):
        if reason is not None:
            listed.setdefault(reason, []).append(classes[label] if label < len(classes) else f"class {label}")
    return ", ".join(f"{reason} ({', '.join(names)})" if len(shown) > 1 else reason for reason, names in listed.items())


@dataclass(eq=False)
class Tally:
    """What is known after some batches: notes, sums, and the seconds of the maps."""

    log: Log
    sums: "Mapping[str, Accumulate]"
    seconds: float = 0.0

    @classmethod
    def empty(cls, metrics: Mapping[str, Measure], classifier: Classifier) -> "Tally":
        """Return that of no batch."""
        from sightline.accumulate import Accumulate  # whose library takes seconds to import

        return cls(Log(), {name: Accumulate(one).to(classifier.device) for name, one in metrics.items()})

    def scores(self, classes: Sequence[str] = ()) -> Scores:
        """Return the outcome; `classes` are the names of the classes, where they have some.

        Raises:
            ValueError: no image was measured.
        """
        log = self.log
        if not log.ids:
            raise ValueError("no image was measured; the data set is empty")
        scores = tuple(summed(Choice(name), one) for name, one in self.sums.items())
        lists = tuple(log.ids), tuple(log.labels), tuple(log.predicted), tuple(log.probability)
        return Scores(scores, *lists, self.seconds, log.degenerate(classes), tuple(log.among))


def shows(sample: Sample, label: int) -> bool | None:
    """Tell whether an image with several classes shows one of them; None of an image with one class."""
    if sample.labels is None or int((sample.labels > 0).sum()) < 2:
        return None
    return label < len(sample.labels) and bool(sample.labels[label] > 0)


def summed(metric: Choice, sums: "Accumulate") -> Score:
    """Return one metric's outcome; NaN where no image counts."""
    measure, (mean, kept, count) = sums.measure, sums.compute()
    mean = mean.reshape(-1)  # torchmetrics squeezes what holds one number
    pooled = measure.state == "pool"
    rows = kept.reshape(int(count), -1) if pooled and int(count) else mean
    value = measure.finish(rows) if pooled else sums.finished(rows)
    curve = () if measure.curve is None else tuple(measure.curve(mean).tolist())
    per_image = () if pooled else tuple(kept.reshape(-1).tolist())
    return Score(metric, float(value), measure.higher_is_better, per_image, curve, measure.axis, int(count))


class Subject:
    """One batch under explanation: each map is made once, whatever asks for it."""

    def __init__(self, maps: Maps, classifier: Classifier, batch: Batch) -> None:
        self.maps, self.classifier, self.batch = maps, classifier, batch
        self.logits = logits_of(classifier, batch.x)
        self.cases: dict[tuple[str, str], Case] = {}

    def label(self, kind: str, metric: str = "the map") -> Labels:
        """Return the class of each image that `kind` means.

        Raises:
            ValueError: the label is asked for and an image has none.
        """
        if kind == "label":
            if self.batch.y is None:
                name = next(sample.id for sample in self.batch.samples if sample.label is None)
                raise ValueError(
                    f"{metric} needs the label, and {name!r} has none; explain what is predicted (--explain predicted)"
                )
            return check_labels(self.logits, self.batch.y)
        if isinstance(self.classifier.model, Absent):
            self.classifier(self.batch.x)
        order = self.logits.argsort(dim=1, descending=True, stable=True)
        return order[:, {"predicted": 0, "second": 1, "least": -1}[kind]]

    def case(self, kind: str, scored: str, y: Labels) -> Case:
        """Return the batch with the map of class `kind`, to be scored for class y."""
        if (kind, scored) not in self.cases:
            raw, x = finite(self.map(kind)), self.batch.x
            saliency = scaled(raw, (x.shape[2], x.shape[3])).to(x.dtype)
            self.cases[kind, scored] = Case(
                self.classifier, x, y, saliency, raw, self.maps, self.batch, self.logits, explained=self.label(kind)
            )
        return self.cases[kind, scored]

    def map(self, kind: str) -> Saliency:
        """Return the maps of class `kind`."""
        return self.maps.of(self.classifier, self.batch, self.label(kind))


def size_of(values: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return values.numel() * values.element_size()


def logits_of(classifier: Classifier, x: Images) -> Logits:
    """Return the logits; NaN where there is no classifier."""
    if isinstance(classifier.model, Absent):
        return x.new_full((len(x), classifier.model.classes), math.nan)
    with torch.no_grad():
        return classifier(x)


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


def synchronize(x: Tensor) -> None:
    """Wait for an accelerator, so that the time is the work's."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
