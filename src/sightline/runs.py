"""Specifications and results. What was asked and what came out: plain data, TOML in, JSON out, no torch."""

import inspect
import json
import math
import os
import platform
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sightline.kinds import entries, unbound

PACKAGES = ("sightline", "torch", "torchvision", "numpy")

PRECISIONS = ("exact", "bf16")
"""How fast a classifier may be asked (`speed.fast`)."""


@dataclass(frozen=True)
class Choice:
    """A name from a catalogue with its settings: `"opti_cam"`, `"opti_cam?steps=50"` or a table with a `name`."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, value: "str | Mapping[str, Any] | Choice") -> "Choice":
        """Read what a TOML file says.

        Raises:
            TypeError: neither a name nor a table.
            ValueError: a table without a name.
        """
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):
            raise TypeError(f"expected a name or a table with a name, got {value!r}")
        if "name" not in value:
            raise ValueError(f"expected a table with a name, got {dict(value)!r}; write {{name = ..., ...}}")
        return cls(str(value["name"]), {key: item for key, item in value.items() if key != "name"})

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Read `name?key=value&key=value`; what stands in parentheses belongs to the name, or to the value.

        So `segmentation?resolve=(smooth?size=3&sigma=0.6)` has one setting, the text in the parentheses.

        Raises:
            ValueError: no name, or a part behind the question mark that is no `key=value`.
        """
        name, *queries = split(text, "?", 1)
        pairs = [part.partition("=") for query in queries for part in split(query, "&") if part]
        if not name or not all(key and equals for key, equals, _ in pairs):
            raise ValueError(f"expected name?key=value&key=value, got {text!r}")
        return cls(name, {key: read_value(value) for key, _, value in pairs})

    def plain(self) -> str | dict[str, Any]:
        """Return the shortest TOML form."""
        return {"name": self.name, **self.settings} if self.settings else self.name

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name}({inside})" if inside else self.name


def split(text: str, mark: str, most: int = -1) -> list[str]:
    """Split a text, at most so many times, at the marks that stand in no parentheses; odd ones are letters."""
    depths = depths_of(text)
    odd = bool(depths) and (min(depths) < 0 or depths[-1] != 0)
    places = [i for i, letter in enumerate(text) if letter == mark and (odd or depths[i] == 0)]
    ends = [*places[: len(places) if most < 0 else most], len(text)]
    return [text[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def depths_of(text: str) -> list[int]:
    """Return in how many parentheses each letter stands, an opening one included and a closing one not."""
    return list(accumulate((letter == "(") - (letter == ")") for letter in text))


def read_value(text: str) -> Any:
    """Read an integer, a float, true or false, a list or a table as TOML writes it, else text, in parentheses or not.

    What TOML would not write as an integer (007, +7, 1_0) is text.

    Raises:
        ValueError: a list or a table that TOML cannot read.
    """
    if text in ("true", "false"):
        return text == "true"
    if text[:1] == "(" and text[-1] == ")" and depths_of(text).count(0) == 1:
        return text[1:-1]
    if text[:1] in ("[", "{"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"cannot read {text!r}: {error}; write [1, 2] or {{3 = [1, 2]}}") from error
    with suppress(ValueError):
        return int(text) if str(int(text)) == text else text
    with suppress(ValueError):
        return float(text)
    return text


@dataclass(frozen=True)
class Spec:
    """Everything that determines the numbers of one run.

    `explain` says whose map is scored: `"scored"` (the class that the metric scores), `"label"`, `"predicted"`,
    `"second"` or `"least"`. `layer` replaces the classifier's own layer. `fast` is a precision of `speed.fast`,
    `"exact"` or `"bf16"`; without it the classifier is asked as it is. `images` = 0 means all.
    """

    model: Choice
    data: Choice
    method: Choice
    metrics: tuple[Choice, ...]
    explain: str = "scored"
    layer: str | None = None
    fast: str | None = None
    images: int = 0
    batch: int = 16
    seed: int = 0

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Spec":
        """Read one TOML table.

        Raises:
            LookupError: an entry that a specification does not have, with near names.
            TypeError: a value of another kind.
            ValueError: a missing entry, or a number out of range.
        """
        entries(cls, table, "specification")
        choices = {name: Choice.of(table[name]) for name in ("model", "data", "method")}
        metrics = tuple(Choice.of(metric) for metric in table["metrics"])
        spec = cls(**{**table, **choices, "metrics": metrics})
        if spec.batch < 1 or spec.images < 0:
            raise ValueError(f"expected batch >= 1 and images >= 0, got batch={spec.batch}, images={spec.images}")
        if spec.fast not in (None, *PRECISIONS):
            raise ValueError(f"expected fast to be {' or '.join(PRECISIONS)}, got {spec.fast!r}")
        return spec

    def plain(self) -> dict[str, Any]:
        """Return the table that `of` reads; what is None is left out."""
        table = {item.name: getattr(self, item.name) for item in fields(self)}
        chosen = {name: table[name].plain() for name in ("model", "data", "method")}
        metrics = [metric.plain() for metric in self.metrics]
        return {key: value for key, value in {**table, **chosen, "metrics": metrics}.items() if value is not None}


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def read_specs(path: Path | str) -> tuple[Spec, ...]:
    """Read a TOML file; where `method` or `model` is a list, return one specification of each model and method.

    Tables `[[scene]]` stand for several files in one: each says what is its own (data, model, metrics, images, ...),
    and what it does not say is that of the file.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: not TOML, or not a specification.
    """
    table = read_toml(path)
    scenes = table.pop("scene", [{}])
    if not isinstance(scenes, list) or not scenes or not all(isinstance(one, Mapping) for one in scenes):
        raise TypeError(f"{path}: expected [[scene]] tables, got {scenes!r}")
    return tuple(spec for scene in scenes for spec in several({**table, **scene}, path))


def several(table: Mapping[str, Any], path: Path | str) -> Iterator[Spec]:
    """Yield one specification of each model and method of a table.

    Raises:
        TypeError, ValueError: an empty list, or not a specification.
    """
    if empty := [name for name in ("model", "method") if table.get(name) == []]:
        raise ValueError(f"{path} lists no {empty[0]}; expected at least one")
    models, methods = ([{name: one} for one in listed(table, name)] for name in ("model", "method"))
    for model in models or [{}]:
        yield from (Spec.of({**table, **model, **method}) for method in methods or [{}])


def listed(table: Mapping[str, Any], name: str) -> list[Any]:
    """Return the entries of a list, the one that is no list, or none."""
    found = table.get(name, [])
    return found if isinstance(found, list) else [found]


@dataclass(frozen=True)
class Score:
    """One metric's outcome: the number, one number an image where kept, the curve where the metric has one.

    An image that the metric does not count (it has no box, say) is NaN in `per_image`; `count` is how many do count.
    The points of `curve` lie at `axis`, evenly from 0 to 1 where that is empty.
    """

    metric: Choice
    value: float
    higher_is_better: bool | None
    per_image: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    axis: tuple[float, ...] = ()
    count: int | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Score":
        """Read one score of a run's JSON."""
        lists = {key: tuple(map(number, table.get(key, ()))) for key in ("per_image", "curve", "axis")}
        return cls(**{**table, **lists, "metric": Choice.of(table["metric"]), "value": number(table["value"])})

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean (normal approximation); None below two images."""
        counted = [value for value in self.per_image if not math.isnan(value)]
        return 1.96 * stdev(counted) / len(counted) ** 0.5 if len(counted) > 1 else None


def number(value: float | None) -> float:
    """Return a number of a JSON file, where None stands for NaN."""
    return math.nan if value is None else value


@dataclass(frozen=True)
class Scores:
    """What `measure` returns: a score a metric, the images in order, and the time of the maps alone."""

    scores: tuple[Score, ...]
    ids: tuple[str, ...]
    labels: tuple[int | None, ...]
    predicted: tuple[int, ...]
    """-1 where there was no classifier."""
    probability: tuple[float, ...]
    """Of the predicted class, one an image."""
    seconds: float
    """Wall time of the saliency maps, in all."""
    degenerate: Mapping[str, str] = field(default_factory=dict[str, str])
    """Image -> why its map says nothing (constant, not finite)."""
    among: tuple[bool | None, ...] = ()
    """Of an image with several classes whether the predicted one is among them, else None; () in older runs."""

    def __getitem__(self, metric: str) -> Score:
        for score in self.scores:
            if score.metric.name == metric:
                return score
        raise LookupError(f"no score called {metric!r}; there are {[score.metric.name for score in self.scores]}")

    @cached_property
    def right(self) -> tuple[bool | None, ...]:
        """Whether the predicted class is in each image; None without labels or without a classifier."""
        among = self.among or (None,) * len(self.ids)
        each = zip(self.labels, self.predicted, among, strict=True)
        return tuple(None if a is None or b < 0 else a == b if one is None else one for a, b, one in each)

    @property
    def accuracy(self) -> float | None:
        """Share of images that show the predicted class; None without labels or without a classifier."""
        known = [one for one in self.right if one is not None]
        return fmean(known) if known else None


@dataclass(frozen=True)
class Run:
    """A specification, its scores and where they come from; one JSON file.

    `arguments` are the settings in full, defaults included; `pictures` maps an image's id to `image` and `overlay`,
    files beside the run.
    """

    spec: Spec
    scores: Scores
    arguments: Mapping[str, Any]
    provenance: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])
    pictures: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def write(self, path: Path | str) -> Path:
        """Write the run as JSON, atomically."""
        table = {**asdict(self), "spec": self.spec.plain()}
        for score, kept in zip(table["scores"]["scores"], self.scores.scores, strict=True):
            score["metric"] = kept.metric.plain()
        return write_text(path, json.dumps(strict(table), indent=1, sort_keys=True, default=describe) + "\n")

    @classmethod
    def read(cls, path: Path | str) -> "Run":
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not the JSON of a run.
        """
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
            scores = table.pop("scores")
            scores["scores"] = tuple(Score.of(score) for score in scores["scores"])
            listed = {key: tuple(scores[key]) for key in ("ids", "labels", "predicted", "among") if key in scores}
            listed["probability"] = tuple(map(number, scores["probability"]))
            table["classes"] = tuple(table["classes"])
            return cls(**{**table, "spec": Spec.of(table["spec"]), "scores": Scores(**{**scores, **listed})})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a run: {error}; runs are written by `sightline evaluate`") from error


def read_claim(path: Path) -> dict[str, Any]:
    """Read what a folder belongs to.

    Raises:
        ValueError: the file is broken.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); delete its folder, or take another --out") from error
    return found


def without_none(value: Any) -> Any:
    """Return plain data as TOML can hold it: without the entries that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def strict(value: Any) -> Any:
    """Return a value without NaN, for which JSON has no word: None stands for it."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword arguments with which `function` will run, defaults included, in JSON's types."""
    bound = dict(function.keywords) if isinstance(function, partial) else {}
    parameters = inspect.signature(unbound(function)).parameters.values()
    named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    return {key: describe(value) for key, value in {**defaults, **bound}.items()}


def describe(value: Any) -> Any:
    """Turn a setting into JSON's types: a function becomes its name, with its settings where it has some."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if isinstance(value, partial):
        inside = ", ".join(f"{key}={describe(item)}" for key, item in value.keywords.items())
        return f"{describe(value.func)}({inside})"
    return getattr(value, "__name__", None) or str(value)


def file_name(text: str) -> str:
    """Return a text as a file name: letters, digits, and - for the rest."""
    return "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in text).strip("-")


def provenance() -> dict[str, Any]:
    """Return versions and machine: what else a number may depend on."""
    return {
        "versions": {name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically: the old content stays until the new one is whole."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, content: bytes | memoryview) -> Path:
    """Write a file atomically: the old content stays until the new one is whole."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{target.parent} cannot be a folder, a file is in its place; take another") from error
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target
