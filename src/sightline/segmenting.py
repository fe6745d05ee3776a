"""Segmenting. Pseudo labels at scale: from maps to label maps in files, over any data set, in any number of processes.

The first stage of weakly supervised segmentation, as in IRN (Ahn, Cho and Kwak, Weakly supervised learning of instance
segmentation with inter-pixel relations, CVPR 2019) and in Maruf et al., Beyond discriminative regions, 2023.

Images are cut into batches of consecutive ones, and whole batches are dealt to the processes that `RANK` and
`WORLD_SIZE` tell of, as `torchrun` sets them. What a batch gives depends on nothing but its images, so any number of
processes writes the same bytes (on one kind of device, with one number of threads); they share nothing but the folder.
A batch is done when its line is in OUT/done/RANK.jsonl, which happens after all of its files are there. What a line
keeps does not grow with the batch, but for maps that show nothing and files that were skipped.
"""

import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline import models, viz
from sightline.backgrounds import IGNORE, LARGEST, Resolve, labels_at, refined_labels, resolve_of
from sightline.classifier import Classifier, Method
from sightline.data import Batch, Dataset, Indexed, Sample, collate
from sightline.evaluation import Maps, checked_batch, logits_of, synchronize
from sightline.images import ImageError, fit
from sightline.interchange import MEANING, Cams, read_labels, write_irn, write_labels
from sightline.kinds import entries
from sightline.maps import by_maximum, degenerate, resize
from sightline.metrics import finite
from sightline.models._files import checksums
from sightline.protocols._segmentation import NORMALIZERS, check_threshold, enlarged, raw_maps
from sightline.registry import chosen, unknown
from sightline.running import Channeled, chosen_method, labeled, reader_of
from sightline.runs import (
    Choice,
    Spec,
    arguments,
    provenance,
    read_claim,
    read_toml,
    without_none,
    write_bytes,
    write_text,
)
from sightline.settings import bind

Report: TypeAlias = Callable[[int, int, str], None]
"""Told how many of how many images of this process are done, and how fast."""

Compete: TypeAlias = Callable[[Classifier, Batch, int], list[tuple[int, ...]]]
"""From a classifier, a batch and the number of classes to the classes that compete in each image."""

Raw: TypeAlias = Sequence[Float[Tensor, "1 1 _i _j"]]
"""The maps of one image, one a class."""

LABELS, IRN, DONE = "labels", "irn", "done"
"""The folders below OUT."""

CLAIM, MANIFEST, TIMING, CONTACT = MEANING, "manifest.json", "timing.json", "contact.png"
"""What a folder belongs to and what its values mean, what came out, how long it took, how it looks."""

STAGES = ("read", "explain", "resolve", "write")

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""Endings of pictures, which the names of label maps do not keep."""

LEFTOVER = re.compile(r"\..+\.(png|npy|npz)\.[a-z0-9_]{8}")
"""What a process that was killed while it wrote a file leaves behind."""

SHOWN, PAIRS, STRENGTH = 24, 4, 0.6
"""Of the contact sheet: how many images, how many a row, and how strong the colors of the labels are."""

THREADS = 8
"""How many threads read, resolve and write, at most."""

STRIDE = 4
"""Of IRN's coarse maps."""

SIZES = ("original", "input")

FORMS = ("npy", "npz")
"""Of IRN's dictionaries: its own pickles, which its program reads, or archives, which run no code."""

BASIC, GIVEN, CRF = Choice("basic"), Choice("labels"), "crf"

NAMES = ("model", "data", "method", "resolve", "classes")
"""Entries that are names with settings."""


@dataclass(frozen=True)
class Segmenting:
    """Everything that determines the label maps of a data set.

    `threshold`: where no resolved map exceeds it a pixel is background (0.3 is the paper's, for superpixels); of two,
    (low, high), pixels between them are ignored. With the resolve "crf" the labels at each threshold have a CRF of
    their own, as in IRN. `normalize`: "max" divides each map by its maximum, as the paper does, "unit" scales it to
    [0, 1], "none" leaves it, also after `resolve`. A trained segmenter's maps are log-odds: they want "none", and a
    threshold of 0. `classes` says which compete in an image: a name of `COMPETE`. `size`: label maps of the "original"
    picture's size, or of the network's "input". `irn`: write the maps as IRN's dictionaries too, as "npy", which IRN
    reads, or "npz"; a table may say true for "npy". `images` = 0 means all.
    """

    model: Choice
    data: Choice
    method: Choice
    resolve: Choice = BASIC
    threshold: float | tuple[float, float] = 0.3
    normalize: str = "max"
    classes: Choice = GIVEN
    size: str = "original"
    layer: str | None = None
    irn: str | None = None
    images: int = 0
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.low <= self.high or not all(map(math.isfinite, (self.low, self.high))):
            raise ValueError(f"expected a threshold, or two with low <= high, got threshold={self.threshold}")
        if self.batch < 1 or self.images < 0:
            raise ValueError(f"expected batch >= 1 and images >= 0, got batch={self.batch}, images={self.images}")
        chosen(self.normalize, NORMALIZERS, "normalization")
        check_threshold(self.normalize, self.low, self.high)
        if self.size not in SIZES:
            raise LookupError(unknown(self.size, SIZES, "size"))
        if self.irn is not None and self.irn not in FORMS:
            raise LookupError(unknown(self.irn, FORMS, "form of IRN's dictionaries"))
        if self.resolve.name == CRF and "threshold" in self.resolve.settings:
            raise ValueError("the CRF refines the labels at the segmenting's own threshold; leave out crf?threshold=")

    @property
    def low(self) -> float:
        """Up to here a pixel is background."""
        return self.threshold[0] if isinstance(self.threshold, tuple) else self.threshold

    @property
    def high(self) -> float:
        """Above this a pixel has a class."""
        return self.threshold[1] if isinstance(self.threshold, tuple) else self.threshold

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Segmenting":
        """Read a table.

        Raises:
            LookupError: an entry that it does not have, an unknown `normalize` or `size`.
            TypeError: a value of another kind.
            ValueError: a missing entry, or a number out of range.
        """
        levels = {"threshold": threshold_of(table["threshold"])} if "threshold" in table else {}
        forms = {"irn": form_of(table["irn"])} if "irn" in table else {}
        read = {**table, **levels, **forms}
        entries(cls, read, "segmenting")
        return cls(**{**read, **{name: Choice.of(read[name]) for name in NAMES if name in read}})

    @classmethod
    def read(cls, path: Path | str, **entries: Any) -> "Segmenting":
        """Read a TOML file; `entries` win over it.

        Raises:
            FileNotFoundError: no such file.
            LookupError, TypeError, ValueError: not TOML, or not what `of` reads; the message names the file.
        """
        table = read_toml(path)
        try:
            return cls.of({**table, **entries})
        except (LookupError, TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error.args[0] if error.args else error}") from error

    def changed(self, **entries: Any) -> "Segmenting":
        """Return it with other entries; those that are None stay."""
        return replace(self, **{name: value for name, value in entries.items() if value is not None})

    def plain(self) -> dict[str, Any]:
        """Return the table that `of` reads; what is None is left out."""
        table = {one.name: getattr(self, one.name) for one in fields(self)}
        found: dict[str, Any] = without_none({**table, **{name: table[name].plain() for name in NAMES}})
        return found


def threshold_of(value: Any) -> float | tuple[float, float]:
    """Read one number, or a list of a low and a high one.

    Raises:
        TypeError: neither.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(type(one) in (int, float) for one in numbers):
        raise TypeError(f"expected threshold to be a number or a list [low, high], got {value!r}")
    low, high = float(numbers[0]), float(numbers[-1])
    return low if low == high else (low, high)


def form_of(value: Any) -> str | None:
    """Read in which form IRN's dictionaries are asked for: one of `FORMS`, true for the first, false for none.

    Raises:
        TypeError: neither text nor true or false.
    """
    if value is not None and type(value) not in (bool, str):
        raise TypeError(f"expected irn to be one of {', '.join(FORMS)}, or true or false, got {value!r}")
    return (FORMS[0] if value else None) if isinstance(value, bool) else value


@dataclass(frozen=True)
class Manifest:
    """What came out: how many images, which were skipped and why, pixels of each kind, maps that show nothing.

    `degenerate` lists (image, class, reason).
    """

    images: int
    skipped: Mapping[str, str]
    background: int
    ignored: int
    classes: Mapping[str, int]
    degenerate: tuple[tuple[str, str, str], ...]

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the pixels that are foreground, background and ignored."""
        counts = {"foreground": sum(self.classes.values()), "background": self.background, "ignored": self.ignored}
        return {kind: count / max(1, sum(counts.values())) for kind, count in counts.items()}

    def plain(self) -> dict[str, Any]:
        """Return what JSON holds."""
        pixels = {"background": self.background, "ignored": self.ignored, "classes": dict(self.classes)}
        listed = [{"image": image, "class": label, "reason": reason} for image, label, reason in self.degenerate]
        counts = {"images": self.images, "pixels": pixels, "shares": self.shares}
        return {**counts, "skipped": dict(self.skipped), "degenerate": listed}


def segment(spec: Segmenting, out: Path | str, *, report: Report | None = None) -> Manifest | None:
    """Write a label map of every image: OUT/labels/ID.png, with Pascal VOC's palette, 0 background, 255 ignored.

    The maps of the classes that compete in an image are resized to the input (bilinear), normalized, resolved and, for
    the original size, resized once more before labels are taken; a CRF runs at the size of the labels, one for each
    threshold. Files that turn out broken are skipped. A call with the same `out` does what is not done yet, also in
    another number of processes. What value v of a label map means is `names[v]` in segment.json. Whoever finds
    everything done writes manifest.json, the same for any number of processes, timing.json and contact.png; None where
    other processes have something to do still.

    *Differs:* the files of a data set are not decoded once more beforehand, unless its settings say `check=`. At the
    original size the CRF sees the input's colors, enlarged: IRN's sees the picture as it is stored.

    Raises:
        LookupError, TypeError, ValueError, OSError: a name, setting, file or data set that does not fit; an image
            without labels where they say which classes compete; two images whose label maps would be the same file; a
            folder that belongs to another segmenting.
    """
    work = opened(spec, Path(out))
    claim(work)
    carry_out(work, report or (lambda done, total, note: None))
    return concluded(work)


def carry_out(work: "Work", told: Report) -> None:
    """Do the batches of this process that are not done yet."""
    rank, world = process()
    done = {record["batch"] for _, record in records(work.folder)}
    mine = range(rank, work.batches, world)
    left = [number for number in mine if number not in done]
    total, new = (sum(len(work.images(number)) for number in numbers) for numbers in (mine, left))
    seen, start = total - new, time.perf_counter()
    told(seen, total, "")
    since = start
    with ThreadPoolExecutor(threads()) as readers, ThreadPoolExecutor(threads()) as writers:
        for number, read in fetched(work, left, readers):
            record = batch_of(work, number, read, pool=writers, since=since)
            add(work.folder / DONE / f"{rank}.jsonl", record)
            seen, since = seen + len(read), time.perf_counter()
            told(seen, total, f"{(seen - total + new) / (since - start):.1f} images/s")


@dataclass(frozen=True, eq=False)
class Work:
    """A segmenting whose names have become objects."""

    spec: Segmenting
    folder: Path
    classifier: Classifier
    dataset: Dataset
    samples: Indexed[Sample]
    method: Method
    compete: Compete
    resolve: Resolve
    count: int
    """How many images there are."""
    classes: int
    """How many classes the network has."""
    recorded: Mapping[str, Any]
    """What the folder's claim says."""

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return math.ceil(self.count / self.spec.batch)

    def images(self, number: int) -> range:
        """Return the images of a batch."""
        return range(number * self.spec.batch, min(self.count, (number + 1) * self.spec.batch))

    def name(self, label: int) -> str:
        """Return the name of a class: its number where it has none, both where others are called so too."""
        names = self.classifier.classes or self.dataset.classes
        if label >= len(names):
            return str(label)
        return names[label] if names.count(names[label]) == 1 else f"{names[label]} ({label})"


def opened(spec: Segmenting, folder: Path) -> Work:
    """Turn names into objects, and check all that can be checked before any work.

    Raises:
        LookupError, TypeError, ValueError, OSError: see `segment`.
    """
    method, compete, resolve = parts(spec)
    classifier = models.load(spec.model)
    classifier = classifier if spec.layer is None else classifier.at(spec.layer)
    classifier.model.to(device())
    reader = unchecked(reader_of(spec.data, classifier), spec.data)
    said = arguments(reader)
    if spec.size == "original" and said.get("resize", "direct") != "direct":
        raise ValueError(
            f"the data is read with resize={said['resize']}, and what it cuts off has no labels at the original size; "
            "add resize=direct to the settings of the data, or take size input"
        )
    dataset = reader()
    known = spec.classes.name == GIVEN.name
    samples = labeled(dataset, classifier) if known else Channeled(dataset, classifier.channels)
    count = min(spec.images or len(dataset), len(dataset))
    classes = logits_of(classifier, blank(classifier)).shape[1]
    if classes > LARGEST + 1:
        raise ValueError(f"label maps hold {LARGEST + 1} classes, and the network has {classes}; take one with fewer")
    settings = {"data": said, "method": arguments(method), "resolve": arguments(resolve), "classes": arguments(compete)}
    model = {name: getattr(classifier, name) for name in ("layer", "mean", "std", "size")}
    recorded = {
        **spec.plain(),
        "arguments": {**settings, "model": model},
        "weights": checksums(spec.plain()),
        "listed": {"images": count, "files": listing(dataset, count)},
        "names": ["background", *(classifier.classes or dataset.classes)],
        "versions": provenance()["versions"],
    }
    return Work(spec, folder, classifier, dataset, samples, method, compete, resolve, count, classes, recorded)


def parts(spec: Segmenting) -> tuple[Method, Compete, Resolve]:
    """Return the method, the classes that compete and the background resolve: what is known before any work.

    Raises:
        LookupError, TypeError, ValueError, OSError: an unknown name, or a setting that does not fit.
    """
    method = chosen_method(Spec(spec.model, spec.data, spec.method, (), seed=spec.seed))
    compete: Compete = bind(chosen(spec.classes.name, COMPETE, "choice of classes"), spec.classes.settings)
    return method, compete, resolve_of(spec.resolve.plain(), divided=spec.normalize != "none")


def blank(classifier: Classifier) -> Float[Tensor, "1 ch h w"]:
    """Return a black image of a classifier's size."""
    return torch.zeros(1, classifier.channels, *classifier.size, device=classifier.device)


def device() -> torch.device:
    """Return the GPU that is this process's, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def process() -> tuple[int, int]:
    """Return the number of this process, and of how many.

    Raises:
        ValueError: the environment says what cannot be.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world:
        raise ValueError(f"expected 0 <= RANK < WORLD_SIZE in the environment, got RANK={rank}, WORLD_SIZE={world}")
    return rank, world


def threads() -> int:
    """Return how many threads this process gets."""
    return max(1, min(THREADS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def unchecked(reader: Callable[[], Dataset], data: Choice) -> Callable[[], Dataset]:
    """Return a reader that trusts the files of its data set, unless something else is asked for."""
    trusts = "check" in arguments(reader) and "check" not in data.settings
    return bind(reader, {"check": "none"}) if trusts else reader


def given(classifier: Classifier, batch: Batch, count: int, /) -> list[tuple[int, ...]]:
    """Return the classes that the data set says are in each image.

    Raises:
        ValueError: it does not say, or says one that the network does not have.
    """
    found = [labels_of(sample) for sample in batch.samples]
    for name, labels in zip(batch.ids, found, strict=True):
        if wrong := [label for label in labels if not 0 <= label < count]:
            raise ValueError(f"{name!r} shows class {wrong[0]}, and the network has classes 0..{count - 1}")
    return found


def labels_of(sample: Sample) -> tuple[int, ...]:
    """Return the labels of an image, from the lowest.

    Raises:
        ValueError: it has none.
    """
    if sample.labels is None and sample.label is None:
        raise ValueError(
            f"{sample.id!r} has no label to say which classes compete in it; let the network say: classes predicted, "
            "top (where each image has one class) or all"
        )
    if sample.labels is None:
        return (int(sample.label or 0),)
    return tuple((sample.labels > 0).nonzero().flatten().tolist())


def predicted(classifier: Classifier, batch: Batch, count: int, /, *, above: float = 0.5) -> list[tuple[int, ...]]:
    """Return the classes with sigmoid(logit) > `above`, at least the most probable one: of a multi-label network.

    Of a trained segmenter these are the classes that beat the background somewhere: with thresholds of 0 or more the
    labels are those of `every`, for less work.

    Raises:
        ValueError: a probability that no class exceeds, or every one does.
    """
    if not 0 <= above < 1:
        raise ValueError(f"expected above in [0, 1), a probability, got {above}")
    with torch.no_grad():
        logits = classifier(batch.x)
    taken = (logits.sigmoid() > above).scatter(1, logits.argmax(1, keepdim=True), True)
    return [tuple(row.nonzero().flatten().tolist()) for row in taken]


def top(classifier: Classifier, batch: Batch, count: int, /, *, most: int = 1) -> list[tuple[int, ...]]:
    """Return the `most` classes with the largest logits.

    Raises:
        ValueError: not 1 to as many as there are.
    """
    if not 1 <= most <= count:
        raise ValueError(f"expected most in 1 to {count}, the number of classes, got {most}")
    with torch.no_grad():
        order = classifier(batch.x).argsort(dim=1, descending=True, stable=True)
    return [tuple(sorted(row)) for row in order[:, :most].tolist()]


def every(classifier: Classifier, batch: Batch, count: int, /) -> list[tuple[int, ...]]:
    """Return all classes."""
    return [tuple(range(count))] * len(batch)


COMPETE: Mapping[str, Compete] = {"labels": given, "predicted": predicted, "top": top, "all": every}
"""Name -> which classes compete in an image: those that it is labeled with, or those that the network finds in it."""


def listing(dataset: Dataset, count: int) -> str | None:
    """Return a checksum of the images' names where the data set lists them.

    Raises:
        ValueError: two of them would have the same label map.
    """
    files: Sequence[str] | None = getattr(dataset, "files", None)
    if files is None:
        return None
    if twice := repeated(files[:count]):
        raise ValueError(f"{twice[0]} and {twice[1]} would both have the label map {file_of(twice[1])}.png; rename one")
    digest = hashlib.sha256()
    for file in files[:count]:
        digest.update(file.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def repeated(files: Sequence[str]) -> tuple[str, str] | None:
    """Return two files of one name but for their endings, if there are any; needs 8 bytes a file."""
    marks, counts = np.unique(np.fromiter((hash(file_of(file)) for file in files), np.int64), return_counts=True)
    suspects, seen = {*marks[counts > 1].tolist()}, dict[str, str]()
    for file in files if suspects else ():
        name = file_of(file)
        if hash(name) in suspects and seen.setdefault(name, file) is not file:
            return seen[name], file
    return None


def file_of(name: str) -> str:
    """Return the name of an image without the ending of a picture."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in ENDINGS else name


def placed(root: Path, name: str, ending: str) -> Path:
    """Return the path of an image's file below a folder.

    Raises:
        ValueError: it would lie outside.
    """
    path = root / f"{file_of(name)}{ending}"
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the labels of {name!r} would lie outside {root}; rename the image")
    return path


def claim(work: Work) -> None:
    """Write into a folder what it belongs to; that may change as long as there are no labels in it.

    A claim of before there were `names` fits any, and gets them.

    Raises:
        ValueError: it belongs to another segmenting.
    """
    text, path = json.dumps(work.recorded, indent=1, sort_keys=True, default=list) + "\n", work.folder / CLAIM
    new: dict[str, Any] = json.loads(text)
    begun = path.exists() and any((work.folder / name).exists() for name in (LABELS, DONE))
    old: dict[str, Any] = read_claim(path) if begun else new
    if "names" not in old:
        old |= {"names": new["names"], "irn": {True: "npz", False: None}.get(old.get("irn", False))}
    if found := dict(differences(old, new)):
        asked = {name: said for name, said in found.items() if not name.startswith("arguments.")} or found
        told = "; ".join(f"{name} {said}" for name, said in asked.items())
        raise ValueError(f"{work.folder} belongs to another segmenting: {told}; delete it, or take another --out")
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield what differs between two tables, by its place."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield name, f"was {old} and is {new}"


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield process and record of every batch that is done, once; lines that were cut off do not count."""
    seen = set[int]()
    for path in sorted((folder / DONE).glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["batch"] not in seen:
                    seen.add(record["batch"])
                    yield path.stem, record


def add(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file and wait until it is stored; a line before it that was cut off stays apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        apart = b"\n" if file.read(1) not in (b"", b"\n") else b""
        file.write(apart + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, eq=False)
class Fetched:
    """An image or why it cannot be decoded, and the seconds that it took."""

    found: Sample | ImageError
    seconds: float


def fetched(work: Work, numbers: Iterable[int], pool: ThreadPoolExecutor) -> Iterator[tuple[int, Sequence[Fetched]]]:
    """Yield batches; the next one is read while one is at work."""
    ahead: tuple[int, list[Future[Fetched]]] | None = None
    for number in (*numbers, None):
        now = ahead
        ahead = None if number is None else (number, [pool.submit(fetch, work, i) for i in work.images(number)])
        if now is not None:
            yield now[0], [future.result() for future in now[1]]


def fetch(work: Work, index: int) -> Fetched:
    """Read an image."""
    start = time.perf_counter()
    try:
        found: Sample | ImageError = work.samples[index]
    except ImageError as error:
        found = error
    return Fetched(found, time.perf_counter() - start)


@dataclass(frozen=True)
class Outcome:
    """What is known of one image when its label map is written: pixels by value, degenerate maps, seconds."""

    pixels: Mapping[int, int]
    degenerate: tuple[tuple[str, int, str], ...]
    resolve: float
    write: float


def batch_of(
    work: Work, number: int, read: Sequence[Fetched], *, pool: ThreadPoolExecutor, since: float
) -> dict[str, Any]:
    """Segment a batch, write its files and return its record; `since` is when the batch before was done."""
    start = time.perf_counter()
    kept = [image.found for image in read if isinstance(image.found, Sample)]
    classes, raw = explained(work, collate(kept)) if kept else ([], [])
    made = time.perf_counter()
    outcomes = list(pool.map(partial(written, work), kept, classes, raw))
    pixels = sum((Counter(outcome.pixels) for outcome in outcomes), Counter[int]())
    seconds = {
        "read": sum(image.seconds for image in read),
        "explain": made - start,
        "resolve": sum(outcome.resolve for outcome in outcomes),
        "write": sum(outcome.write for outcome in outcomes),
        "all": time.perf_counter() - since,
    }
    return {
        "batch": number,
        "images": len(kept),
        "pixels": {str(value): pixels[value] for value in sorted(pixels)},
        "degenerate": [entry for outcome in outcomes for entry in outcome.degenerate],
        "skipped": [
            [index, reason(image.found)]
            for index, image in zip(work.images(number), read, strict=True)
            if isinstance(image.found, ImageError)
        ],
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
    }


def reason(error: ImageError) -> str:
    """Say what is wrong with a file, without how to pass over it."""
    return str(error.__cause__ if isinstance(error.__cause__, ImageError) else error)


def explained(work: Work, batch: Batch) -> tuple[Sequence[tuple[int, ...]], Sequence[Raw]]:
    """Return the classes that compete in each image, and their raw maps on the CPU."""
    part = checked_batch(batch, work.classifier)
    classes = work.compete(work.classifier, part, work.classes)
    made = raw_maps(Maps(work.method, room=0), work.classifier, part, classes, work.spec.batch)
    each = (one[None] for several in made for one in several.detach().cpu())
    found = [[*islice(each, len(labels))] for labels in classes]
    synchronize(part.x)
    return classes, found


def written(work: Work, sample: Sample, classes: tuple[int, ...], raw: Raw) -> Outcome:
    """Resolve the maps of an image and write its label map."""
    start = time.perf_counter()
    size, maps = label_size(work, sample), resolved(work, sample, raw)
    labels = label_map(work, sample, classes, maps)
    made = time.perf_counter()
    write_labels(placed(work.folder / LABELS, sample.id, ".png"), labels)
    if work.spec.irn is not None:
        path = placed(work.folder / IRN, sample.id, f".{work.spec.irn}")
        write_irn(path, cams([plane(one, size).float() for one in maps], classes, size), pickled=path.suffix == ".npy")
    reasons = [degenerate(one)[0] or (None if maps[i].any() else "nowhere positive") for i, one in enumerate(raw)]
    nothing = tuple((sample.id, label, why) for label, why in zip(classes, reasons, strict=True) if why is not None)
    counts = enumerate(labels.flatten().bincount().tolist())
    return Outcome(
        {value: count for value, count in counts if count}, nothing, made - start, time.perf_counter() - made
    )


def label_size(work: Work, sample: Sample) -> tuple[int, int]:
    """Return height and width of the label map of an image."""
    inside = (sample.image.shape[1], sample.image.shape[2])
    return (sample.size or inside) if work.spec.size == "original" else inside


def resolved(work: Work, sample: Sample, raw: Raw) -> Float[Tensor, "n h w"]:
    """Return the maps of an image at the input's size in float64: normalized, and resolved but for a CRF."""
    inside = (sample.image.shape[1], sample.image.shape[2])
    if not raw:
        return torch.zeros(0, *inside, dtype=torch.float64)
    maps = NORMALIZERS[work.spec.normalize](torch.cat([enlarged(finite(one).double(), inside)[0] for one in raw]))
    return maps if work.spec.resolve.name == CRF else work.resolve(sample.image, maps)


def label_map(
    work: Work, sample: Sample, classes: tuple[int, ...], maps: Float[Tensor, "n _h _w"]
) -> Int[Tensor, "h w"]:
    """Return the label map of an image; its maps are brought to its size one after the other, but for a CRF."""
    spec, size = work.spec, label_size(work, sample)
    if spec.resolve.name == CRF:
        large = torch.stack([plane(one, size) for one in maps]) if len(maps) else maps.new_zeros(0, *size)
        image = fit(sample.image, size, "direct")
        return refined_labels(image, large, classes, low=spec.low, high=spec.high, refine=work.resolve)
    if maps.shape[1:] == size:
        return labels_at(maps, classes, spec.low, spec.high)
    value, label = torch.full(size, -math.inf, dtype=torch.float64), torch.zeros(size, dtype=torch.long)
    for one, number in zip(maps, classes, strict=True):
        large = plane(one, size)
        label = torch.where(large > value, number + 1, label)
        value = torch.maximum(large, value)
    found = labels_at(value[None], (0,), spec.low, spec.high)
    return torch.where(found == 1, label, found)


def plane(one: Float[Tensor, "_i _j"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Resize one map (bilinear)."""
    return resize(one[None, None], size)[0, 0]


def cams(maps: Sequence[Float[Tensor, "h w"]], classes: tuple[int, ...], size: tuple[int, int]) -> Cams:
    """Return maps as IRN keeps them, without what is negative: `high_res` for labels, `cam` for its random walk.

    `cam` are the maps on a grid of a fourth of the picture (bilinear), divided by their maximum there.

    *Differs:* IRN has cut off and resized the network's own maps, and divides by the maximum + 1e-5.
    """
    coarse = (size[0] - 1) // STRIDE + 1, (size[1] - 1) // STRIDE + 1
    keys = torch.tensor(classes, dtype=torch.long)
    if not maps:
        return Cams(keys, torch.zeros(0, *coarse), torch.zeros(0, *size))
    shown = torch.stack([*maps]).relu()
    return Cams(keys, by_maximum(torch.stack([plane(one, coarse) for one in shown])), shown)


def concluded(work: Work) -> Manifest | None:
    """Write what is known when everything is done; None, and nothing is written, where it is not."""
    tally = Tally.of(work.folder)
    if tally.batches < work.batches:
        return None
    for root in (work.folder / LABELS, work.folder / IRN):
        for path in root.rglob(".*"):
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
    manifest = tally.manifest(work)
    write_text(work.folder / TIMING, json.dumps(tally.timing(), indent=1) + "\n")
    draw(work)
    write_text(work.folder / MANIFEST, json.dumps(manifest.plain(), indent=1) + "\n")
    return manifest


@dataclass
class Tally:
    """The sums of the batches that are done, of one reading of their lines."""

    batches: int = 0
    images: Counter[str] = field(default_factory=Counter[str])
    """How many of each process."""
    seconds: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    """How many of each process, by stage."""
    pixels: Counter[int] = field(default_factory=Counter[int])
    nothing: list[tuple[int, int, tuple[str, int, str]]] = field(default_factory=list)
    """Batch, place in it, and image, class and reason of a map that shows nothing."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Number of an image that was skipped, and why."""

    @classmethod
    def of(cls, folder: Path) -> "Tally":
        """Read what is done."""
        tally = cls()
        for name, record in records(folder):
            tally.add(name, record)
        return tally

    def add(self, process: str, record: Mapping[str, Any]) -> None:
        """Add a batch."""
        self.batches += 1
        self.images[process] += record["images"] if "images" in record else len(record["ids"])
        self.seconds.setdefault(process, Counter()).update(record["seconds"])
        self.pixels.update({int(value): count for value, count in record["pixels"].items()})
        self.nothing += [(record["batch"], i, (*entry,)) for i, entry in enumerate(record["degenerate"])]
        self.broken += [(index, reason) for index, reason in record["skipped"]]

    def manifest(self, work: Work) -> Manifest:
        """Return what came out, in the order of the images."""
        files: Sequence[str] | None = getattr(work.dataset, "files", None)
        names = {index: f"image {index}" if files is None else files[index] for index, _ in self.broken}
        return Manifest(
            self.images.total(),
            {**work.dataset.skipped, **{names[index]: reason for index, reason in sorted(self.broken)}},
            self.pixels[0],
            self.pixels[IGNORE],
            {work.name(v - 1): self.pixels[v] for v in sorted(self.pixels) if v not in (0, IGNORE)},
            tuple((image, work.name(label), reason) for _, _, (image, label, reason) in sorted(self.nothing)),
        )

    def timing(self) -> dict[str, Any]:
        """Return images per second and the seconds of the stages, in all and of each process.

        "read", "resolve" and "write" are summed over threads; "all" is the time that passed.
        """
        images, total = self.images.total(), sum(self.seconds.values(), Counter[str]())
        speed = {name: self.images[name] / self.seconds[name]["all"] for name in sorted(self.seconds)}
        return {
            "images": images,
            "images_per_second_of_a_process": images / max(total["all"], 1e-9),
            "seconds": {stage: round(total[stage], 3) for stage in (*STAGES, "all")},
            "processes": {name: {"images": self.images[name], "images_per_second": speed[name]} for name in speed},
        }


def draw(work: Work) -> None:
    """Draw the first images, each beside its labels, on a contact sheet."""
    pictures, captions = list[Tensor | None](), list[str]()
    for index in range(work.count):
        sample = fetch(work, index).found
        if isinstance(sample, ImageError) or not (path := placed(work.folder / LABELS, sample.id, ".png")).exists():
            continue
        labels = read_labels(path)
        there = [value - 1 for value in torch.unique(labels).tolist() if value not in (0, IGNORE)]
        pictures += [sample.image.expand(3, -1, -1), painted(sample.image, labels)]
        captions += [sample.id, ", ".join(map(work.name, there)) or "background"]
        if len(pictures) == 2 * SHOWN:
            break
    if not pictures:
        return
    width = min(len(pictures), 2 * PAIRS)
    empty = -len(pictures) % width
    cells, texts = [*pictures, *[None] * empty], [*captions, *[""] * empty]
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    below = [texts[i : i + width] for i in range(0, len(texts), width)]
    write_bytes(work.folder / CONTACT, viz.png(viz.grid(rows, captions=below)))


def painted(image: Float[Tensor, "ch h w"], labels: Int[Tensor, "_h _w"]) -> Float[Tensor, "3 h w"]:
    """Lay the colors of labels over an image; background stays clear."""
    near = resize(labels[None, None].float(), (image.shape[1], image.shape[2]), "nearest")[0, 0].long()
    colors = viz.palette()[near].permute(2, 0, 1)
    strength = STRENGTH * (near > 0).float()
    return image.float() * (1 - strength) + colors * strength
