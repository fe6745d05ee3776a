"""Settings. Keyword arguments that come as plain data, from a command line or a TOML file, bound to a function."""

from collections import abc
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sightline.classifier import SCORES
from sightline.erase import ERASERS, resolve
from sightline.registry import find, unknown
from sightline.runs import Choice, unbound

T = TypeVar("T")

VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

WORDS: Mapping[Any, str] = {NoneType: "None", abc.Callable: "a function", abc.Sequence: "a list", tuple: "a list"}
"""How a kind is called in a message, where it has a better name than its own."""


def bind(function: Callable[..., T], settings: Mapping[str, Any]) -> Callable[..., T]:
    """Return the function with its settings, checked against its signature.

    A `score` or an `erase` may be given by its name, an `erase` with settings by a table {name, ...}.

    Raises:
        LookupError: a setting that the function does not have, or a name that is not known; with near names.
        TypeError: a value of another kind than the annotated one.
        ValueError: a table without a name.
    """
    title = getattr(unbound(function), "__name__", type(function).__name__)
    parameters = signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind not in (Parameter.POSITIONAL_ONLY, *VARIADIC)]
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    hints = annotations(unbound(function))
    read: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known and not anything:
            raise LookupError(f"{title}: {unknown(name, known, 'setting')}")
        read[name] = interpreted(name, value, hints.get(name, Any))
        check(f"{title}: {name}", read[name], hints.get(name, Any))
    return partial(function, **read) if read else function


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotated kinds; none where they cannot be read (callable objects, names for type checkers only)."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {}


def interpreted(name: str, value: Any, hint: Any) -> Any:
    """Return what plain data stands for."""
    if isinstance(value, int) and not isinstance(value, bool) and hint in (float, float | None):
        return float(value)
    if name == "score" and isinstance(value, str):
        return find(value, SCORES, "scores")
    if name != "erase" or not isinstance(value, str | Mapping):
        return value
    choice = Choice.of(value)
    if choice.settings:
        return bind(find(choice.name, ERASERS, "erasers"), choice.settings)
    resolve(choice.name, (0.0,))  # an unknown name is an error now, not at the first image
    return choice.name


def check(what: str, value: Any, hint: Any) -> None:
    """Check a plain value against its annotation.

    Raises:
        LookupError: not one of the annotated names or numbers.
        TypeError: a value of another kind.
    """
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    if any(fits(value, kind) for kind in kinds):
        return
    choices = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    if any(type(value) is type(choice) for choice in choices):
        raise LookupError(f"{what}: {unknown(str(value), map(str, choices), 'choice')}")
    plain = [kind for kind in kinds if get_origin(kind) is not Literal]
    words = [WORDS.get(get_origin(kind) or kind) or kind.__name__ for kind in plain]
    raise TypeError(f"{what}: expected {' or '.join([*map(repr, choices), *words])}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is of a kind.

    An int counts as a float, a bool only as a bool, a list as a tuple; what is none of these, nor a choice nor a
    function, passes.
    """
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if origin is abc.Callable:
        return callable(value)
    if origin in (tuple, list, abc.Sequence):
        return isinstance(value, list | tuple)
    if isinstance(value, bool):
        return origin not in (int, float, str, NoneType)
    if origin is float:
        return isinstance(value, int | float)
    return isinstance(value, origin) if origin in (int, str, bool, NoneType) else True
