"""Python. A network or a function of the user's own: naming it runs the code of its module."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from sightline.models._manifests import check_code
from sightline.models._wrapping import parted, wrapped
from sightline.registry import load

if TYPE_CHECKING:
    from sightline.classifier import Classifier

HOME = Path(__file__).parents[1]
"""Where our own code is."""


def from_python(reference: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Import `package.module:name`, also from the current folder, call it unless it is a network, and wrap that.

    Raises:
        LookupError: no such module or name.
        TypeError: it gives no network, or is one and gets settings.
        ValueError: settings of `wrap` for a `Classifier`, which has its own; a manifest names it; its code fails.
    """
    from torch import nn

    from sightline.classifier import Classifier

    check_code(f"python:{reference}")
    wrapping, rest = parted(settings)
    made = made_by(reference, rest)
    if isinstance(made, nn.Module):
        return wrapped(made, wrapping, default)
    if not isinstance(made, Classifier):
        raise TypeError(f"python:{reference} gave {type(made).__name__}; expected a torch.nn.Module or a Classifier")
    if fixed := [name for name in wrapping if name != "layer"]:
        raise ValueError(f"python:{reference} gives a Classifier, which has its own {' and '.join(fixed)}")
    return made.at(wrapping["layer"]) if "layer" in wrapping else made


def made_by(reference: str, settings: Mapping[str, Any]) -> Any:
    """Return a network, or what a function or a class gives for these settings.

    Raises:
        LookupError: no such module or name.
        TypeError: none of these, or a network with settings.
        ValueError: the code fails.
    """
    from torch import nn

    from sightline.classifier import Classifier

    with running(reference):
        found = load(reference)
    if isinstance(found, nn.Module | Classifier):
        if settings:
            raise TypeError(f"python:{reference} is a network already and takes no {' and no '.join(settings)}")
        return found
    if not callable(found):
        kind = type(found).__name__
        raise TypeError(f"python:{reference} is of kind {kind}; expected a network, or a function that gives one")
    with running(reference):
        return found(**settings)


@contextmanager
def running(reference: str) -> Iterator[None]:
    """Run a user's code, which may import from the current folder, while inside; random weights are those of seed 0.

    Raises:
        LookupError: no such module or name.
        ValueError: the code fails; the message says with what, and in which line.
    """
    from sightline.models._mini_resnet import seeded

    with importable(Path.cwd()), seeded(0):
        try:
            yield
        except Exception as error:
            if type(error) is LookupError:
                raise
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"python:{reference} failed{place(error)}: {told}") from error


def place(error: Exception) -> str:
    """Say where in the user's code an error began; nothing where it did not get there."""
    lines = (one for one in extract_tb(error.__traceback__) if not Path(one.filename).is_relative_to(HOME))
    theirs = [one for one in lines if not any(other in one.filename for other in ("importlib", "site-packages"))]
    return f" in {theirs[0].filename}, line {theirs[0].lineno}" if theirs else ""


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Import from a folder, too, while inside."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
