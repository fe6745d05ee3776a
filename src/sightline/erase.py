"""Erasing. What removing a pixel means: the filling that takes its place.

An eraser maps (x, saliency) to a filling of x's shape; the erased image is m * x + (1 - m) * filling. The papers differ
(SPEC: CASM trains with the mean color, Opti-CAM scores with black, RISE inserts into a blurred image), so every method
and metric takes `erase=` and every result records it.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeAlias

import cv2
import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from sightline.maps import Padding
from sightline.maps import blur as smooth
from sightline.registry import find
from sightline.types import Erase, Images, Saliency

Eraser: TypeAlias = str | Erase
"""A function, or the name of one."""


def black(x: Images, saliency: Saliency) -> Images:
    """Fill with 0 in [0, 1]."""
    return torch.zeros_like(x)


def color(x: Images, saliency: Saliency, *, mean: tuple[float, ...]) -> Images:
    """Fill with one color in [0, 1]; the classifier's mean is 0 in normalized space.

    Raises:
        ValueError: not one value a channel.
    """
    if len(mean) not in (1, x.shape[1]):
        raise ValueError(f"expected a color of {x.shape[1]} channels, got {mean}")
    return x.new_tensor(mean).view(1, -1, 1, 1).expand_as(x)


def blur(
    x: Images,
    saliency: Saliency,
    *,
    sigma: float = 10.0,
    padding: Padding = "reflect",
    radius: int | None = None,
    around: tuple[float, ...] = (0.0,),
) -> Images:
    """Fill with the image smoothed by a Gaussian of `sigma` pixels (meaningful perturbation: 10).

    Zero padding pads with the color `around`.
    """
    level = x.new_tensor(around).view(1, -1, 1, 1)
    return smooth(x - level, sigma, padding=padding, radius=radius) + level


def noise(x: Images, saliency: Saliency, *, seed: int = 0) -> Images:
    """Fill with uniform noise in [0, 1], the same for every image of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(x.shape[1:], generator=generator).to(x).expand_as(x)


def telea(x: Images, saliency: Saliency, *, radius: float = 3.0, keep: float = 0.5) -> Images:
    """Fill by inpainting from what is kept (saliency > `keep`), after Telea 2004, on 8-bit colors.

    An image of which nothing is kept has nothing to inpaint from and is returned as it is.
    """
    pixels = (x.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    holes = (saliency <= keep)[:, 0].byte().cpu().numpy()
    filled = [
        cv2.inpaint(np.ascontiguousarray(image), hole, radius, cv2.INPAINT_TELEA)
        for image, hole in zip(pixels, holes, strict=True)
    ]
    return torch.from_numpy(np.stack(filled).reshape(pixels.shape)).permute(0, 3, 1, 2).to(x) / 255


STENCIL = ((0, 1, 1 / 6), (1, 0, 1 / 6), (1, 1, 1 / 12), (1, -1, 1 / 12))
"""Steps down and across to half of the eight neighbors, and their weights; the other half lies opposite."""


def noisy_linear(x: Images, saliency: Saliency, *, noise: float = 0.01, seed: int = 0, keep: float = 0.5) -> Images:
    """Fill each removed pixel (saliency <= `keep`) with the weighted mean of its neighbors, plus noise (ROAD).

    u_i = sum_j w_ij u_j / sum_j w_ij over the eight neighbors j, 1/6 beside and 1/12 across, solved for all removed
    pixels at once; at the border the neighbors that are there share the weight. A removed pixel then gets Gaussian
    noise of standard deviation `noise` in [0, 1], drawn with `seed`, the same for every image of a batch; the filling
    is not clamped. Of an image of which nothing is kept, every constant is a solution: it gets its mean color.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = noise * torch.randn(x.shape[1:], generator=generator, dtype=torch.float64)
    images = x.detach().permute(0, 2, 3, 1).double().cpu().numpy()
    holes = (saliency <= keep)[:, 0].cpu().numpy()
    filled = np.stack([imputed(image, hole) for image, hole in zip(images, holes, strict=True)])
    u = torch.from_numpy(filled).permute(0, 3, 1, 2)
    return torch.where(torch.from_numpy(holes)[:, None], u + drawn, u).to(x)


def imputed(image: Any, hole: Any) -> Any:
    """Return an image (h, w, ch) of which the pixels in a hole (h, w) are weighted means of their neighbors."""
    flat, missing = image.reshape(-1, image.shape[2]), hole.ravel()
    if missing.all():
        return np.broadcast_to(flat.mean(0), image.shape)
    if not missing.any():
        return image
    rows = laplacian(*hole.shape)[missing]
    A, b = rows[:, missing].tocsc(), -(rows[:, ~missing] @ flat[~missing])
    solver = splu(A, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    u = flat.copy()
    u[missing] = solver.solve(b)
    return u.reshape(image.shape)


@lru_cache(maxsize=4)
def laplacian(h: int, w: int) -> Any:
    """Return the sparse matrix of u -> sum_j w_ij (u_i - u_j) on the pixels of an image."""
    cells = np.arange(h * w).reshape(h, w)
    pairs = [
        (cells[: h - down, max(0, -across) : w - max(0, across)], down * w + across, weight)
        for down, across, weight in STENCIL
    ]
    i = np.concatenate([here.ravel() for here, _, _ in pairs])
    j = np.concatenate([here.ravel() + step for here, step, _ in pairs])
    weights = np.concatenate([np.full(here.size, weight) for here, _, weight in pairs])
    W = sparse.coo_matrix((weights, (i, j)), shape=(h * w, h * w)).tocsr()
    W = W + W.T
    return (sparse.diags(np.asarray(W.sum(1)).ravel()) - W).tocsr()


ERASERS: Mapping[str, Erase] = {
    "black": black,
    "blur": blur,
    "noise": noise,
    "telea": telea,
    "noisy_linear": noisy_linear,
}


MASKLESS = ("black", "mean", "blur", "noise", "rise")
"""Names of fillings that depend on the image alone."""


def resolve(choice: Eraser, mean: tuple[float, ...]) -> Erase:
    """Return the eraser that is meant: a function as it is, or by name.

    Names are those of this module, and two that take the classifier's mean color: `mean` (0 in normalized space) and
    `rise` (the substrate of RISE's insertion game: an 11 x 11 Gaussian of 5 pixels with zero padding there).

    Raises:
        LookupError: no such name.
    """
    if not isinstance(choice, str):
        return choice
    of_mean: dict[str, Erase] = {
        "mean": partial(color, mean=mean),
        "rise": partial(blur, sigma=5.0, padding="zeros", radius=5, around=mean),
    }
    named: Mapping[str, Erase] = {**ERASERS, **of_mean}
    return find(choice, named, "erasers")


def filler(x: Images, choice: Eraser, mean: tuple[float, ...]) -> Callable[[Tensor], Erase]:
    """Return the function from numbers of images in x to the eraser of these very images.

    A filling that depends on the image alone is made once an image, not once a mask.

    Raises:
        LookupError: no such name.
    """
    fill = resolve(choice, mean)
    if not isinstance(choice, str) or choice not in MASKLESS:
        return lambda i: fill
    once = fill(x, torch.zeros_like(x[:, :1]))

    def of(i: Tensor) -> Erase:
        def known(x: Images, saliency: Saliency) -> Images:
            return once[i]

        return known

    return of


def mix(x: Images, mask: Saliency, erase: Erase) -> Images:
    """Keep x where the mask is 1 and show the filling where it is 0: m x + (1 - m) erase(x, m)."""
    if erase is black:
        return mask * x
    return mask * x + (1 - mask) * erase(x, mask)
