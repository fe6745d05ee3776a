"""Mask statistics. What a map is like, whatever it shows: regular, decided, large, of varying size.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, CVIU 2020, section 4.
"""

import math
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.maps import resize
from sightline.metrics._measure import Case, Measure
from sightline.registry import chosen

Of: TypeAlias = Literal["saliency", "raw"]
Reduce: TypeAlias = Literal["sum", "mean"]
Sides: TypeAlias = Literal["one", "both"]
Over: TypeAlias = Literal["data", "batch"]


def total_variation(*, reduce: Reduce = "sum", of: Of = "saliency") -> Measure:
    """Measure how much the map changes from pixel to pixel, >= 0; neither good nor bad.

        sum    sum_ij (m_i,j+1 - m_ij)^2 + sum_ij (m_i+1,j - m_ij)^2      (the paper's scale: 2.5e3 at 224 x 224)
        mean   each of the two sums over its number of differences        (the official code's, there times 100)

    0 for a constant map, and for a line of pixels in the direction in which it has no neighbors.

    `of`: "saliency", the map at the image's resolution scaled to [0, 1]; "raw", the method's own values, resized
    (bilinear) but not scaled, for masks that are in [0, 1] as they are. A map that is not finite is zero everywhere.

    Raises:
        LookupError: an unknown `reduce` or `of`.
        ValueError: of="raw", and a map has values outside [0, 1].
    """
    chosen(reduce, dict.fromkeys(get_args(Reduce)), "reduction")
    chosen(of, dict.fromkeys(get_args(Of)), "map")

    def score(case: Case) -> Tensor:
        m = mask(case, of, "total_variation")
        across, down = m.diff(dim=2).square(), m.diff(dim=1).square()
        parts = [d.sum((1, 2)) / (1 if reduce == "sum" else max(1, d[0].numel())) for d in (across, down)]
        return parts[0] + parts[1]

    return Measure(score, higher_is_better=None)


def entropy(*, sides: Sides = "one", of: Of = "saliency") -> Measure:
    """Measure how far the map's pixels are from zero and one, in bits; neither good nor bad.

        one    -(1 / #pixels) sum_{0 < m < 1} m log2 m, in [0, .531] (the official code's)
        both   the binary entropy, -(1 / #pixels) sum m log2 m + (1 - m) log2 (1 - m), in [0, 1]

    0 for a binary map. `one` is not symmetric: it is highest at m = 1/e. `of`: as in `total_variation`.

    Raises:
        LookupError: an unknown `sides` or `of`.
        ValueError: of="raw", and a map has values outside [0, 1].
    """
    chosen(sides, dict.fromkeys(get_args(Sides)), "entropy")
    chosen(of, dict.fromkeys(get_args(Of)), "map")

    def score(case: Case) -> Tensor:
        m = mask(case, of, "entropy")
        nats: Tensor = torch.special.entr(m) if sides == "one" else torch.special.entr(m) + torch.special.entr(1 - m)
        return nats.mean((1, 2)) / math.log(2)

    return Measure(score, higher_is_better=None)


def area(*, of: Of = "saliency") -> Measure:
    """Measure 100 times the mean of the map, in percent of the image; neither good nor bad.

    `of`: as in `total_variation`.

    Raises:
        LookupError: an unknown `of`.
        ValueError: of="raw", and a map has values outside [0, 1].
    """
    chosen(of, dict.fromkeys(get_args(Of)), "map")
    return Measure(lambda case: 100 * mask(case, of, "area").mean((1, 2)), higher_is_better=None)


def area_deviation(*, over: Over = "data", of: Of = "saliency") -> Measure:
    """Measure how much the maps differ in size: the standard deviation of `area`, in percent of the image.

        data    over all images of the data set, sqrt(mean a^2 - (mean a)^2), of the population: 0 for one image
        batch   over the images of each batch (unbiased), averaged over the images: the official code's

    Neither good nor bad; where it is near zero, every image gets as much. Below 1e-5 it is rounding. "batch" depends on
    the size and the order of the batches, and a batch of one image does not count. Numbers of single images are not
    reported. `of`: as in `total_variation`.

    Raises:
        LookupError: an unknown `over` or `of`.
        ValueError: of="raw", and a map has values outside [0, 1].
    """
    chosen(over, dict.fromkeys(get_args(Over)), "range")
    chosen(of, dict.fromkeys(get_args(Of)), "map")

    def score(case: Case) -> Tensor:
        a = 100 * mask(case, of, "area_deviation").mean((1, 2))
        if over == "data":
            return torch.stack([a, a.square()], 1)
        return a.std().expand(len(a)) if len(a) > 1 else torch.full_like(a, torch.nan)

    if over == "batch":
        return Measure(score, higher_is_better=None, state="mean")
    return Measure(score, higher_is_better=None, state="mean", width=2, finish=deviation)


def deviation(moments: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b"]:
    """Return the standard deviation of the population from the means of a and of a^2."""
    first, second = moments.unbind(-1)
    return (second - first.square()).clamp(min=0).sqrt()


def mask(case: Case, of: Of, metric: str) -> Float[Tensor, "b h w"]:
    """Return the maps at the image's resolution, in float64.

    Raises:
        ValueError: of="raw", and a map has values outside [0, 1].
    """
    if of == "saliency":
        return case.saliency.double()[:, 0]
    m = case.raw.double()
    for name, low, high in zip(case.batch.ids, m.amin((1, 2, 3)).tolist(), m.amax((1, 2, 3)).tolist(), strict=True):
        if low < 0 or high > 1:
            raise ValueError(
                f"{metric}(of='raw') needs maps in [0, 1], and that of {name!r} goes from {low:.4g} to {high:.4g}; "
                "use of='saliency', which scales them"
            )
    return resize(m, (case.x.shape[2], case.x.shape[3]))[:, 0].clamp(0, 1)
