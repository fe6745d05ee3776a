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
Rule: TypeAlias = Literal["value", "energy", "mean"]


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


def check_shares(**shares: float) -> None:
    """Check shares of a map's maximum.

    Raises:
        ValueError: one outside (0, 1].
    """
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"expected {name} in (0, 1], a share of the map's maximum, got {share}")


def by_maximum(maps: Float[Tensor, "*n i j"]) -> Float[Tensor, "*n i j"]:
    """Divide each map by its maximum (Maruf et al. 2023, eq 1).

    Negative values stay; a map without positive ones becomes zero.
    """
    top = maps.amax((-2, -1), keepdim=True)
    return torch.where(top > 0, maps / torch.where(top > 0, top, 1), 0)


def scaled(saliency: Saliency, size: tuple[int, int], mode: Mode = "bilinear") -> Saliency:
    """Resize maps to `size` and scale each to [0, 1]; a constant one becomes zero, and not its rounding errors."""
    values = saliency.flatten(1)
    flat = (values.amin(1) == values.amax(1)).view(-1, 1, 1, 1)
    return torch.where(flat, 0, unit(resize(saliency, size, mode)))


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


def scale(size: tuple[int, int], side: float = 224.0) -> float:
    """Return how many pixels of an image of `size` = (height, width) stand for one of a `side` x `side` image.

    sqrt(height width) / side: lengths that a paper gives for 224 pixels keep their share of the image's area.
    """
    return math.sqrt(size[0] * size[1]) / side


def peak(saliency: Saliency) -> Float[Tensor, "b 2"]:
    """Return the point x, y at which each map is highest; the mean of the points that share the maximum.

    In cells of the map, in the frame of half-open boxes: the cell in row i and column j has its center at
    (j + 0.5, i + 0.5). In float64; NaN for a map that holds NaN, the middle for a constant one.
    """
    top = (saliency == saliency.amax((2, 3), keepdim=True))[:, 0].double()
    rows, columns = (torch.arange(n, device=top.device, dtype=top.dtype) + 0.5 for n in top.shape[1:])
    points = torch.stack([(top * columns).sum((1, 2)), (top * rows[:, None]).sum((1, 2))], 1)
    return points / top.sum((1, 2))[:, None]


def threshold(saliency: Saliency, alpha: float, rule: Rule = "value") -> Bool[Tensor, "b 1 i j"]:
    """Mark the cells of each map that a rule keeps (meaningful perturbation's weak localization).

        value    h - min h >= alpha (max h - min h)
        energy   the longest run of cells, the highest first, whose sum stays below alpha sum(h)
        mean     h >= alpha mean(h)

    `energy` leaves out the cell that crosses; equal cells go in row-major order, so a tie may be cut in two. Where a
    map has negative values the run ends at the first crossing. Its sums are in float64.

    Raises:
        LookupError: an unknown rule.
        ValueError: alpha below zero, or above one where it is a share (value, energy).
    """
    if rule not in ("value", "energy", "mean"):
        raise LookupError(f"no threshold rule called {rule!r}; known: energy, mean, value")
    if not 0 <= alpha <= (math.inf if rule == "mean" else 1):
        raise ValueError(f"expected alpha {'>= 0' if rule == 'mean' else 'in [0, 1]'} for rule {rule!r}, got {alpha}")
    if rule == "energy":
        return strongest(saliency, alpha)
    if rule == "mean":
        return saliency >= alpha * saliency.mean((2, 3), keepdim=True)
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    return saliency - low >= alpha * (high - low)


def strongest(saliency: Saliency, alpha: float) -> Bool[Tensor, "b 1 i j"]:
    """Mark the longest run of cells, the highest first, whose sum stays below the share `alpha` of the total."""
    values, order = saliency.flatten(1).double().sort(dim=1, descending=True, stable=True)
    sums = values.cumsum(1)
    below = (sums < alpha * sums[:, -1:]).long().cumprod(1).bool()
    return torch.zeros_like(below).scatter_(1, order, below).view(saliency.shape)


def boxes(mask: Bool[Tensor, "b 1 i j"], size: tuple[int, int]) -> Float[Tensor, "b 4"]:
    """Return the tightest half-open box x0 y0 x1 y1 around all true cells, in pixels of an image of `size`.

    The mask is resized to (height, width) first, by nearest neighbor. No components: far-off cells count. An empty mask
    gives the whole image.
    """
    shown = resize(mask.to(torch.float32), size, "nearest")[:, 0] > 0
    (x0, x1), (y0, y1) = span(shown.any(1)), span(shown.any(2))
    return torch.stack([x0, y0, x1, y1], 1).to(torch.float32)


def span(line: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
    """Return the first true place of each line and one past the last; 0 and n where there is none."""
    return line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
