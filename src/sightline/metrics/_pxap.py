"""PxAP. Choe, Oh, Lee, Chun, Akata and Shim, Evaluating weakly supervised object localization, CVPR 2020, sec 3."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sightline import maps
from sightline.metrics._measure import Case, Measure
from sightline.registry import unknown
from sightline.types import Saliency

Resize: TypeAlias = Literal["bicubic", "bilinear"]

POINTS = 101


def pxap(*, bins: int = 1000, resize: Resize = "bicubic", exact: bool = False) -> Measure:
    """Measure PxAP = 100 sum_k P_k (R_k - R_(k-1)), the average precision of the pixels; in percent, higher is better.

    The pixels of all images are pooled: P_k and R_k are precision and recall of the pixels with s >= k / bins, k from
    `bins` down to zero, against the label's pixels in the samples' masks; 255 counts nowhere. s is the raw map at the
    input's resolution, min-max scaled image by image. The histograms are all that is kept, and an image more or less is
    no number of its own: there is none an image. The curve is the precision at evenly spaced recalls.

    With `exact` every distinct score is a threshold (ties are one step); all pixels of all images are kept, 8 bytes
    each (400 kB an image of 224 x 224), all images must have one size, and there is no curve.

    A constant or non-finite map scores all its pixels 0, so constant maps alone have the base rate of the label's
    pixels. An image without pixels that count does not count; NaN where no pixel at all is of its image's label.

    Raises:
        LookupError: an unknown `resize`.
        ValueError: fewer than one bin, or an image without a mask.
    """
    check_resize(resize)
    if bins < 1:
        raise ValueError(f"expected bins >= 1, got {bins}")
    if exact:
        return Measure(lambda case: pixels(case, resize), True, state="pool", width=None, finish=pooled)

    def score(case: Case) -> Tensor:
        s, inside, counted = annotated(case, resize)
        return histograms(s, inside, counted, bins)

    def finish(numbers: Tensor) -> Tensor:
        positives, negatives = numbers.chunk(2)
        return 100 * histogram_average_precision(positives, negatives)

    def curve(numbers: Tensor) -> Tensor:
        positives, negatives = numbers.chunk(2)
        return precision_at_recalls(positives, negatives, POINTS)

    return Measure(score, True, state="mean", width=2 * (bins + 1), finish=finish, curve=curve)


def average_precision(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Return AP = sum_k P_k (R_k - R_(k-1)) over the distinct scores, the highest first, in [0, 1].

    P_k and R_k are precision and recall of what scores at least the k-th score, so equal scores are one step and the
    order of the input does not matter. NaN where nothing is true, or a score is NaN.
    """
    if bool(scores.isnan().any()) or not bool(truth.any()):
        return float("nan")
    ordered, order = scores.sort(descending=True)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(truth[:1])])
    hits = truth[order].cumsum(0)[last].double()
    found = last.nonzero().flatten().double() + 1
    return float((hits / found * hits.diff(prepend=hits.new_zeros(1))).sum() / hits[-1])


def histogram_average_precision(positives: Float[Tensor, " k"], negatives: Float[Tensor, " k"]) -> Tensor:
    """Return AP = sum_k P_k (R_k - R_(k-1)) of histograms of scores, a number in [0, 1].

    Bins go from the lowest score up; each is a step, the highest first. Only proportions count, so means over images
    serve as well as sums. NaN where nothing is positive.
    """
    precision, recall = precision_recall(positives, negatives)
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


def precision_recall(
    positives: Float[Tensor, " k"], negatives: Float[Tensor, " k"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return precision and recall of what lies in a bin or above it, the highest bin first.

    Precision is 0 while nothing is found, recall NaN where nothing is positive.
    """
    hits, errors = (counts.double().flip(0).cumsum(0) for counts in (positives, negatives))
    found = hits + errors
    return hits / torch.where(found > 0, found, 1), hits / hits[-1]


def precision_at_recalls(positives: Tensor, negatives: Tensor, points: int) -> Float[Tensor, " points"]:
    """Return the precision at recalls from 0 to 1, each at the highest threshold that reaches the recall."""
    precision, recall = precision_recall(positives, negatives)
    wanted = torch.linspace(0, 1, points, dtype=recall.dtype, device=recall.device)
    place = torch.searchsorted(recall, (wanted - 1e-12).clamp(min=1e-15)).clamp(max=len(recall) - 1)
    return precision[place]


def histograms(
    s: Saliency, inside: Bool[Tensor, "b h w"], counted: Bool[Tensor, "b h w"], bins: int
) -> Float[Tensor, "b width"]:
    """Return for each image how many of its label's pixels have their score in each bin, then how many of the others.

    Bin k holds k / bins <= s < (k + 1) / bins, and the last one s = 1. NaN for an image without pixels that count.
    """
    return torch.stack([histogram(*one, bins) for one in zip(s[:, 0], inside, counted, strict=True)])


def histogram(
    s: Float[Tensor, "h w"], inside: Bool[Tensor, "h w"], counted: Bool[Tensor, "h w"], bins: int
) -> Float[Tensor, " width"]:
    """Return one image's part of `histograms`; image by image, since that fits into the processor's cache."""
    width = 2 * (bins + 1)
    place = s.double().mul_(bins).int().add_((~inside).int(), alpha=bins + 1).masked_fill_(~counted, width)
    counts = place.flatten().bincount(minlength=width + 1)[:width].double()
    return torch.where(counts.sum() > 0, counts, torch.nan)


def pixels(case: Case, resize: Resize) -> Float[Tensor, "b n"]:
    """Return s for the pixels of each image's label, -s (or -0) for the others, infinity for those that do not count.

    NaN for an image without pixels that count.
    """
    s, inside, counted = annotated(case, resize)
    signed = torch.copysign(s[:, 0].double(), torch.where(inside, 1.0, -1.0).to(s.device).double())
    signed = torch.where(counted, signed, torch.inf).flatten(1)
    return torch.where(counted.flatten(1).any(1, keepdim=True), signed, torch.nan)


def pooled(signed: Tensor) -> Tensor:
    """Return 100 times the average precision of the pixels that `pixels` gave."""
    kept = signed[signed.isfinite()]
    return kept.new_tensor(100 * average_precision(kept.abs(), ~kept.signbit()))


def annotated(case: Case, resize: Resize) -> tuple[Saliency, Bool[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
    """Return the maps at the input's resolution in [0, 1], the pixels of each image's label, and those that count.

    Raises:
        ValueError: an image without a mask.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for sample, label in zip(case.batch.samples, case.y.tolist(), strict=True):
        region = sample.region_of(label)
        if region is None:
            raise ValueError(f"pxap needs a mask, and {sample.id!r} has none; box metrics need boxes alone")
        found.append(region)
    inside, counted = (torch.stack(masks).to(case.raw.device) for masks in zip(*found, strict=True))
    return scaled(case, resize), inside, counted


def scaled(case: Case, resize: Resize) -> Saliency:
    """Return the raw maps at the input's resolution, each scaled to [0, 1], in single precision at least."""

    def make() -> Tensor:
        raw = case.raw if case.raw.dtype == torch.float64 else case.raw.float()
        return maps.scaled(raw, (case.x.shape[2], case.x.shape[3]), resize)

    return case.once(("scaled", resize), make)


def check_resize(resize: str) -> None:
    """Check how maps are brought to the input's resolution.

    Raises:
        LookupError: no such way.
    """
    if resize not in ("bicubic", "bilinear"):
        raise LookupError(unknown(resize, ("bicubic", "bilinear"), "resize"))
