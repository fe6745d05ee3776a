"""Settings. Keyword arguments that come as plain data, from a command line or a TOML file, bound to a function."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, Literal, TypeVar, get_origin

from sightline.classifier import SCORES, Method
from sightline.erase import ERASERS, resolve
from sightline.kinds import bound, unbound
from sightline.methods import COMBINATORS, METHODS
from sightline.registry import find, load
from sightline.runs import Choice, split

T = TypeVar("T")


def seeded(function: Callable[..., T], settings: Mapping[str, Any], seed: int | None) -> Callable[..., T]:
    """Return the function with its settings; with `seed` too where it draws and the settings do not say how."""
    own = {} if seed is None or "seed" not in signature(function).parameters else {"seed": seed}
    return bind(function, {**own, **settings})


def method_of(choice: Choice, seed: int | None = None) -> Method:
    """Return the method that a choice stands for, with its settings.

    A combinator has its methods in parentheses, each with settings of its own: `smooth(gradient)`,
    `mean(grad_cam, opti_cam?steps=20)`. A FILE.safetensors is what was learned into it: `casm?weights=FILE.safetensors`
    or `segmenter?weights=FILE.safetensors`; `FILE.safetensors?code=run` allows code that its manifest names.

    Raises:
        LookupError, TypeError, ValueError: an unknown name or setting, or one that does not fit.
    """
    outer, opened, inner = choice.name.partition("(")
    if not opened:
        if outer.endswith(".safetensors"):
            return method_of(learned(choice), seed)
        if outer in COMBINATORS and outer not in METHODS:
            raise LookupError(f"{outer} makes a method of others; write {outer}(grad_cam), say")
        return seeded(find(outer, METHODS, "methods").method, choice.settings, seed)
    if outer in METHODS:
        raise LookupError(f"{outer} is a method and takes no other; its settings stand behind a ?: {outer}?key=value")
    if not inner.endswith(")"):
        raise ValueError(f"expected combinator(method, ...), got {choice.name!r}")
    combinator = find(outer, COMBINATORS, "combinators")
    texts = [text.strip() for text in split(inner[:-1], ",")]
    if not all(texts) or (combinator.takes == "one" and len(texts) > 1):
        number = "one method" if combinator.takes == "one" else "methods"
        raise ValueError(f"{outer} takes {number}, got {inner[:-1]!r} in {choice.name!r}")
    if missing := [name for name in combinator.needs if name not in choice.settings]:
        raise ValueError(f"{outer} needs {missing[0]}=; write {choice.name}?{missing[0]}=...")
    parts = [method_of(Choice.parse(text), seed) for text in texts]
    combined: Method = seeded(combinator.combinator, choice.settings, seed)(*parts)
    return combined


def learned(choice: Choice) -> Choice:
    """Return the method whose weights a file holds, of that file.

    Raises:
        LookupError, TypeError, ValueError: a file of something else; a word that `code` does not have.
    """
    settings = {name: value for name, value in choice.settings.items() if name != "code"}
    weights = f"{choice.name}?code={choice.settings['code']}" if "code" in choice.settings else choice.name
    return Choice(load("sightline.explainers._saved:method_in")(weights), {"weights": weights, **settings})


def signed(method: Callable[..., Any]) -> bool:
    """Tell whether a method of ours gives signed maps; a combined one does where a method inside does."""
    inner, settings = unbound(method), method.keywords if isinstance(method, partial) else {}
    name = getattr(inner, "__name__", "")
    if name in METHODS and METHODS[name].method is inner:
        return METHODS[name].signed
    if name not in COMBINATORS:
        return False
    parts = [*settings.get("methods", ()), *([settings["method"]] if "method" in settings else [])]
    return COMBINATORS[name].signed or any(signed(part) for part in parts)


def bind(function: Callable[..., T], settings: Mapping[str, Any]) -> Callable[..., T]:
    """Return the function with its settings, checked against its signature.

    A `score` or an `erase` may be given by its name, an `erase` with settings by a table {name, ...}.

    Raises:
        LookupError: a setting that the function does not have, or a name that is not known; with near names.
        TypeError: a value of another kind than the annotated one.
        ValueError: a table without a name.
    """
    return bound(function, settings, getattr(unbound(function), "__name__", type(function).__name__), interpreted)


def interpreted(name: str, value: Any, hint: Any) -> Any:
    """Return what plain data stands for."""
    if name == "score" and isinstance(value, str) and get_origin(hint) is not Literal:
        return find(value, SCORES, "scores")
    if name != "erase" and isinstance(value, Mapping):  # a class's number is text where TOML has it as a key
        return {int(key) if str(key).isdecimal() else key: item for key, item in value.items()}
    if name != "erase" or not isinstance(value, str | Mapping):
        return value
    choice = Choice.of(value)
    if choice.settings:
        return bind(find(choice.name, ERASERS, "erasers"), choice.settings)
    resolve(choice.name, (0.0,))  # an unknown name is an error now, not at the first image
    return choice.name
