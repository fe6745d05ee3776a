"""Running. From a specification to a run: names become objects, `measure` does the work, everything is recorded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor

from sightline import models, viz
from sightline.classifier import Absent, Classifier, Method
from sightline.data import Dataset, Indexed, Sample, batches
from sightline.datasets import DATASETS
from sightline.evaluation import Explain, Maps, Subject, Tally, check_explain, measured
from sightline.explanation import in_channels, laid
from sightline.images import fit
from sightline.interchange import stored, write_map
from sightline.maps import degenerate
from sightline.metrics import METRICS, Measure
from sightline.models._files import checksums, meanings
from sightline.pieces import Pieces, cut, joined, maps_in, packed, packed_parts, unpacked_parts
from sightline.processes import agreed, fabric_of, wait
from sightline.protocols import PROTOCOLS
from sightline.registry import find, load, unknown
from sightline.runs import Choice, Run, Score, Scores, Spec, arguments, describe, file_name, provenance, write_bytes
from sightline.settings import bind, method_of, seeded, signed
from sightline.speed import Precision, fast

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")

SHOWN = 8
"""How many images of a run get a picture, besides the best and the worst."""

EXTREMES = 3
"""How many best and how many worst images get a picture."""

SIDE = 160
"""Longer side of a picture in pixels."""


STORED = "maps"
"""The method that reads maps from files."""

KEPT = 256
"""How many of the last images stay in memory."""


@dataclass(frozen=True)
class Judges:
    """The metrics and protocols of a specification with their settings, by their text."""

    metrics: Mapping[str, Callable[..., Measure]]
    protocols: Mapping[str, Callable[..., Mapping[str, Score]]]


@dataclass(frozen=True)
class Scene:
    """What several methods are compared on: a classifier and a data set, with the settings of both in full."""

    classifier: Classifier
    dataset: Dataset
    samples: Indexed[Sample]
    arguments: Mapping[str, Any]


def scene(spec: Spec, *, fabric: "Fabric | None" = None) -> Scene:
    """Open the classifier and the data set that a specification names; the network goes to the fabric's device.

    Only the classifier that is explained is made `fast`, not those that a protocol names.

    Raises:
        LookupError: an unknown name or setting; the message names the nearest ones.
        TypeError, ValueError, OSError: a setting, a file or a data set that does not fit.
    """
    classifier = models.load(spec.model)
    classifier = classifier if spec.layer is None else classifier.at(spec.layer)
    if fabric is not None:
        classifier.model.to(fabric.device)
    if spec.fast is not None:
        classifier = fast(classifier, precision=cast(Precision, spec.fast))
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


def named(spec: Spec) -> tuple[Method, Judges]:
    """Return the method, and the metrics and protocols with their settings: what can be checked before any work.

    Raises:
        LookupError, TypeError, ValueError: an unknown name, a setting that does not fit, one that a protocol needs and
            lacks, or a metric listed twice.
        FileNotFoundError: last of all, a folder of maps that is not there.
    """
    check_explain(spec.explain)
    if not spec.metrics:
        raise ValueError("the specification lists no metric; expected at least one")
    listed = [str(metric) for metric in spec.metrics]
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise ValueError(f"the metric {twice[0]} is listed twice")
    find(spec.data.name, DATASETS, "datasets")
    protocols = {str(c): protocol_of(c, spec.seed) for c in spec.metrics if c.name in PROTOCOLS}
    metrics = {str(c): metric_of(c, spec.seed) for c in spec.metrics if c.name not in PROTOCOLS}
    return chosen_method(spec), Judges(metrics, protocols)


def chosen_method(spec: Spec) -> Method:
    """Return the method of a specification; `maps` stands for a folder of maps.

    Raises:
        LookupError, TypeError, ValueError, OSError: see `method_of` and `stored`.
    """
    if spec.method.name != STORED:
        return method_of(spec.method, spec.seed)
    if "root" not in spec.method.settings:
        raise ValueError(f"{STORED} needs root=, the folder of the maps")
    made: Method = bind(stored, spec.method.settings)()  # type: ignore[call-arg]
    return made


def metric_of(choice: Choice, seed: int) -> Callable[..., Measure]:
    """Return a metric with its settings, checked.

    Raises:
        LookupError, TypeError, ValueError: see `named`.
    """
    named_ones: Mapping[str, Any] = {**METRICS, **PROTOCOLS}
    factory: Callable[..., Measure] = seeded(find(choice.name, named_ones, "metrics").metric, choice.settings, seed)
    factory()
    return factory


def protocol_of(choice: Choice, seed: int) -> Callable[..., Mapping[str, Score]]:
    """Return a protocol with its settings; classifiers and data sets are still those of the text.

    Raises:
        LookupError, TypeError, ValueError: see `named`.
    """
    entry = PROTOCOLS[choice.name]
    if missing := [name for name in entry.needs if name not in choice.settings]:
        raise ValueError(f'{choice.name} needs {missing[0]}=; write {{ name = "{choice.name}", {missing[0]} = ... }}')
    return seeded(entry.protocol, choice.settings, seed)


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
class Channeled:
    """Samples whose images have the channels that the classifier reads (see `explanation.in_channels`)."""

    source: Indexed[Sample]
    channels: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self.source[index]
        image = in_channels(sample.image, self.channels, sample.id)
        return sample if image is sample.image else replace(sample, image=image)


@dataclass(frozen=True)
class Relabeled:
    """Samples whose labels are the numbers that the classifier gives to classes of the same names."""

    source: Indexed[Sample]
    numbers: tuple[int, ...]
    classes: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        sample, numbers = self.source[index], torch.tensor(self.numbers)
        label = None if sample.label is None else self.numbers[sample.label]
        box_labels = None if sample.box_labels is None else numbers[sample.box_labels]
        return replace(
            sample, label=label, box_labels=box_labels, labels=self.multi_hot(sample), mask=self.mask(sample)
        )

    def multi_hot(self, sample: Sample) -> Int[Tensor, " k"] | None:
        """Return the classes that are there."""
        if sample.labels is None:
            return None
        return torch.zeros(self.classes, dtype=torch.long).index_copy(
            0, torch.tensor(self.numbers), sample.labels.long()
        )

    def mask(self, sample: Sample) -> Int[Tensor, "h w"] | None:
        """Return the mask in the classifier's numbers."""
        if sample.mask is None:
            return None
        values = torch.full((max(256, len(self.numbers) + 1),), 255)
        values[: len(self.numbers) + 1] = torch.tensor([0, *(number + 1 for number in self.numbers)])
        return values[sample.mask]


def labeled(dataset: Dataset, classifier: Classifier) -> Indexed[Sample]:
    """Return the data set with the classifier's class numbers, and with its channels.

    Classes meet by their names where both have names. An image of other channels is an error when it is read.

    Raises:
        ValueError: a class of the data set that the classifier does not have.
    """
    seen = Channeled(dataset, classifier.channels)
    if not classifier.classes or not dataset.classes or dataset.classes == classifier.classes:
        return seen
    if missing := [name for name in dataset.classes if name not in classifier.classes]:
        raise ValueError(
            f"{len(missing)} classes of the data are none of the classifier's: "
            f"{unknown(missing[0], classifier.classes, 'class')}; rename them, or take a network of these classes; a "
            "folder can be read without labels (labels=false), and segment needs none with --classes predicted"
        )
    numbers = tuple(classifier.classes.index(name) for name in dataset.classes)
    return Relabeled(seen, numbers, len(classifier.classes))


def run(
    spec: Spec,
    *,
    on: Scene | None = None,
    folder: Path | None = None,
    keep: Path | None = None,
    pieces: Path | None = None,
    fabric: "Fabric | None" = None,
    report: Callable[[int, int, str], None] | None = None,
) -> Run:
    """Explain and score everything that a specification asks for.

    Under `torchrun` each process takes its part of the pieces, and all return the same run; the first alone draws
    pictures. With as many threads in each (torch's sums depend on them, and torchrun gives a process one) it is the
    same for any number of processes, to the last bit. They meet in the folder `pieces`, from which also a call goes on
    that was killed.

    Args:
        spec: what to do.
        on: the opened scene of this specification, where several methods share one.
        folder: where pictures go (the first images, the best and the worst); none are written without it.
        keep: where every map goes, as WSOL's `.npy`; none are written without it.
        pieces: where finished pieces wait for the others: a folder of their own, to `pieces.forget` when the run is
            written. Without it they stay in memory, which one process alone can do.
        fabric: devices and processes (`processes.fabric_of`, whose choice is the default).
        report: told how many images of how many this process has done, and which protocol is at work.

    Raises:
        LookupError, TypeError, ValueError, OSError: see `named`, `scene` and `measure`; several processes without
            `pieces`.
    """
    function, judges = named(spec)
    fabric = fabric_of() if fabric is None else fabric
    if fabric.world_size > 1 and pieces is None:
        raise ValueError(f"{fabric.world_size} processes need pieces=, a folder that all of them see")
    on = scene(spec, fabric=fabric) if on is None else on
    count = min(spec.images or len(on.samples), len(on.samples))
    recorded = {
        **on.arguments,
        **weights_of(spec),
        "method": arguments(function),
        "metrics": {name: arguments(one) for name, one in {**judges.metrics, **judges.protocols}.items()},
    }
    origin, classes = provenance(), on.classifier.classes or on.dataset.classes
    place = None if keep is None else str(keep)
    claim = {"spec": spec.plain(), "arguments": recorded, "images": count, "keep": place, **origin["versions"]}
    store = Pieces(pieces, claim)
    work = Work(spec, on, Maps(function), judges, count, keep, report or (lambda done, count, note: None))
    rank, world = fabric.global_rank, fabric.world_size
    agreed(lambda: work.explain(store, rank, world))
    agreed(lambda: work.judge(store, rank, world))
    scores = work.scores(store)
    pictures = draw(spec, on, work.maps, scores, folder) if folder is not None and fabric.is_global_zero else {}
    wait()
    return Run(spec, scores, recorded, origin, classes, dict(on.dataset.skipped), pictures)


@dataclass(frozen=True)
class Work:
    """What a run does, in pieces."""

    spec: Spec
    on: Scene
    maps: Maps
    judges: Judges
    count: int
    keep: Path | None
    report: Callable[[int, int, str], None]

    @property
    def metrics(self) -> dict[str, Measure]:
        """The metrics, new."""
        return {name: factory() for name, factory in self.judges.metrics.items()}

    @property
    def images(self) -> dict[str, range]:
        """The pieces of images, by name."""
        return {f"images-{number:04d}": part for number, part in enumerate(cut(self.count, self.spec.batch))}

    @property
    def protocols(self) -> dict[str, list[str]]:
        """The protocols' texts by the names of their pieces: those of one name ask for the same maps."""
        names = dict.fromkeys(text.partition("(")[0] for text in self.judges.protocols)
        return {name: [text for text in self.judges.protocols if text.partition("(")[0] == name] for name in names}

    def explain(self, store: Pieces, rank: int, world: int) -> None:
        """Score the pieces of images that are process `rank`'s of `world` and that nobody has done yet.

        Raises:
            LookupError, TypeError, ValueError, OSError: see `run`.
        """
        mine = list(self.images.items())[rank::world]
        total, so_far = sum(len(part) for _, part in mine), 0
        for name, part in mine:
            if name in store:
                self.report(so_far + len(part), total, "")
            else:
                tally = self.measured(part, so_far, total)
                kept = self.maps.held(self.on.classifier, tally.log.ids) if self.judges.protocols else {}
                store[name] = packed(tally, kept)
            so_far += len(part)

    def judge(self, store: Pieces, rank: int, world: int) -> None:
        """Run the protocols that are process `rank`'s of `world` and that nobody has run yet.

        Those of one name begin with the maps of all pieces in memory, whichever process made them.

        Raises:
            LookupError, TypeError, ValueError, OSError: see `run`.
        """
        mine = [(name, texts) for name, texts in list(self.protocols.items())[rank::world] if name not in store]
        if mine:
            self.maps.recall(self.on.classifier, self.made(store))
        recalled = dict(self.maps.memory)
        for name, texts in mine:
            self.maps.memory = dict(recalled)
            before, found = self.maps.seconds, dict[str, Mapping[str, Score]]()
            with self.maps.noted(self.on.classifier) as shown:
                for text in texts:
                    self.report(self.count, self.count, name)
                    protocol = with_objects(self.judges.protocols[text], self.on, self.spec)
                    found[text] = protocol(self.maps, self.on.classifier, First(self.on.samples, self.count))
            store[name] = packed_parts(found, self.maps.seconds - before, shown)

    def made(self, store: Pieces) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Yield the maps of all pieces with their images, in order: name, class, image, map."""
        for name, part in self.images.items():
            found = maps_in(store[name])
            images = {sample.id: sample.image for sample in map(self.on.samples.__getitem__, part)} if found else {}
            for (image, label), one in found.items():
                yield image, label, images[image], one.to(self.on.classifier.device)

    def measured(self, part: range, so_far: int, total: int) -> Tally:
        """Score one piece, and keep its maps where they are wanted; `so_far` of `total` images are done before."""

        def each(subject: Subject) -> None:
            nonlocal so_far
            so_far += len(subject.batch)
            if self.keep is not None:
                write_maps(self.spec, subject, self.keep)
            self.report(so_far, total, "")

        parts, explain = batches(self.on.samples, self.spec.batch, part), cast(Explain, self.spec.explain)
        return measured(self.maps, self.on.classifier, parts, self.metrics, explain, start=part.start, each=each)

    def scores(self, store: Pieces) -> Scores:
        """Return the scores of all pieces, in the order of the specification."""
        tally = joined((store[name] for name in self.images), self.metrics, self.on.classifier)
        made, seconds = dict[str, tuple[Score, ...]](), tally.seconds
        for name in self.protocols:
            outcome, more, shown = unpacked_parts(store[name])
            tally.log.show(shown)
            for text, parts in outcome.items():
                made[text] = tuple(replace(score, metric=Choice(part)) for part, score in parts.items())
            seconds += 0 if self.judges.metrics else more
        found = tally.scores(self.on.classifier.classes or self.on.dataset.classes)
        made |= {score.metric.name: (score,) for score in found.scores}
        listed = tuple(one for choice in self.spec.metrics for one in named_after(choice, made))
        return replace(found, scores=listed, seconds=seconds)


def finished(spec: Spec, path: Path) -> Run | None:
    """Return the run in a file, if it is of this specification, and of weights and manifests as they are now.

    An older run, which does not say what the manifests were, is taken for one of those that are there.
    """
    kept = Run.read(path) if path.exists() else None
    if kept is None or kept.spec != spec:
        return None
    then, now = kept.arguments, weights_of(spec)
    same = then.get("weights") == now.get("weights")
    return kept if same and then.get("manifests", now.get("manifests")) == now.get("manifests") else None


def weights_of(spec: Spec) -> dict[str, Any]:
    """Return checksums of the files that a specification names, as `weights`, and digests of their `manifests`.

    A run that was made with other weights, or with another normalization of them, is another run, though its
    specification is the same. There is neither entry where no file is named.
    """
    plain = spec.plain()
    found = {"weights": checksums(plain), "manifests": meanings(plain)}
    return {name: digests for name, digests in found.items() if digests}


def shown_class(spec: Spec, classifier: Classifier) -> str:
    """Return whose map is drawn and kept: that of the specification, else of the predicted class, if there is one."""
    if spec.explain != "scored":
        return spec.explain
    return "label" if isinstance(classifier.model, Absent) else "predicted"


def write_maps(spec: Spec, subject: Subject, keep: Path) -> None:
    """Write the map of every image of a batch as `keep/ID.npy`.

    Raises:
        ValueError: the name of an image that would leave the folder.
    """
    maps = subject.map(shown_class(spec, subject.classifier))
    for name, raw in zip(subject.batch.ids, maps, strict=True):
        path = keep / f"{name}.npy"
        if not path.resolve().is_relative_to(keep.resolve()):
            raise ValueError(f"the map of {name!r} would lie outside {keep}; rename the image")
        write_map(path, raw)


def named_after(choice: Choice, made: Mapping[str, tuple[Score, ...]]) -> Iterator[Score]:
    """Yield the scores of a choice, named by it; those of a protocol are called `protocol.part`."""
    for score in made[str(choice)]:
        name = f"{choice.name}.{score.metric.name}" if choice.name in PROTOCOLS else choice.name
        yield replace(score, metric=replace(choice, name=name))


@dataclass(frozen=True)
class First:
    """The first `count` samples."""

    samples: Indexed[Sample]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"there are {self.count} samples, got index {index}")
        return self.samples[index]


def with_objects(protocol: Callable[..., T], on: Scene, spec: Spec) -> Callable[..., T]:
    """Return a protocol whose classifiers, data sets and methods are objects in place of their names.

    Raises:
        LookupError, TypeError, ValueError, OSError: a name, file or data set that does not fit.
    """
    said = protocol.keywords if isinstance(protocol, partial) else {}

    def beside(one: Any) -> Classifier:
        if Choice.of(one) == spec.model and spec.layer is None and spec.fast is None:
            return on.classifier
        classifier = models.load(Choice.of(one))
        classifier.model.to(on.classifier.device)
        return classifier

    makers: dict[str, Callable[[Any], Any]] = {
        "classifiers": lambda listed: [beside(one) for one in listed],
        "permuted": beside,
        "reference": beside,
        "held_out": lambda one: Recent(labeled(reader_of(Choice.of(one), on.classifier)(), on.classifier)),
        "by": lambda one: method_of(Choice.of(one), spec.seed),
    }
    objects = {name: make(said[name]) for name, make in makers.items() if name in said}
    return partial(protocol, **{"batch": spec.batch, **said, **objects})


def draw(spec: Spec, on: Scene, method: Maps, scores: Scores, folder: Path) -> dict[str, dict[str, str]]:
    """Write image and overlay of the first images and of the best and worst ones; return their files by image."""
    pictures: dict[str, dict[str, str]] = {}
    is_signed = signed(method.method)
    indices = worth_showing(scores)
    for batch in batches(on.samples, spec.batch, indices):
        subject = Subject(method, on.classifier, batch.to(on.classifier.device))
        maps = subject.map(shown_class(spec, on.classifier))
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
