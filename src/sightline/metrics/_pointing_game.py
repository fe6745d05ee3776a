"""Pointing game. Whether the highest point of a map lies on the object; and how much of the map does.

Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016 (IJCV 2018): the game, the difficult subset.
Wang et al., Score-CAM, CVPR workshop 2020: the game of energy.
"""

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from sightline.data import Sample
from sightline.maps import Mode, peak
from sightline.maps import resize as resized
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.registry import chosen
from sightline.types import Saliency

Ties: TypeAlias = Literal["mean", "first", "any"]
On: TypeAlias = Literal["mask", "boxes"]
Subset: TypeAlias = Literal["all", "difficult", "difficult_total"]
Average: TypeAlias = Literal["class", "image"]
Region: TypeAlias = tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"], bool]
"""The pixels of a class, those that count, and whether the annotation knows the class in the image at all."""

SMALL = 0.25
"""Objects of the difficult subset cover less than this share of the image."""


def pointing_game(
    *,
    tolerance: float = 15.0,
    ties: Ties = "mean",
    on: On = "mask",
    subset: Subset = "all",
    average: Average = "class",
    strict: bool = True,
    resize: Mode = "bilinear",
    scored: Scored = "label",
) -> Measure:
    """Measure how often the map's highest point lies on the object, in percent, higher is better.

        p = arg max of the map at the image's resolution,   hit = [the disc of radius `tolerance` around p meets R]
        accuracy = mean over classes of hits / (hits + misses)

    R is the scored class's pixels in the mask (255 is no part of it), or those whose center lies in one of its boxes.
    The disc holds the pixels whose center is nearer than `tolerance` pixels of the scored image (`strict`; else no
    farther), and always the point's own pixel: tolerance=0 asks for the point alone. For images of another size than
    224 pixels, the paper's 15 stand for 15 / 224 of the side.

    `ties`: pixels that share the maximum (in single precision) give the mean of their places, the first one in
    row-major order, or a hit if any of them does. A constant map so points at the middle, at the corner, or everywhere.
    `average`: over classes, or over images. Each image is one trial, of its scored class.

    `subset`: "difficult" plays only where the class's objects cover less than a quarter of the image, in sum, and
    another class is there too; "difficult_total" asks that of the objects of all classes together, as the code of
    meaningful perturbation does on COCO.

    An image does not count where the class is not there (no pixel, no box), where it is not in the subset, or where the
    data set calls all its boxes difficult. Boxes that hold no pixel of the image (cropped away, no area) are missed.

    Variants: TorchRay and meaningful perturbation on COCO are the defaults, the latter with resize="bicubic" and
    strict=False on images of their original size; on VOC it takes on="boxes", tolerance=0. Opti-CAM's SP is
    on="boxes", tolerance=0, ties="any", average="image".

    Raises:
        LookupError: an unknown choice of `ties`, `on`, `subset` or `average`.
        ValueError: a negative tolerance, an unknown scored class, or an image without mask or boxes.
    """
    chosen(ties, dict.fromkeys(get_args(Ties)), "tie rule")
    chosen(on, dict.fromkeys(get_args(On)), "region")
    chosen(subset, dict.fromkeys(get_args(Subset)), "subset")
    chosen(average, dict.fromkeys(get_args(Average)), "average")
    if not tolerance >= 0:
        raise ValueError(f"expected tolerance >= 0 pixels, got {tolerance}")
    check_scored(scored)

    def score(case: Case) -> Tensor:
        S = resized(case.raw.double(), (case.x.shape[2], case.x.shape[3]), resize).float()
        R, _, known = regions(case, on, "pointing_game")
        pairs = zip(case.batch.samples, case.y.tolist(), strict=True)
        played = torch.tensor([plays(sample, label, on, subset) for sample, label in pairs], device=known.device)
        hit = hits(S, R, tolerance, ties, strict=strict).double()
        one_hot = F.one_hot(case.y, case.logits.shape[1]).double()
        numbers = 100 * hit[:, None] if average == "image" else torch.cat([hit[:, None] * one_hot, one_hot], 1)
        return torch.where((known & played)[:, None], numbers, torch.nan)

    if average == "image":
        return Measure(score, higher_is_better=True, scored=scored)
    return Measure(score, higher_is_better=True, scored=scored, width=None, finish=over_classes)


def energy_pointing_game(*, on: On = "boxes", coverage: float = 1.0, scored: Scored = "label") -> Measure:
    """Measure 100 sum_R S / sum S, in percent, higher is better: the share of the map inside the true boxes.

    S is the map scaled to [0, 1] at the image's resolution, so its lowest value is zero; R is the union of the boxes of
    the scored class (the pixels whose center lies in one), or its pixels in the mask (255 is left out of both sums). A
    map that is zero everywhere, or constant, has nothing inside: 0.

    Images of which R covers more than the share `coverage` do not count, nor do images without the class: 0.5 is
    Score-CAM's own rule, 1 keeps all. Boxes that hold no pixel of the image catch nothing: 0. `mass` is the same on the
    positive part of a signed map, and on other targets; Opti-CAM's EP is the default.

    Raises:
        LookupError: an unknown region.
        ValueError: a coverage outside (0, 1], an unknown scored class, or an image without boxes or mask.
    """
    chosen(on, dict.fromkeys(get_args(On)), "region")
    if not 0 < coverage <= 1:
        raise ValueError(f"expected coverage in (0, 1], a share of the image, got {coverage}")
    check_scored(scored)

    def score(case: Case) -> Tensor:
        S = case.saliency.double()[:, 0]
        R, valid, known = regions(case, on, "energy_pointing_game")
        caught, whole = (torch.where(pixels, S, 0).sum((1, 2)) for pixels in (R, valid))
        covered = R.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        found = 100 * caught / torch.where(whole > 0, whole, 1)
        return torch.where(known & (covered <= coverage), found, torch.nan)

    return Measure(score, higher_is_better=True, scored=scored)


def over_classes(numbers: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Return 100 times the mean of hits / trials over the classes that were tried; hits first, then trials."""
    hits, trials = numbers.chunk(2, -1)
    return 100 * torch.where(trials > 0, hits / trials, torch.nan).nanmean(-1)


def hits(
    S: Saliency, R: Bool[Tensor, "b h w"], tolerance: float, ties: Ties = "mean", *, strict: bool = True
) -> Bool[Tensor, " b"]:
    """Tell of each map whether its highest point, or any of them, lies on or near its region."""
    if ties == "any":
        top = S.eq(S.amax((2, 3), keepdim=True))[:, 0]
        near = R if tolerance == 0 else torch.stack([grown(one, tolerance, strict=strict) for one in R])
        return (top & near).flatten(1).any(1)
    width = S.shape[3]
    first = S.flatten(1).argmax(1)
    points = peak(S) if ties == "mean" else torch.stack([first % width + 0.5, first // width + 0.5], 1).double()
    return disc_meets(points, R, tolerance, strict=strict)


def disc_meets(
    points: Float[Tensor, "b 2"], R: Bool[Tensor, "b h w"], tolerance: float, *, strict: bool
) -> Bool[Tensor, " b"]:
    """Tell of each point x, y whether its own pixel, or one whose center is within `tolerance`, is in its region.

    Places outside the image stand for its border pixel nearest to them, which is nearer to the point.
    """
    height, width = R.shape[1:]
    reach = min(int(tolerance) + 1, max(height, width))
    offset = torch.arange(-reach, reach + 1, device=R.device)
    own = points.floor().long()
    columns, rows = own[:, :1] + offset, own[:, 1:] + offset
    away = (columns + 0.5 - points[:, :1]).square()[:, None] + (rows + 0.5 - points[:, 1:]).square()[:, :, None]
    near = away < tolerance**2 if strict else away <= tolerance**2
    near[:, reach, reach] = True
    image = torch.arange(len(R), device=R.device)[:, None, None]
    found = R[image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return (found & near).flatten(1).any(1)


def grown(region: Bool[Tensor, "h w"], tolerance: float, *, strict: bool) -> Bool[Tensor, "h w"]:
    """Return the pixels of a region, and those whose center is within `tolerance` of one's."""
    if not bool(region.any()):
        return region
    away = torch.from_numpy(ndimage.distance_transform_edt(~region.cpu().numpy())).to(region.device)
    return region | (away < tolerance if strict else away <= tolerance)


def regions(case: Case, on: On, metric: str) -> tuple[Bool[Tensor, "b h w"], Bool[Tensor, "b h w"], Bool[Tensor, " b"]]:
    """Return the pixels of each image's scored class, those that count, and whether the class is there."""
    pairs = zip(case.batch.samples, case.y.tolist(), strict=True)
    R, valid, known = zip(*(region(sample, label, on, metric) for sample, label in pairs), strict=True)
    device = case.x.device
    return torch.stack(R).to(device), torch.stack(valid).to(device), torch.tensor(known, device=device)


def region(sample: Sample, label: int, on: On, metric: str) -> Region:
    """Return what the annotation of one image says of a class.

    Raises:
        ValueError: the image has no annotation of the kind.
    """
    if on == "mask":
        found = sample.region_of(label)
        if found is None:
            raise ValueError(f"{metric}(on='mask') needs a mask, and {sample.id!r} has none; try on='boxes'")
        return *found, bool(found[0].any())
    boxes = sample.boxes_of(label)
    if boxes is None:
        raise ValueError(f"{metric}(on='boxes') needs boxes, and {sample.id!r} has none")
    height, width = sample.image.shape[1:]
    return inside(boxes, (height, width)), torch.ones(height, width, dtype=torch.bool), len(boxes) > 0


def inside(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """Mark the pixels whose center lies in one of the half-open boxes x0 y0 x1 y1."""
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    across, down = (columns >= x0) & (columns < x1), (rows >= y0) & (rows < y1)
    return (down[:, :, None] & across[:, None]).any(0)


def plays(sample: Sample, label: int, on: On, subset: Subset) -> bool:
    """Tell whether the image is in the subset, and the data set does not call all boxes of the class difficult."""
    if on == "boxes" and sample.difficult is not None:
        refused = sample.difficult if sample.box_labels is None else sample.difficult[sample.box_labels == label]
        if len(refused) and bool(refused.all()):
            return False
    if subset == "all":
        return True
    height, width = sample.image.shape[1:]
    total = subset == "difficult_total"
    return categories(sample) > 1 and annotated(sample, label, on, total=total) < SMALL * height * width


def annotated(sample: Sample, label: int, on: On, *, total: bool) -> float:
    """Return the area in pixels of the objects of a class, or of all classes: in the mask, or of boxes in the image."""
    if sample.mask is not None and (on == "mask" or sample.boxes is None):
        return float(((sample.mask > 0) & (sample.mask != 255) if total else sample.mask == label + 1).sum())
    boxes = sample.boxes if total else sample.boxes_of(label)
    if boxes is None:
        return 0.0
    height, width = sample.image.shape[1:]
    x0, x1 = (boxes[:, i].clamp(0, width) for i in (0, 2))
    y0, y1 = (boxes[:, i].clamp(0, height) for i in (1, 3))
    return float(((x1 - x0) * (y1 - y0)).sum())


def categories(sample: Sample) -> int:
    """Return how many classes the image shows, by its labels, else by its mask, else by its boxes."""
    if sample.labels is not None:
        return int((sample.labels > 0).sum())
    if sample.mask is not None:
        return sum(label not in (0, 255) for label in torch.unique(sample.mask).tolist())
    return 1 if sample.box_labels is None else len(torch.unique(sample.box_labels))
