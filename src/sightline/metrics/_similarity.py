"""Similarity. How alike two maps are: rank correlation, SSIM, and the rank correlation of histograms of gradients.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, Sanity checks for saliency maps, NeurIPS 2018, with their settings.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor

from sightline.maps import unit

WINDOW = 11
"""Pixels a side of SSIM's Gaussian window of standard deviation 1.5."""

CELL = 16
"""Pixels a side of a cell of the histograms of gradients; a block has 3 x 3."""


def spearman(a: Float[Tensor, "*size"], b: Float[Tensor, "*size"], absolute: bool = False) -> float:
    """Return Spearman's rank correlation of two maps, in [-1, 1]; of their absolute values with `absolute`.

    Equal pixels share the mean of their ranks. NaN where a map is constant (or its absolute value is), or not finite.
    """
    if not finite(a, b):
        return math.nan
    return pearson(ranks(a.abs() if absolute else a), ranks(b.abs() if absolute else b))


def ssim(a: Float[Tensor, "h w"], b: Float[Tensor, "h w"]) -> float:
    """Return the mean structural similarity of two maps, each scaled to [0, 1]; in [-1, 1], 1 for equal ones.

    Gaussian window of 11 x 11 pixels (standard deviation 1.5), sample covariances, data range 1: scikit-image's with
    `gaussian_weights`. A constant map counts as zero everywhere. In maps with a side below 11 the mean is taken over
    the windows that would fit with the largest odd side there is; NaN below 3, or for a map that is not finite.
    """
    return structure(scaled(a), scaled(b)) if finite(a, b) else math.nan


def hog_spearman(a: Float[Tensor, "h w"], b: Float[Tensor, "h w"]) -> float:
    """Return Spearman's rank correlation of the histograms of oriented gradients of two maps scaled to [0, 1].

    9 orientations, cells of 16 x 16 pixels, blocks of 3 x 3 cells: scikit-image's otherwise. In a map with a side below
    48 pixels the cells are as large as let one block fit; NaN below 3, where a map is constant, or not finite.
    """
    return pearson(gradients(scaled(a)), gradients(scaled(b))) if finite(a, b) else math.nan


Four: TypeAlias = tuple[float, float, float, float]

UNKNOWN: Four = (math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Traits:
    """What is compared of a map, for maps that are compared several times."""

    ranks: NDArray[np.float64]
    magnitudes: NDArray[np.float64]
    """Ranks of the absolute values."""
    scaled: NDArray[np.float64]
    gradients: NDArray[np.float64]

    @classmethod
    def of(cls, one: Float[Tensor, "h w"]) -> "Traits | None":
        """Read a map; None for one that is constant or not finite."""
        if not finite(one) or bool((one == one[0, 0]).all()):
            return None
        plain, pixels = ranks(one), scaled(one)
        return cls(plain, plain if float(one.min()) >= 0 else ranks(one.abs()), pixels, gradients(pixels))


def alike(a: Traits | None, b: Traits | None) -> Four:
    """Return `spearman`, the same of absolute values, `ssim` and `hog_spearman`; NaN where a map shows nothing."""
    if a is None or b is None:
        return UNKNOWN
    rank, magnitude = pearson(a.ranks, b.ranks), pearson(a.magnitudes, b.magnitudes)
    return rank, magnitude, structure(a.scaled, b.scaled), pearson(a.gradients, b.gradients)


def ranks(one: Tensor) -> NDArray[np.float64]:
    """Return the rank of each pixel, the mean rank of equal ones."""
    found: NDArray[np.float64] = rankdata(array(one).ravel())
    return found


def structure(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the SSIM of two maps that lie in [0, 1]."""
    side = min(*a.shape, WINDOW)
    if side < 3:
        return math.nan
    like: Any = structural_similarity
    return float(like(a, b, win_size=side if side % 2 else side - 1, gaussian_weights=True, data_range=1.0))


def gradients(one: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks of the histograms of oriented gradients; NaN where no block fits."""
    cell = min(*(side // 3 for side in one.shape), CELL)
    if cell < 1:
        return np.full(1, math.nan)
    found: NDArray[np.float64] = rankdata(hog(one, 9, (cell, cell), (3, 3)))
    return found


def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the correlation of two vectors; NaN where one is constant or holds NaN."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm != 0 else math.nan


def array(one: Tensor) -> NDArray[np.float64]:
    """Return a map as an array of float64."""
    found: NDArray[np.float64] = one.detach().double().cpu().numpy()
    return found


def scaled(one: Float[Tensor, "h w"]) -> NDArray[np.float64]:
    """Return a map scaled to [0, 1] as an array; a constant one is zero."""
    return array(unit(one.double()[None, None])[0, 0])


def finite(*several: Tensor) -> bool:
    """Tell whether all maps are finite."""
    return all(bool(one.isfinite().all()) for one in several)
