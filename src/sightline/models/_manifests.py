"""Manifests. What stands beside weights, read as data: of the right kinds, with code only where the user allows it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from sightline.kinds import check
from sightline.models._files import is_weights
from sightline.registry import unknown
from sightline.runs import Choice

Code = Literal["refuse", "run"]
"""What becomes of code that a manifest names; the user says it in the model's name, `FILE.safetensors?code=run`."""

ENTRIES: Mapping[str, Any] = {
    "model": str | Mapping[str, Any],
    "layer": str,
    "normalization": str | Sequence[Any],
    "mean": Sequence[float],
    "std": Sequence[float],
    "size": int | Sequence[int],
    "classes": Sequence[str],
    "floats": Literal["as stored"],
    "extra": Mapping[str, Any],
    "sha256": str,
    "provenance": Mapping[str, Any],
}
"""What the manifest of a classifier may say, and of what kind it is."""

_BUILDING: ContextVar[tuple[tuple[Path, Code], ...]] = ContextVar("building", default=())
"""The files whose manifests say what is being built, the outermost first."""


def check_entries(manifest: Mapping[str, Any], path: Path) -> None:
    """Check the entries of a classifier's manifest, which stands in the file `path`.

    Raises:
        LookupError, TypeError: an entry of another kind.
        ValueError: an unknown entry, or a network that is itself a file of weights.
    """
    for name, value in manifest.items():
        if name not in ENTRIES:
            raise ValueError(f"{path}: {unknown(name, ENTRIES, 'entry')}")
        check(f"{path}: {name}", value, ENTRIES[name])
    try:
        named = Choice.parse(Choice.of(manifest["model"]).name).name
    except ValueError as error:
        raise ValueError(f"{path}: model: {error}") from error
    if is_weights(named):
        raise ValueError(f"{path}: model: expected the network of the weights, torchvision:resnet18 say, got {named!r}")


def said_in(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a manifest says of normalization, size and classes, as `wrap` takes it.

    Raises:
        ValueError: half of a normalization, or two of them; a value that does not fit.
    """
    told: dict[str, Any] = {}
    if (normalization := normalization_in(manifest, path)) is not None:
        told["normalization"] = normalization
    if "size" in manifest:
        told["size"] = size_in(manifest["size"], path)
    if "classes" in manifest:
        told["classes"] = tuple(manifest["classes"])
        if strange := [name for name in told["classes"] if not isinstance(name, str)]:
            raise ValueError(f"{path}: classes: expected a list of names, got {strange[0]!r} among them")
    return told


def normalization_in(manifest: Mapping[str, Any], path: Path) -> str | tuple[Sequence[float], Sequence[float]] | None:
    """Return the normalization by its name or as mean and deviation; None where the manifest says none.

    Raises:
        ValueError: half of it, two of them, or no finite means and positive deviations.
    """
    pair = [name for name in ("mean", "std") if name in manifest]
    if len(pair) == 1:
        raise ValueError(f"{path}: {pair[0]} says nothing alone; write both mean and std, or normalization")
    if pair and "normalization" in manifest:
        raise ValueError(f"{path}: says normalization and also mean and std; keep one of the two")
    chosen = [manifest["mean"], manifest["std"]] if pair else manifest.get("normalization")
    if chosen is None or isinstance(chosen, str):
        return chosen
    fits = len(chosen) == 2 and all(map(numbers, chosen)) and len(chosen[0]) == len(chosen[1]) and min(chosen[1]) > 0
    if not fits:
        what = "mean and std" if pair else "normalization"
        raise ValueError(f"{path}: {what}: expected two lists, means and positive deviations, got {chosen!r}")
    return chosen[0], chosen[1]


def numbers(values: Any) -> bool:
    """Tell whether this is a list of finite numbers, and not an empty one."""
    plain = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return plain and bool(values) and all(map(isfinite, values))


def size_in(size: int | Sequence[Any], path: Path) -> tuple[int, int]:
    """Return height and width.

    Raises:
        ValueError: none of either.
    """
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{path}: size: expected a side or [height, width] in pixels, got {size!r}")
    return sides[0], sides[1]


def named(text: Path | str) -> tuple[Path, Code]:
    """Read `FILE` or `FILE?code=run`: a file of weights, and what becomes of code that its manifest names.

    Raises:
        LookupError, TypeError: another setting or value.
    """
    given = Choice.parse(str(text))
    if strange := [name for name in given.settings if name != "code"]:
        raise LookupError(f"{given.name}: {unknown(strange[0], ['code'], 'setting')}")
    code = given.settings.get("code", "refuse")
    check(f"{given.name}: code", code, Code)
    return Path(given.name), code


@contextmanager
def building(path: Path, code: Code) -> Iterator[None]:
    """Build what the manifest of a file says, while inside: code that it names is refused, unless `code` is "run".

    Of a file whose manifest another one names, both have to be allowed it.

    Raises:
        ValueError: the manifest leads to its own file.
    """
    around = _BUILDING.get()
    if path.resolve() in [one.resolve() for one, _ in around]:
        raise ValueError(f"the manifest of {path} names a network that is built from {path} itself")
    token = _BUILDING.set((*around, (path, code)))
    try:
        yield
    finally:
        _BUILDING.reset(token)


def check_code(what: str) -> None:
    """Check that nobody but the user has named code that is about to be run.

    Raises:
        ValueError: a manifest has; the message says how to allow it.
    """
    for path, code in _BUILDING.get():
        if code != "run":
            raise ValueError(
                f"the manifest of {path} names {what}, which would run code of whoever wrote it; "
                f"if you trust that code, allow it: {path}?code=run"
            )
