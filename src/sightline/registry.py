"""Names. From a name to a thing: our own catalogues first, then entry points of installed packages."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

T = TypeVar("T")


def find(name: str, ours: Mapping[str, T], group: str) -> T:
    """Return the entry called `name`, from `ours` or from the entry points of `sightline.<group>`.

    Raises:
        LookupError: no such name (the message names the nearest ones), or an entry point that cannot be loaded.
    """
    if name in ours:
        return ours[name]
    plugins = {point.name: point for point in entry_points(group=f"sightline.{group}")}
    if name in plugins:
        try:
            found: T = plugins[name].load()
        except (ImportError, AttributeError) as error:
            raise LookupError(f"cannot load {plugins[name].value!r}, which {name!r} stands for: {error}") from error
        return found
    raise LookupError(unknown(name, [*ours, *plugins], group.removesuffix("s")))


def chosen(name: str, choices: Mapping[str, T], kind: str) -> T:
    """Return the choice called `name`.

    Raises:
        LookupError: no such choice.
    """
    if name not in choices:
        raise LookupError(unknown(name, choices, kind))
    return choices[name]


def unknown(name: str, known: Iterable[str], kind: str) -> str:
    """Say that `name` is no `kind`, and which names are near it."""
    names = sorted(known)
    plain = {one.lower().replace("_", "").replace("-", ""): one for one in reversed(names)}
    spelled = get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, n=3, cutoff=0.6)
    near = get_close_matches(name, names, n=3, cutoff=0.5) or [plain[one] for one in spelled]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return f"no {kind} called {name!r}; {hint}"


def load(reference: str) -> Any:
    """Import `package.module:name`.

    Raises:
        LookupError: the module or the name in it does not exist.
    """
    module, _, name = reference.partition(":")
    if not module or module.startswith(".") or not name:
        raise LookupError(f"cannot load {reference!r}; expected package.module:name")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"cannot load {reference!r}: {error}; expected package.module:name") from error
