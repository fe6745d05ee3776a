"""Maps. What is done to a saliency map after it is made: resize, scale, smooth, cut into regions."""

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from sightline.types import Saliency, Values

Mode: TypeAlias = Literal["nearest", "bilinear", "bilinear_corners", "bicubic"]
Padding: TypeAlias = Literal["reflect", "replicate", "zeros"]


def resize(
    maps: Float[Tensor, "b c _i _j"], size: tuple[int, int], mode: Mode = "bilinear"
) -> Float[Tensor, "b c _h _w"]:
    """Resample maps to `size` = (height, width) pixels.

    `bilinear` takes pixel centers (align_corners=False); `bilinear_corners` aligns the corners, as pytorch-grad-cam's
    Score-CAM does; `bicubic` overshoots (clamp afterwards).
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if mode == "nearest":
        return F.interpolate(maps, size, mode="nearest")
    return F.interpolate(maps, size, mode=mode.removesuffix("_corners"), align_corners=mode == "bilinear_corners")


def unit(saliency: Float[Tensor, "b c i j"]) -> Float[Tensor, "b c i j"]:
    """Scale each channel of each map to [0, 1].

    n(A) = (A - min A) / (max A - min A), and n(constant) = 0 (Opti-CAM, section 3.2). Differentiable, through minimum
    and maximum too.
    """
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    spread = high - low
    return (saliency - low) / torch.where(spread > 0, spread, torch.ones_like(spread))


def degenerate(saliency: Saliency) -> list[str | None]:
    """Say, map by map, why it shows nothing: `not finite`, `all zero`, `constant`; None for a map that does."""
    reasons: list[str | None] = []
    for one in saliency.flatten(1):
        finite = bool(one.isfinite().all())
        flat = finite and bool((one == one[0]).all())
        zero = flat and bool(one[0] == 0)
        reasons.append("not finite" if not finite else "all zero" if zero else "constant" if flat else None)
    return reasons


def blur(
    x: Float[Tensor, "b c h w"], sigma: float, *, padding: Padding = "reflect", radius: int | None = None
) -> Float[Tensor, "b c h w"]:
    """Smooth with a separable Gaussian of standard deviation `sigma` pixels.

    The kernel's half-width is `radius`, by default ceil(4 sigma); it sums to one. Zero padding darkens the borders.

    Raises:
        ValueError: a negative sigma.
    """
    if sigma < 0:
        raise ValueError(f"expected sigma >= 0 pixels, got {sigma}")
    if sigma == 0:
        return x
    reach = math.ceil(4 * sigma) if radius is None else radius
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    rows = F.conv2d(pad(x, reach, 0, padding), kernel[:, :, None, :], groups=x.shape[1])
    return F.conv2d(pad(rows, 0, reach, padding), kernel[:, :, :, None], groups=x.shape[1])


def pad(x: Float[Tensor, "b c h w"], across: int, down: int, padding: Padding) -> Float[Tensor, "b c _h _w"]:
    """Extend an image by `across` columns and `down` rows on each side; reflection repeats as often as it must."""
    if padding == "zeros":
        return F.pad(x, (across, across, down, down))
    if padding == "replicate":
        return F.pad(x, (across, across, down, down), mode="replicate")
    columns, rows = reflected(x.shape[3], across, x.device), reflected(x.shape[2], down, x.device)
    return x[:, :, rows][:, :, :, columns]


def reflected(length: int, reach: int, device: torch.device) -> Tensor:
    """Return the indices of a line of `length` pixels extended by reflection that does not repeat the border pixel."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(-reach, length + reach, device=device).remainder(period)
    return torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index)


def binarize(saliency: Saliency, threshold: Values) -> Bool[Tensor, "b 1 i j"]:
    """Mark the cells at or above each map's threshold."""
    return saliency >= threshold.view(-1, 1, 1, 1)


def components(mask: Bool[Tensor, "h w"], *, connectivity: Literal[4, 8] = 4) -> tuple[Tensor, int]:
    """Number the connected regions of a mask from 1 (0 = outside); return the labels and how many there are."""
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    found: Any = ndimage.label(mask.cpu().numpy(), structure=structure)
    return torch.from_numpy(found[0].astype(np.int64)).to(mask.device), int(found[1])


def largest(mask: Bool[Tensor, "h w"], *, connectivity: Literal[4, 8] = 4) -> Bool[Tensor, "h w"]:
    """Keep the connected region with the most pixels (of equal ones, the first in row-major order)."""
    labels, count = components(mask, connectivity=connectivity)
    if count == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == 1 + int(labels.flatten().bincount(minlength=count + 1)[1:].argmax())


def box(mask: Bool[Tensor, "h w"]) -> tuple[int, int, int, int]:
    """Return the tightest half-open box x0 y0 x1 y1 around the true pixels; all zero where there are none."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)
