"""Normalized maps. How maps of different methods or classes are scaled before they are put together."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from sightline.maps import by_maximum, unit
from sightline.registry import chosen

Normalize: TypeAlias = Literal["none", "unit", "max"]
"""A as it is; (A - min A) / (max A - min A); A / max A."""


def normalization(name: Normalize) -> Callable[[Tensor], Tensor]:
    """Return what scales the maps.

    Raises:
        LookupError: no such normalization.
    """
    return chosen(name, NORMALIZATIONS, "normalization")


NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"none": lambda maps: maps, "unit": unit, "max": by_maximum}
