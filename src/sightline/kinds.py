"""Kinds. Plain values, from a command line or a TOML file, against the annotations of what takes them."""

from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import partial
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sightline.registry import chosen, unknown

T = TypeVar("T")

VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

WORDS: Mapping[Any, str] = {
    NoneType: "None",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    abc.Callable: "a function",
    abc.Mapping: "a table",
    abc.Sequence: "a list",
    list: "a list",
    tuple: "a list",
}
"""How a kind is called in a message, where it has a better name than its own."""


def bound(
    function: Callable[..., T],
    settings: Mapping[str, Any],
    title: str,
    read: Callable[[str, Any, Any], Any] = lambda name, value, hint: value,
) -> Callable[..., T]:
    """Return the function with its settings, checked against its signature; messages call it `title`.

    A whole number becomes a fraction or text where that is meant; then `read` turns the value of a setting, by its name
    and annotation, into what the function takes.

    Raises:
        LookupError: a setting that the function does not have, or one of other choices; with near names.
        TypeError: a value of another kind than the annotated one.
    """
    parameters, hints = signature(function).parameters.values(), annotations(unbound(function))
    known = [one.name for one in parameters if one.kind not in (Parameter.POSITIONAL_ONLY, *VARIADIC)]
    anything = any(one.kind is Parameter.VAR_KEYWORD for one in parameters)
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known and not anything:
            raise LookupError(f"{title}: {unknown(name, known, 'setting')}{parted(name, settings)}")
        hint = hints.get(name, Any)
        found[name] = read(name, meant(value, hint), hint)
        check(f"{title}: {name}", found[name], hint)
    return partial(function, **found) if found else function


def configured(
    functions: Mapping[str, Callable[..., T]], name: str, settings: Mapping[str, Any], what: str
) -> Callable[..., T]:
    """Return the function of a name with its settings.

    Raises:
        LookupError: an unknown name (of `what`) or setting, with near ones.
        TypeError: a setting of a wrong kind.
    """
    return bound(chosen(name, functions, what), settings, name)


def unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function inside a partial."""
    return function.func if isinstance(function, partial) else function


def parted(name: str, settings: Mapping[str, Any]) -> str:
    """Say how a setting is written that was meant for a choice among the settings; "" where there is none.

    `segmentation?resolve=smooth?size=3&sigma=0.6` gives `sigma` to the segmentation.
    """
    nested = [(host, value) for host, value in settings.items() if isinstance(value, str) and "?" in value]
    if not nested:
        return ""
    (host, value), said = nested[-1], settings[name]
    said = str(said).lower() if isinstance(said, bool) else said
    return f"; if it belongs to {value.partition('?')[0]}, write {host}=({value}&{name}={said})"


def meant(value: Any, hint: Any) -> Any:
    """Return a whole number as a fraction or as text where that is meant, else as it is: a layer may be called 0."""
    several = kinds(hint)
    if type(value) is not int or int in several:
        return value
    if float in several:
        return float(value)
    return str(value) if str in several else value


def entries(of: type, table: Mapping[str, Any], what: str) -> None:
    """Check the entries of a table, a `what`, against the fields of a dataclass.

    Raises:
        LookupError: an entry that it does not have, with near names.
        TypeError: a value of another kind than the annotated one.
        ValueError: a field without a default that the table lacks.
    """
    listed, hints = {one.name: one for one in fields(of)}, annotations(of)
    needed = [name for name, one in listed.items() if one.default is MISSING and one.default_factory is MISSING]
    for name, value in table.items():
        if name not in listed:
            raise LookupError(unknown(name, listed, f"entry of a {what}"))
        check(name, value, hints.get(name, Any))
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"the {what} lacks {', '.join(missing)}")


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotated kinds, without those that cannot be read: names for type checkers only."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if type(hint) is not str}


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
