"""Protocols. What needs more than one image at a time: whole data sets, several models, splits or classes."""

from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.protocols._discs import fit_discs as fit_discs

_HOMES = {"fit_discs": "sightline.protocols._discs:fit_discs"}

__all__ = ["fit_discs"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return load(_HOMES[name])
    raise AttributeError(f"module 'sightline.protocols' has no attribute {name!r}")
