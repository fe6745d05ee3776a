"""Segmentation. What a method's maps are worth as seeds of weakly supervised semantic segmentation.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023. The background is resolved as in IRN (Ahn, Cho and Kwak, CVPR 2019).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sightline.backgrounds import IGNORE, Resolve, resolve_of
from sightline.classifier import Classifier, Method, UnsuitedError
from sightline.data import Batch, Indexed, Sample, batches, layers, numbered_layers
from sightline.evaluation import Maps, checked_batch
from sightline.maps import by_maximum, check_shares, resize, unit
from sightline.methods._cam import cam
from sightline.methods._grad_cam import grad_cam
from sightline.methods._per_class import one_pass
from sightline.metrics import finite
from sightline.metrics._segmentation import REGIONS, Average, regions, share
from sightline.protocols._cues import KEYPOINTS
from sightline.registry import chosen
from sightline.runs import Choice, Score
from sightline.types import Saliency

Normalize: TypeAlias = Literal["max", "unit", "none"]

Compete: TypeAlias = Literal["present", "all"]
"""Which classes a pixel may get: those known to be in its image, or all that the network has."""

Regions: TypeAlias = Literal["cam", "cue"]
"""What DR is: where a CAM is high, or the parts by which the data set tells its classes apart."""

Parting: TypeAlias = Callable[[Classifier, Batch, Sequence[Sequence[int]], int], Sequence[Bool[Tensor, "_n h w"]]]
"""From a batch and the classes of each image to where their DR are, some images at a time."""

THRESHOLDS = tuple(step / 100 for step in range(1, 51))
"""0.01 to 0.50 by 0.01."""


def segmentation(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    threshold: float | None = None,
    normalize: Normalize = "max",
    resolve: Resolve | str | Mapping[str, Any] = "basic",
    compete: Compete = "present",
    regions: Regions = "cam",
    by: Method | None = None,
    reference: Classifier | None = None,
    tau_cam: float = 0.25,
    tau_sm: float = 0.15,
    batch: int = 16,
) -> dict[str, Score]:
    """Segment images by their maps at every threshold; report everything at the one with the best mean IoU.

    For each class in the image (`labels`, else the label, else the classes in the mask) the map is resized to the
    image (bilinear) and divided by its maximum (`normalize`: "unit" scales it to [0, 1], "none" leaves it). What
    `resolve` makes of the maps of these classes ("basic": nothing) is thresholded: a pixel is background where no map
    exceeds the threshold, else of the class with the largest one (the first of equal ones). A trained segmenter, whose
    maps are log p_c - log p_background, is scored without image labels by `compete="all", normalize="none",
    threshold=0`.

        miou                       mean IoU over the classes, the background too
        fg_precision, _micro       correct foreground / predicted foreground: mean over classes, or pooled
        dr_recall, ndr_recall      |P_c and DR_c| / |DR_c|, |P_c and NDR_c| / |NDR_c|: mean over classes; _micro pooled
        hsr_dr ... lsr_ndr         the four regions as shares of the objects' pixels; they sum to 100
        threshold                  where the mean IoU is best (the lowest of equal ones), or the one that was given

    All but the last in percent. DR_c and NDR_c are the pixels of class c in the mask where the map of `by`, divided by
    its maximum, is at least `tau_cam` or below; `by` is the CAM by default, and Grad-CAM (which has no negative values)
    for a network without a linear head. It explains `reference`, by default the classifier itself; the paper's tables
    need one reference for all methods. With `regions="cue"` DR_c are instead the pixels that truly tell class c from
    the ones nearest to it, where the data set knows them (creatures), and NDR_c the rest of its mask. HSR and LSR are
    the pixels where the map of the method, before `resolve`, is at least `tau_sm` or below. All pixels of the data set
    are pooled; 255 in the mask counts nowhere; a number of which there is nothing (no class predicted, no NDR) is NaN.
    The sweep is one pass, its memory grows with classes times thresholds, and with all classes competing with `batch`
    times classes. Methods that explain all classes in one pass (`per_class`: CAM, RISE, CALM's maps, a segmenter) do so
    once an image; where what defines DR is the method itself on the same network, no map is made for it.

    The recalls are biased where a CAM itself is evaluated: for an image of one class its DR-Recall is 100 at every
    threshold up to `tau_cam`, and its NDR-Recall is 0 at every one from there on. They tell how well other maps make
    up for what CAMs miss.

    *Differs:* the recalls are means over classes, of which the paper says nothing.

    Raises:
        ValueError: thresholds that do not increase, or outside [0, 1] where maps are divided by their maximum, shares
            of it outside (0, 1], an image without a mask or with a mask of another size, a class that the network does
            not have, a reference with other classes, settings of a CAM where the regions are cues, a data set that
            knows no cues, or no image.
        LookupError: an unknown `normalize`, `compete` or `regions`, or a `resolve` or a setting of one.
        TypeError: a setting of a `resolve` of a wrong kind.
    """
    levels = checked_levels(thresholds if threshold is None else (threshold,))
    check_threshold(normalize, *levels)
    check_shares(tau_cam=tau_cam, tau_sm=tau_sm)
    scaled, resolved = chosen(normalize, NORMALIZERS, "normalization"), resolve_of(resolve, divided=normalize != "none")
    everyone = chosen(compete, {"present": False, "all": True}, "choice of competing classes")
    seen = Maps.of_method(method)
    own = seen if reference is None or reference is classifier else None
    found = parting(samples, regions, own, by, reference, tau_cam)
    tally: Tally | None = None
    for part in batches(samples, batch):
        part = checked_batch(part, classifier)
        if tally is None:
            tally = Tally.of_classes(class_count(classifier, reference, part), levels)
        scenes = [Scene.of(sample, tally.classes, everyone) for sample in part.samples]
        S = explained(seen, classifier, part, [scene.classes for scene in scenes], batch)
        D = found(classifier, part, [scene.there for scene in scenes], batch)
        for image, scene, s, dr in zip(part.x, scenes, map(scaled, S), D, strict=True):
            R = s[scene.among(scene.competing)]
            tally.add(scene, resolved(image, R) if len(R) else R, s[scene.among(scene.there)], dr, tau_sm)
    if tally is None:
        raise ValueError("no image was measured; the data set is empty")
    return outcome(tally)


def checked_levels(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the thresholds.

    Raises:
        ValueError: none, or some that do not increase.
    """
    if not thresholds or any(not a < b for a, b in pairwise(thresholds)) or not all(map(math.isfinite, thresholds)):
        raise ValueError(f"expected thresholds that increase, at least one, got {thresholds!r}")
    return tuple(float(level) for level in thresholds)


def check_threshold(normalize: str, *levels: float) -> None:
    """Check that thresholds lie where the maps do.

    Raises:
        ValueError: no map, or every one, exceeds a threshold.
    """
    if wrong := [level for level in levels if normalize != "none" and not 0 <= level <= 1]:
        raise ValueError(
            f"expected a threshold in [0, 1], a share of a map's maximum, got {wrong[0]}; maps as they are take any "
            "(normalize=none)"
        )


def itself(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Return the maps as they are."""
    return maps


def by_range(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Scale each map to [0, 1]; a constant one becomes zero."""
    return unit(maps[None])[0]


NORMALIZERS = {"max": by_maximum, "unit": by_range, "none": itself}


@dataclass(frozen=True, eq=False)
class Scene:
    """The mask of one image, the classes in it, and those that compete for its pixels; both in order."""

    mask: Int[Tensor, "h w"]
    there: tuple[int, ...]
    competing: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample, count: int, everyone: bool = False) -> "Scene":
        """Read a sample's annotations; all classes of the network compete, or those known to be in the image.

        Raises:
            ValueError: no mask, one of another size than the image, or a class outside 0..count - 1.
        """
        if sample.mask is None:
            raise ValueError(f"segmentation needs a mask, and {sample.id!r} has none")
        if sample.mask.shape != sample.image.shape[1:]:
            sizes = tuple(sample.mask.shape), tuple(sample.image.shape[1:])
            raise ValueError(f"the mask of {sample.id!r} is {sizes[0]} pixels, its image {sizes[1]}; resize both")
        mask = sample.mask.long()
        there = {value - 1 for value in torch.unique(mask).tolist() if value not in (0, IGNORE)}
        competing = {*range(count)} if everyone else present(sample, there)
        if wrong := [label for label in sorted(there | competing) if not 0 <= label < count]:
            raise ValueError(f"{sample.id!r} shows class {wrong[0]}, and the network has classes 0..{count - 1}")
        return cls(mask, tuple(sorted(there)), tuple(sorted(competing)))

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes of which it needs maps, in order."""
        return tuple(sorted({*self.there, *self.competing}))

    def among(self, labels: Sequence[int]) -> list[int]:
        """Return the places of some of its classes."""
        return [self.classes.index(label) for label in labels]


def present(sample: Sample, there: set[int]) -> set[int]:
    """Return the classes that are known to be in an image; `there` are those in its mask."""
    if sample.labels is not None:
        return {int(label) for label in (sample.labels > 0).nonzero()}
    return there if sample.label is None else {sample.label}


def explained(
    maps: Maps, classifier: Classifier, part: Batch, classes: Sequence[Sequence[int]], chunk: int
) -> tuple[Float[Tensor, "_n h w"], ...]:
    """Return for each image one map a class, at the image's size in float64.

    They are made `chunk` at a time, or all classes of each image at once by a method that can.
    """
    size = (part.x.shape[2], part.x.shape[3])
    found = [part.x.new_empty((0, *size), dtype=torch.float64)]
    for raw in raw_maps(maps, classifier, part, classes, chunk):
        found.append(enlarged(finite(raw).double(), size)[:, 0])
    return torch.split(torch.cat(found), [len(labels) for labels in classes])


def raw_maps(
    maps: Maps, classifier: Classifier, part: Batch, classes: Sequence[Sequence[int]], chunk: int
) -> Iterator[Saliency]:
    """Yield the maps of every image and class, `chunk` at a time; of all classes at once by a method that can."""
    together = one_pass(maps.method)
    if together is not None and any(classes):
        yield from torch.split(maps.together(classifier, part, classes, together), chunk)
        return
    pairs = [(i, label) for i, labels in enumerate(classes) for label in labels]
    for start in range(0, len(pairs), chunk):
        places, labels = zip(*pairs[start : start + chunk], strict=True)
        y = torch.tensor(labels, device=part.x.device)
        ids, samples = tuple(part.ids[i] for i in places), tuple(part.samples[i] for i in places)
        yield maps.of(classifier, Batch(ids, part.x[list(places)], y, samples), y)


def enlarged(raw: Saliency, size: tuple[int, int]) -> Saliency:
    """Resize maps; a constant one stays exactly so, where rounding would leave a pattern to be scaled up."""
    first = raw[:, :, :1, :1]
    return torch.where((raw == first).all(3, keepdim=True).all(2, keepdim=True), first, resize(raw, size))


def class_count(classifier: Classifier, reference: Classifier | None, part: Batch) -> int:
    """Return how many classes the network has.

    Raises:
        ValueError: the reference has others.
    """
    count = classifier(part.x[:1]).shape[1]
    if reference is None or reference is classifier:
        return count
    if (other := reference(part.x[:1]).shape[1]) != count:
        raise ValueError(
            f"the network has {count} classes and the reference {other}; take one that was trained on the same classes"
        )
    if classifier.classes and reference.classes and classifier.classes != reference.classes:
        first = next(i for i in range(count) if classifier.classes[i] != reference.classes[i])
        raise ValueError(
            f"class {first} is {classifier.classes[first]!r} for the network and {reference.classes[first]!r} for the "
            "reference; take one that was trained on the same classes"
        )
    return count


def parting(
    samples: object, regions: Regions, own: Maps | None, by: Method | None, reference: Classifier | None, tau_cam: float
) -> Parting:
    """Return the function that finds the discriminative regions, DR.

    `own` are the evaluated maps where they are of the network that DR is about: of the same method they are not made
    again.

    Raises:
        LookupError: unknown regions.
        ValueError: settings of a CAM where the regions are cues, or a data set that knows no cues.
    """
    if chosen(regions, {"cam": False, "cue": True}, "choice of regions"):
        if by is not None or reference is not None:
            raise ValueError("regions='cue' are the data set's own, no CAM's; leave out by= and reference=")
        return partial(marked, telling_of(samples))
    methods = (cam, grad_cam) if by is None else (by,)
    maps = [own if own and bare(own.method) is bare(one) else Maps.of_method(one) for one in methods]
    return partial(suited, maps, reference, tau_cam)


def bare(method: Method) -> Method:
    """Return the function inside a partial without settings, any other method as it is."""
    return method.func if isinstance(method, partial) and not (method.args or method.keywords) else method


def suited(
    maps: list[Maps],
    reference: Classifier | None,
    tau_cam: float,
    classifier: Classifier,
    part: Batch,
    classes: Sequence[Sequence[int]],
    chunk: int,
) -> list[Bool[Tensor, "_n h w"]]:
    """Return for each image and class where the map, divided by its maximum, is at least `tau_cam`.

    The maps are those of the first method that suits the network; one before it is not asked again.
    """
    while True:
        try:
            found = explained(maps[0], reference or classifier, part, classes, chunk)
        except UnsuitedError:
            if len(maps) == 1:
                raise
            del maps[0]
        else:
            return [by_maximum(C) >= tau_cam for C in found]


def marked(
    telling: "Telling", classifier: Classifier, part: Batch, classes: Sequence[Sequence[int]], chunk: int
) -> list[Bool[Tensor, "_n h w"]]:
    """Return for each image and class the pixels that truly tell the class from the ones nearest to it."""
    empty = part.x.new_zeros((0, *part.x.shape[2:]), dtype=torch.bool)
    pairs = zip(part.samples, classes, strict=True)
    own = [[telling.of(sample, label).to(part.x.device) for label in labels] for sample, labels in pairs]
    return [torch.stack(one) if one else empty for one in own]


@runtime_checkable
class Cued(Protocol):
    """A data set that knows the parts by which each class differs from the ones nearest to it."""

    def cues(self, label: int, /) -> tuple[str, ...]: ...


@dataclass(frozen=True, eq=False)
class Telling:
    """The parts that tell classes apart, in the numbers of the samples' labels.

    `labels` says how the data set's samples are labeled, class by class; None where the class is the label.
    """

    source: Cued
    labels: tuple[int, ...] | None

    def of(self, sample: Sample, label: int) -> Bool[Tensor, "h w"]:
        """Return the visible pixels of a sample that tell a class from the ones nearest to it.

        Raises:
            ValueError: a sample without a mask or parts.
        """
        if sample.mask is None or not sample.parts:
            raise ValueError(
                f"what tells classes apart needs a mask and parts, and {sample.id!r} lacks one; see creatures"
            )
        names = self.source.cues(label if self.labels is None else self.labels.index(label))
        shown = [pixels for name, pixels in sample.parts.items() if KEYPOINTS.get(name, name) in names]
        return torch.stack(shown).any(0) & (sample.mask == label + 1)


def telling_of(samples: object) -> Telling:
    """Return what the data set behind the samples knows of its classes, through whatever wraps it.

    Raises:
        ValueError: it knows nothing.
    """
    for layer, labels in numbered_layers(samples):
        if isinstance(layer, Cued):
            return Telling(layer, labels)
    raise ValueError(
        f"only creatures know which pixels truly tell a class from others, and {type([*layers(samples)][-1]).__name__} "
        "knows none; take creatures, or regions that a CAM defines"
    )


@dataclass(eq=False)
class Tally:
    """Pixels counted by class and by how many thresholds lie below their largest map: all that any threshold needs."""

    levels: tuple[float, ...]
    hits: Int[Tensor, "k 2 bins"]
    """Those whose largest map is of their own class, in its NDR and DR."""
    predicted: Int[Tensor, "k bins"]
    """Those whose largest map is of this class, the background's too."""
    background: Int[Tensor, " bins"]
    true: Int[Tensor, "k 2"]
    """Those of a class, in its NDR and DR."""
    regions: Int[Tensor, "4"]
    images: int = 0

    @classmethod
    def of_classes(cls, count: int, levels: tuple[float, ...]) -> "Tally":
        """Start at zero."""
        bins = len(levels) + 1
        hits, predicted = torch.zeros(count, 2, bins).long(), torch.zeros(count, bins).long()
        return cls(
            levels, hits, predicted, torch.zeros(bins).long(), torch.zeros(count, 2).long(), torch.zeros(4).long()
        )

    @property
    def classes(self) -> int:
        """How many classes the network has."""
        return len(self.predicted)

    def add(
        self,
        scene: Scene,
        R: Float[Tensor, "m h w"],
        S: Float[Tensor, "n h w"],
        D: Bool[Tensor, "n h w"],
        tau_sm: float,
    ) -> None:
        """Add one image: the resolved maps R of what competes, the method's maps S and the DR of what is there."""
        mask, bins = scene.mask.to(S.device), len(self.levels) + 1
        best, place = self.ranked(scene, R)
        counted = mask != IGNORE
        cells = (best * bins + place)[counted].bincount(minlength=self.predicted.numel())
        self.predicted += cells.view(self.predicted.shape).cpu()
        self.background += place[mask == 0].bincount(minlength=bins).cpu()
        for label, s, d in zip(scene.there, S, D, strict=True):
            inside, dr = mask == label + 1, d.long()
            own = inside & (best == label)
            self.true[label] += dr[inside].bincount(minlength=2).cpu()
            self.hits[label] += (dr * bins + place)[own].bincount(minlength=2 * bins).view(2, bins).cpu()
            self.regions += regions(dr.double(), s, inside, 1.0, tau_sm).cpu()
        self.images += bool(counted.any())

    def ranked(self, scene: Scene, R: Float[Tensor, "m h w"]) -> tuple[Int[Tensor, "h w"], Int[Tensor, "h w"]]:
        """Return each pixel's class of the largest map, and how many thresholds lie below that map."""
        if not len(R):
            nothing = torch.zeros(scene.mask.shape, dtype=torch.long, device=R.device)
            return nothing, nothing
        value, which = R.max(0)
        best = torch.tensor(scene.competing, device=R.device)[which]
        return best, torch.searchsorted(value.new_tensor(self.levels), value.contiguous())


def above(counts: Int[Tensor, "*k bins"]) -> Int[Tensor, "*k t"]:
    """Return for each threshold the number of pixels above it."""
    return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def series(tally: Tally) -> dict[str, Float[Tensor, " t"]]:
    """Return every number at every threshold."""
    ndr, dr = above(tally.hits).permute(1, 2, 0)
    right, predicted, true = ndr + dr, above(tally.predicted).T, tally.true.sum(1)
    left = (tally.predicted.sum() - predicted.sum(1))[:, None]
    clear = (tally.background.sum() - above(tally.background))[:, None]
    hits = torch.cat([clear, right], 1)
    union = torch.cat([left + tally.background.sum() - clear, predicted + true - right], 1)
    found = {"miou": share(hits, union)}
    averages: dict[str, Average] = {"": "macro", "_micro": "micro"}
    for end, average in averages.items():
        found[f"fg_precision{end}"] = share(right, predicted, average)
        found[f"dr_recall{end}"] = share(dr, tally.true[:, 1].expand_as(dr), average)
        found[f"ndr_recall{end}"] = share(ndr, tally.true[:, 0].expand_as(ndr), average)
    return found


def outcome(tally: Tally) -> dict[str, Score]:
    """Return all numbers at the threshold with the best mean IoU."""
    curves = series(tally)
    best = int(curves["miou"].nan_to_num(-1).argmax())
    swept = len(tally.levels) > 1
    shares = 100 * tally.regions.double() / tally.regions.sum()
    plain = {
        **dict(zip(REGIONS, shares.tolist(), strict=True)),
        "threshold": tally.levels[best] if tally.images else math.nan,
    }
    return {
        **{name: swept_score(name, curve, best, tally, swept) for name, curve in curves.items()},
        **{name: Score(Choice(name), value, None, count=tally.images) for name, value in plain.items()},
    }


def swept_score(name: str, curve: Float[Tensor, " t"], best: int, tally: Tally, swept: bool) -> Score:
    """Return one number at the best threshold, with its curve where there is more than one."""
    points, axis = (tuple(curve.tolist()), tally.levels) if swept else ((), ())
    return Score(Choice(name), float(curve[best]), True, curve=points, axis=axis, count=tally.images)
