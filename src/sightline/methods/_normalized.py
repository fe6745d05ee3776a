"""Normalized maps. How maps of different methods or classes are scaled before they are put together."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.maps import unit
from sightline.registry import chosen

Normalize: TypeAlias = Literal["none", "unit", "max"]
"""A as it is; (A - min A) / (max A - min A); A / max A."""


def peak(maps: Float[Tensor, "b n i j"]) -> Float[Tensor, "b n i j"]:
    """Divide each map by its maximum; a map without a positive value becomes zero."""
    high = maps.amax((2, 3), keepdim=True)
    return torch.where(high > 0, maps / torch.where(high > 0, high, 1), 0)


def normalization(name: Normalize) -> Callable[[Tensor], Tensor]:
    """Return what scales the maps.

    Raises:
        LookupError: no such normalization.
    """
    return chosen(name, NORMALIZATIONS, "normalization")


NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"none": lambda maps: maps, "unit": unit, "max": peak}
