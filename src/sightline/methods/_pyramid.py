"""Levels of perturbation. Fong, Patrick and Vedaldi, Understanding deep networks via extremal perturbations and smooth
masks, ICCV 2019: a mask says, pixel by pixel, how far the image is blurred, or how much of it is replaced.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.erase import Eraser, resolve
from sightline.maps import blur
from sightline.registry import unknown
from sightline.types import Erase, Images, Saliency

Blend: TypeAlias = Literal["mix", "pyramid"]

Levels: TypeAlias = Float[Tensor, "b n ch h w"]
"""Each image more and more perturbed: the image first, what is farthest from it last."""


def levels_of(blend: Blend, erase: Eraser, mean: tuple[float, ...]) -> Callable[[Images], Levels]:
    """Return what makes each image's levels: `pyramid`, or the image and its filling.

    Raises:
        ValueError: a pyramid of something else than blurs.
        LookupError: an unknown choice.
    """
    if blend not in ("mix", "pyramid"):
        raise LookupError(unknown(blend, ("mix", "pyramid"), "blend"))
    if blend == "mix":
        return partial(mixed, filling=resolve(erase, mean))
    if erase != "blur":
        raise ValueError(
            f"blend='pyramid' blurs by itself: leave erase='blur', or pass blend='mix', got erase={erase!r}"
        )
    return pyramid


def pyramid(x: Images, levels: int = 8, sigma: float = 20.0) -> Levels:
    """Return the images smoothed by Gaussians of 0 to `sigma` pixels in equal steps.

    Raises:
        ValueError: fewer than two levels, or a sigma not above zero.
    """
    if levels < 2 or sigma <= 0:
        raise ValueError(f"expected levels >= 2 and sigma > 0 pixels, got levels={levels}, sigma={sigma}")
    return torch.stack([blur(x, sigma * level / (levels - 1)) for level in range(levels)], 1)


def mixed(x: Images, *, filling: Erase) -> Levels:
    """Return the images and their fillings.

    Raises:
        ValueError: the filling depends on what is removed.
    """
    nothing, half = x.new_zeros(len(x), 1, *x.shape[2:]), x.new_zeros(len(x), 1, *x.shape[2:])
    half[..., : x.shape[3] // 2] = 1
    filled = filling(x, nothing)
    if not torch.equal(filled, filling(x, half)):
        raise ValueError(
            "this erase fills from what the mask keeps, and here the filling is made once, before there is a mask; "
            "use 'blur', 'mean', 'noise' or 'black'"
        )
    return torch.stack([x, filled], 1)


def between(levels: Levels, M: Saliency) -> Images:
    """Return each pixel at the height 1 - M of its levels, between two of them; of two, M x + (1 - M) filling."""
    n, channels = levels.shape[1:3]
    t = (1 - M[:, None]) * (n - 1)
    k = t.detach().floor().clamp(0, n - 2)
    low = k.long().expand(-1, -1, channels, -1, -1)
    return torch.lerp(levels.gather(1, low), levels.gather(1, low + 1), (t - k).to(levels.dtype))[:, 0]
