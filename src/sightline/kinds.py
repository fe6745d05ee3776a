"""Kinds. Plain values, from a command line or a TOML file, against the annotations of the functions that take them."""

from collections import abc
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sightline.registry import unknown

WORDS: Mapping[Any, str] = {
    NoneType: "None",
    abc.Callable: "a function",
    abc.Mapping: "a table",
    abc.Sequence: "a list",
    tuple: "a list",
}
"""How a kind is called in a message, where it has a better name than its own."""


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotated kinds; none where they cannot be read (callable objects, names for type checkers only)."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {}


def kinds(hint: Any) -> list[Any]:
    """Return the kinds that an annotation allows."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def check(what: str, value: Any, hint: Any) -> None:
    """Check a plain value against its annotation.

    Raises:
        LookupError: not one of the annotated names or numbers.
        TypeError: a value of another kind.
    """
    several = kinds(hint)
    if any(fits(value, kind) for kind in several):
        return
    choices = [name for kind in several if get_origin(kind) is Literal for name in get_args(kind)]
    if any(type(value) is type(choice) for choice in choices):
        raise LookupError(f"{what}: {unknown(str(value), map(str, choices), 'choice')}")
    plain = [kind for kind in several if get_origin(kind) is not Literal]
    words = [WORDS.get(get_origin(kind) or kind) or kind.__name__ for kind in plain]
    raise TypeError(f"{what}: expected {' or '.join([*map(repr, choices), *words])}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is of a kind.

    An int counts as a float, a bool only as a bool, a list as a tuple; what is none of these, nor a choice, a table nor
    a function, passes.
    """
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if origin is abc.Callable:
        return callable(value)
    if origin is abc.Mapping:
        return isinstance(value, abc.Mapping)
    if origin in (tuple, list, abc.Sequence):
        return isinstance(value, list | tuple)
    if isinstance(value, bool):
        return origin not in (int, float, str, NoneType)
    if origin is float:
        return isinstance(value, int | float)
    return isinstance(value, origin) if origin in (int, str, bool, NoneType) else True
