"""Settings. Keyword arguments that come as plain data, from a command line or a TOML file, bound to a function."""

import types
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sightline.classifier import SCORES
from sightline.erase import ERASERS
from sightline.registry import find, unknown

T = TypeVar("T")


def bind(function: Callable[..., T], settings: Mapping[str, Any]) -> Callable[..., T]:
    """Return the function with its settings, checked against its signature.

    A `score` may be given by its name, an `erase` by a table {name, ...}.

    Raises:
        LookupError: a setting that the function does not have, or a name that is not known; with near names.
        TypeError: a value of another kind than the annotated one.
    """
    known = [name for name, p in signature(function).parameters.items() if p.kind is not Parameter.POSITIONAL_ONLY]
    hints = get_type_hints(function)
    read: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise LookupError(f"{function.__name__}: {unknown(name, known, 'setting')}")
        read[name] = interpreted(name, value)
        check(f"{function.__name__}: {name}", read[name], hints.get(name, Any))
    return partial(function, **read) if read else function


def interpreted(name: str, value: Any) -> Any:
    """Return what plain data stands for."""
    if name == "score" and isinstance(value, str):
        return find(value, SCORES, "scores")
    if name == "erase" and isinstance(value, Mapping):
        rest = {key: item for key, item in value.items() if key != "name"}
        return bind(find(str(value.get("name")), ERASERS, "erasers"), rest)
    return value


def check(what: str, value: Any, hint: Any) -> None:
    """Check a plain value against its annotation; what is neither plain nor a choice passes.

    Raises:
        LookupError: not one of the annotated names.
        TypeError: a value of another kind.
    """
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    if isinstance(value, str) and names and str not in kinds and value not in names:
        raise LookupError(f"{what}: {unknown(value, names, 'choice')}")
    plain = [kind for kind in kinds if kind in (int, float, bool, str, type(None))]
    if len(plain) == len(kinds) and not any(fits(value, kind) for kind in plain):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in plain)
        raise TypeError(f"{what}: expected {expected}, got {value!r}")


def fits(value: Any, kind: type) -> bool:
    """Tell whether a value is of a plain kind; an int counts as a float, a bool only as a bool."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
