"""Python. A network or a function of the user's own: naming it runs the code of its module."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.models._wrapping import parted, wrapped
from sightline.registry import load

if TYPE_CHECKING:
    from sightline.classifier import Classifier


def from_python(reference: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Import `package.module:name`, also from the current folder, call it unless it is a network, and wrap that.

    Raises:
        LookupError: no such module or name.
        TypeError: it gives no network.
        ValueError: settings of `wrap` for a `Classifier`, which has its own.
    """
    from torch import nn

    from sightline.classifier import Classifier
    from sightline.models._mini_resnet import seeded

    wrapping, rest = parted(settings)
    with importable(Path.cwd()), seeded(0):
        found = load(reference)
    with importable(Path.cwd()), seeded(0):
        made = found if isinstance(found, nn.Module | Classifier) and not rest else found(**rest)
    if isinstance(made, nn.Module):
        return wrapped(made, wrapping, default)
    if not isinstance(made, Classifier):
        raise TypeError(f"python:{reference} gave {type(made).__name__}; expected a torch.nn.Module or a Classifier")
    if fixed := [name for name in wrapping if name != "layer"]:
        raise ValueError(f"python:{reference} gives a Classifier, which has its own {' and '.join(fixed)}")
    return made.at(wrapping["layer"]) if "layer" in wrapping else made


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Import from a folder, too, while inside."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
