"""Wrapping. Settings of a line of text that say how a network is wrapped, and what to say without a library."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from sightline.classifier import Classifier

SETTINGS = ("layer", "size", "normalization")
"""Settings that say how; the others are the network's own."""


def parted(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the settings of `wrap` from those of the network."""
    wrapping = {name: value for name, value in settings.items() if name in SETTINGS}
    return wrapping, {name: value for name, value in settings.items() if name not in SETTINGS}


def wrapped(model: "nn.Module", settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Wrap with the settings that say how, of which `size` may be "224x160".

    Raises:
        ValueError: a size that is none, and what `wrap` raises.
    """
    from sightline.classifier import wrap

    chosen = {**default, **settings}
    if isinstance(size := chosen.get("size"), str):
        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise ValueError(f"expected size=224 or size=HEIGHTxWIDTH, got {size!r}")
        chosen["size"] = int(sides[0]), int(sides[1])
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return wrap(model, **plain)


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Say which extra is missing where an import inside fails.

    Raises:
        ImportError: it does; the message names the extra.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what} needs it ({error}): pip install "sightline[{extra}]"') from error
