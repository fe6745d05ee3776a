"""Segmentation. What a method's maps are worth as seeds of weakly supervised semantic segmentation.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023. The background is resolved as in IRN (Ahn, Cho and Kwak, CVPR 2019).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, Method, UnsuitedError
from sightline.data import Batch, Indexed, Sample, batches
from sightline.evaluation import Maps, checked_batch
from sightline.maps import resize, unit
from sightline.methods._cam import cam
from sightline.methods._grad_cam import grad_cam
from sightline.metrics import finite
from sightline.metrics._segmentation import REGIONS, Average, by_maximum, regions, share
from sightline.registry import unknown
from sightline.runs import Choice, Score
from sightline.types import Images, Labels, Saliency

Normalize: TypeAlias = Literal["max", "unit", "none"]

THRESHOLDS = tuple(step / 100 for step in range(1, 51))
"""0.01 to 0.50 by 0.01."""

IGNORE = 255


def segmentation(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    threshold: float | None = None,
    normalize: Normalize = "max",
    by: Method | None = None,
    tau_cam: float = 0.25,
    tau_sm: float = 0.15,
    batch: int = 16,
) -> dict[str, Score]:
    """Segment images by their maps at every threshold; report everything at the one with the best mean IoU.

    For each class in the image (`labels`, else the label, else the classes in the mask) the map is resized to the
    image (bilinear) and divided by its maximum (`normalize`: "unit" scales it to [0, 1], "none" leaves it). A pixel is
    background where no map exceeds the threshold, else of the class with the largest one (the first of equal ones).

        miou                       mean IoU over the classes, the background too
        fg_precision, _micro       correct foreground / predicted foreground: mean over classes, or pooled
        dr_recall, ndr_recall      |P_c and DR_c| / |DR_c|, |P_c and NDR_c| / |NDR_c|: mean over classes; _micro pooled
        hsr_dr ... lsr_ndr         the four regions as shares of the objects' pixels; they sum to 100
        threshold                  where the mean IoU is best (the lowest of equal ones), or the one that was given

    All but the last in percent. DR_c and NDR_c are the pixels of class c in the mask where the map of `by`, divided by
    its maximum, is at least `tau_cam` or below; `by` is the CAM of this classifier by default, and Grad-CAM (which has
    no negative values) for a network without a linear head. HSR and LSR are those where the map of the method is at
    least `tau_sm` or below. All pixels of the data set are pooled; 255 in the mask counts nowhere; a number of which
    there is nothing (no class predicted, no NDR) is NaN. The sweep is one pass, its memory grows with classes times
    thresholds.

    The recalls are biased where a CAM itself is evaluated: for an image of one class its DR-Recall is 100 at every
    threshold up to `tau_cam`, and its NDR-Recall is 0 at every one from there on. They tell how well other maps make
    up for what CAMs miss.

    *Differs:* only the basic background resolve; the recalls are means over classes, of which the paper says nothing.

    Raises:
        ValueError: thresholds that do not increase, an image without a mask or with a mask of another size, a class
            that the network does not have, or no image.
        LookupError: an unknown `normalize`.
    """
    if normalize not in NORMALIZERS:
        raise LookupError(unknown(normalize, NORMALIZERS, "normalization"))
    levels = checked_levels(thresholds if threshold is None else (threshold,))
    seen, found = Maps.of_method(method), Maps.of_method(by or cam_of)
    tally: Tally | None = None
    for part in batches(samples, batch):
        part = checked_batch(part, classifier)
        if tally is None:
            tally = Tally.of_classes(classifier(part.x[:1]).shape[1], levels)
        scenes = [Scene.of(sample, tally.classes) for sample in part.samples]
        S = NORMALIZERS[normalize](explained(seen, classifier, part, scenes, batch))
        C = by_maximum(explained(found, classifier, part, scenes, batch))
        sizes = [len(scene.classes) for scene in scenes]
        for scene, s, c in zip(scenes, torch.split(S, sizes), torch.split(C, sizes), strict=True):
            tally.add(scene, s, c, tau_cam, tau_sm)
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


def cam_of(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return the CAM, and Grad-CAM of a network that has none."""
    try:
        return cam(classifier, x, y)
    except UnsuitedError:
        return grad_cam(classifier, x, y)


def itself(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Return the maps as they are."""
    return maps


def by_range(maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Scale each map to [0, 1]; a constant one becomes zero."""
    return unit(maps[None])[0]


NORMALIZERS = {"max": by_maximum, "unit": by_range, "none": itself}


@dataclass(frozen=True, eq=False)
class Scene:
    """The mask of one image and the classes of which it needs maps: those that compete, and those in the mask."""

    mask: Int[Tensor, "h w"]
    classes: tuple[int, ...]
    competing: tuple[bool, ...]

    @classmethod
    def of(cls, sample: Sample, count: int) -> "Scene":
        """Read a sample's annotations.

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
        competing = present(sample, there)
        if wrong := [label for label in sorted(there | competing) if not 0 <= label < count]:
            raise ValueError(f"{sample.id!r} shows class {wrong[0]}, and the network has classes 0..{count - 1}")
        needed = tuple(sorted(there | competing))
        return cls(mask, needed, tuple(label in competing for label in needed))


def present(sample: Sample, there: set[int]) -> set[int]:
    """Return the classes that are known to be in an image; `there` are those in its mask."""
    if sample.labels is not None:
        return {int(label) for label in (sample.labels > 0).nonzero()}
    return there if sample.label is None else {sample.label}


def explained(
    maps: Maps, classifier: Classifier, part: Batch, scenes: Sequence[Scene], chunk: int
) -> Float[Tensor, "n _h _w"]:
    """Return one map an image and class of the scenes, at the images' size in float64, `chunk` at a time."""
    size = (part.x.shape[2], part.x.shape[3])
    pairs = [(i, label) for i, scene in enumerate(scenes) for label in scene.classes]
    found = [part.x.new_empty((0, *size), dtype=torch.float64)]
    for start in range(0, len(pairs), chunk):
        places, labels = zip(*pairs[start : start + chunk], strict=True)
        y = torch.tensor(labels, device=part.x.device)
        ids, samples = tuple(part.ids[i] for i in places), tuple(part.samples[i] for i in places)
        raw = finite(maps.of(classifier, Batch(ids, part.x[list(places)], y, samples), y))
        found.append(enlarged(raw.double(), size)[:, 0])
    return torch.cat(found)


def enlarged(raw: Saliency, size: tuple[int, int]) -> Saliency:
    """Resize maps; a constant one stays exactly so, where rounding would leave a pattern to be scaled up."""
    first = raw[:, :, :1, :1]
    return torch.where((raw == first).all(3, keepdim=True).all(2, keepdim=True), first, resize(raw, size))


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
        self, scene: Scene, S: Float[Tensor, "n h w"], C: Float[Tensor, "n h w"], tau_cam: float, tau_sm: float
    ) -> None:
        """Add one image with the method's maps S and the CAMs C of its classes."""
        mask, bins = scene.mask.to(S.device), len(self.levels) + 1
        best, place = self.ranked(scene, S)
        counted = mask != IGNORE
        cells = (best * bins + place)[counted].bincount(minlength=self.predicted.numel())
        self.predicted += cells.view(self.predicted.shape).cpu()
        self.background += place[mask == 0].bincount(minlength=bins).cpu()
        for label, s, c in zip(scene.classes, S, C, strict=True):
            inside, dr = mask == label + 1, (c >= tau_cam).long()
            own = inside & (best == label)
            self.true[label] += dr[inside].bincount(minlength=2).cpu()
            self.hits[label] += (dr * bins + place)[own].bincount(minlength=2 * bins).view(2, bins).cpu()
            self.regions += regions(c, s, inside, tau_cam, tau_sm).cpu()
        self.images += bool(counted.any())

    def ranked(self, scene: Scene, S: Float[Tensor, "n h w"]) -> tuple[Int[Tensor, "h w"], Int[Tensor, "h w"]]:
        """Return each pixel's class of the largest competing map, and how many thresholds lie below that map."""
        nothing = torch.zeros(scene.mask.shape, dtype=torch.long, device=S.device)
        if not any(scene.competing):
            return nothing, nothing
        labels = torch.tensor(scene.classes, device=S.device)
        taking = torch.tensor(scene.competing, device=S.device)
        value, which = S[taking].max(0)
        return labels[taking][which], torch.searchsorted(value.new_tensor(self.levels), value.contiguous())


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
