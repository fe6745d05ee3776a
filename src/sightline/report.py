"""The report. Runs as one self-contained page: table, curves, gallery, best and worst cases, provenance.

Pure: the same runs and pictures give the same bytes. No script, and nothing is loaded from elsewhere.
"""

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from sightline.methods import COMBINATORS
from sightline.metrics import METRICS
from sightline.metrics import Entry as Judge
from sightline.protocols import PROTOCOLS
from sightline.protocols import Entry as Protocol
from sightline.runs import Run, Score, split, without_none, write_text
from sightline.table import NOTHING, Column, Row, Table, differences, digits, fixed, named, summary, tables

TITLE = "Saliency report"

MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""First bytes of the pictures that a page can show."""

COLORS, DASHES = 12, 4
"""Line colors of methods and dash patterns of controls in the style sheet."""

ROOM = 7_500_000
"""Characters of pictures in a page, so that it stays below ten megabytes."""

CASES = 3
"""Best and worst images a method, at most."""


@dataclass(frozen=True)
class Frame:
    """Where a chart's axes lie in its drawing of 460 x 300 units, and the values that the vertical one spans."""

    bottom: float
    top: float
    ticks: tuple[tuple[float, str], ...]
    left: float = 58.0
    right: float = 450.0
    high: float = 12.0
    low: float = 252.0

    def x(self, fraction: float) -> float:
        """Place a fraction of the way."""
        return self.left + fraction * (self.right - self.left)

    def y(self, value: float) -> float:
        """Place a value; up is more."""
        return self.low - (value - self.bottom) / (self.top - self.bottom) * (self.low - self.high)


@dataclass(frozen=True)
class Panel:
    """One chart: a metric, what its axes say, its frame, and a polyline a row that has a curve, controls first.

    `ticks` are fractions of the way across, with what stands there.
    """

    column: Column
    axis: str
    unit: str
    frame: Frame
    ticks: tuple[tuple[float, str], ...]
    lines: tuple[tuple[Row, str], ...]


@dataclass(frozen=True)
class Ranking:
    """The metric by which images are ranked, its numbers by row label and image, and the decimals to show."""

    metric: Column | None
    numbers: Mapping[str, Mapping[str, float]]
    decimals: int


@dataclass(frozen=True)
class Shot:
    """A picture of the page: its name in the style sheet and its data URI, or the reason why there is none."""

    alt: str
    name: str = ""
    uri: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Example:
    """One image under one method, with its number in the chosen metric."""

    id: str
    shot: Shot
    value: str


@dataclass(frozen=True)
class Photo:
    """One image: what it is, what the classifier says, and an example a row of the table."""

    id: str
    shot: Shot
    label: str | None
    predicted: str
    right: bool | None
    probability: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Case:
    """The images on which a method does best and worst, and whether the page has room for their pictures."""

    row: Row
    best: tuple[Example, ...]
    worst: tuple[Example, ...]
    room: bool = True


@dataclass(frozen=True)
class Note:
    """Something that is not in the pictures or numbers: what, of which image, why, and in which runs."""

    what: str
    image: str
    reason: str
    who: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one table: `styles` by row label; `pictured` counts the images that have pictures."""

    table: Table
    summary: str
    styles: Mapping[str, str]
    panels: tuple[Panel, ...]
    metric: Column | None
    pictured: int
    photos: tuple[Photo, ...]
    cases: tuple[Case, ...]
    notes: tuple[Note, ...]


def report(runs: Sequence[Run], *, roots: Sequence[Path], title: str = TITLE, images: int = 8) -> str:
    """Write runs as one HTML page; `roots` are the folders of the runs' files, from which pictures are read.

    The gallery shows the first `images` images that have pictures, as far as there is room: a page stays below ten
    megabytes. Best and worst cases come from all that have; where there are many, those of the first methods alone are
    shown with pictures, in half of the room at most, and the page says so.

    Raises:
        ValueError: no runs, or not one root a run.
    """
    found = tables(runs)
    if len(roots) != len(runs):
        raise ValueError(f"expected one folder a run, got {len(roots)} folders for {len(runs)} runs")
    sections = [_section(table, roots, images, ROOM // len(found)) for table in found]
    shots = (shot for part in sections for _, _, shot in _shots(part.table, part.photos, part.cases))
    sheet = {shot.name: shot.uri for shot in shots if shot.uri}
    styles = dict.fromkeys(style for part in sections for style in part.styles.values())
    return _template().render(
        title=title, sections=sections, sheet=sheet, styles=styles, apart=differences(runs), meaning=meaning
    )


def known(metric: str) -> Judge | Protocol | None:
    """Return the entry of a metric, or of the protocol whose number it is; None for one that is not ours."""
    name = metric.partition(".")[0]
    return METRICS[name] if name in METRICS else PROTOCOLS.get(name)


def meaning(metric: str) -> str:
    """Return what a reader is told about a metric, or about a number of a protocol."""
    entry = known(metric)
    if entry is None:
        return "a metric without a description here"
    return f"{entry.summary}, in {entry.unit}" if entry.unit and metric in METRICS else entry.summary


def axes(metric: str) -> tuple[str, str]:
    """Return what the axes of a curve are called, across and up."""
    entry = known(metric)
    return ("fraction of the way", "score") if entry is None else (entry.axis, entry.unit or "score")


def write(paths: Sequence[Path], out: Path, *, title: str = TITLE, images: int = 8) -> Path:
    """Read runs and write their page, atomically.

    Raises:
        FileNotFoundError: no such run.
        ValueError: no runs, or a file that is not a run.
    """
    runs = [Run.read(path) for path in paths]
    return write_text(out, report(runs, roots=[path.parent for path in paths], title=title, images=images))


@cache
def _template() -> Template:
    """Load the page's template, which lies beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(breakable=_breakable, parted=_parted, toml=_toml, plain=_plain)
    return environment.get_template("report.html.jinja")


def _breakable(name: str) -> Markup:
    """Let a long name break behind its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


def _parted(label: str) -> tuple[str, str]:
    """Part a label into its name and its settings without the brackets around them."""
    if label.partition("(")[0] in COMBINATORS:
        name, *settings = split(label, "[", 1)
        return name, "".join(settings).removesuffix("]")
    name, _, rest = label.partition("(")
    inside, _, behind = rest.rpartition(")")
    return name, inside + behind


def _toml(run: Run) -> str:
    """Write the specification of a run as the TOML that gives it again."""
    return tomli_w.dumps(without_none(run.spec.plain())).strip()


def _plain(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested tables to dotted keys in alphabetical order."""
    lines: list[tuple[str, str]] = []
    for key, value in sorted(table.items()):
        nested = isinstance(value, Mapping) and value
        lines += _plain(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", str(value))]
    return lines


def _section(table: Table, roots: Sequence[Path], images: int, room: int) -> Section:
    """Gather what one table's part of the page shows, in at most `room` characters of pictures."""
    ranking = _ranking(table)
    ids = [name for name in table.rows[0].run.scores.ids if any(name in row.run.pictures for row in table.rows)]
    cases = _with_room(table, [_case(row, ranking=ranking, roots=roots) for row in table.methods], room // 2)
    left = room - _size(table, (), cases)
    photos = _fitting(table, (_photo(table, name, ranking=ranking, roots=roots) for name in ids[:images]), left)
    return Section(
        table=table,
        summary=summary(table),
        styles=_styles(table),
        panels=tuple(panel for column in table.columns if (panel := _panel(table, column)).lines),
        metric=ranking.metric,
        pictured=len(ids),
        photos=photos,
        cases=tuple(case for case in cases if case.best),
        notes=_notes(table, photos, cases if ids else ()),
    )


def _fitting(table: Table, photos: Iterator[Photo], room: int) -> tuple[Photo, ...]:
    """Return the first photos, as many as fit into so many characters."""
    kept: list[Photo] = []
    for photo in photos:
        room -= _size(table, [photo], ())
        if room < 0:
            break
        kept.append(photo)
    return tuple(kept)


def _with_room(table: Table, cases: Sequence[Case], room: int) -> tuple[Case, ...]:
    """Return the cases, without pictures from the first one on that does not fit into so many characters."""
    ends = accumulate(_size(table, (), [case]) for case in cases)
    return tuple(case if end <= room else _without_pictures(case) for case, end in zip(cases, ends, strict=True))


def _without_pictures(case: Case) -> Case:
    """Return the case with its images and numbers alone."""
    best, worst = (
        tuple(replace(example, shot=Shot(example.shot.alt, reason=example.shot.reason)) for example in part)
        for part in (case.best, case.worst)
    )
    return Case(case.row, best, worst, room=False)


def _size(table: Table, photos: Sequence[Photo], cases: Sequence[Case]) -> int:
    """Return how many characters the pictures take, where each is there once for every place that shows it."""
    return sum(len(shot.uri) for _, _, shot in _shots(table, photos, cases))


def _styles(table: Table) -> dict[str, str]:
    """Give every method a color and every control a dash pattern; beyond the last they start again."""
    methods = {row.label: f"k{i % COLORS}" for i, row in enumerate(table.methods)}
    return {**methods, **{row.label: f"g{i % DASHES}" for i, row in enumerate(table.controls)}}


def _score(row: Row, column: Column) -> Score | None:
    """Return the score of a row that stands in a column."""
    return next((score for score in row.run.scores.scores if named(score.metric) == column.label), None)


def _frame(values: Sequence[float]) -> Frame:
    """Choose the vertical axis: from 0 (or below) to a round number, with about five ticks."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    rough = (high - low or 1.0) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    ticks = tuple((i * step, fixed(i * step, decimals)) for i in range(first, max(last, first + 1) + 1))
    return Frame(ticks[0][0], ticks[-1][0], ticks)


def _panel(table: Table, column: Column) -> Panel:
    """Draw the curves of one metric."""
    scores = [(row, _score(row, column)) for row in (*table.controls, *table.methods)]
    drawn = [(row, score) for row, score in scores if score is not None and len(score.curve) > 1]
    frame = _frame([value for _, score in drawn for value in score.curve])
    lines = tuple((row, _points(score, frame)) for row, score in drawn)
    ticks = _across(drawn[0][1].axis) if drawn else ()
    return Panel(column, *axes(column.metric.name), frame, ticks, tuple(line for line in lines if line[1]))


def _points(score: Score, frame: Frame) -> str:
    """Write a curve as an SVG polyline."""
    count = len(score.curve)
    places = _fractions(score.axis) if len(score.axis) == count else [i / (count - 1) for i in range(count)]
    placed = [(frame.x(x), value) for x, value in zip(places, score.curve, strict=True) if math.isfinite(value)]
    return " ".join(f"{x:.2f},{frame.y(value):.2f}" for x, value in placed)


def _fractions(axis: Sequence[float]) -> list[float]:
    """Place the values of an axis between 0 and 1: by their logarithms where they span over two powers of ten."""
    low, high = min(axis), max(axis)
    if low > 0 and high > 100 * low:
        return _fractions([math.log(value) for value in axis])
    return [(value - low) / (high - low) if high > low else 0.5 for value in axis]


def _across(axis: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Choose the ticks of a horizontal axis: quarters of the way, or about five of its values."""
    values = list(axis) or [0.0, 0.25, 0.5, 0.75, 1.0]
    step = max(1, math.ceil((len(values) - 1) / 5))
    return tuple((x, f"{value:g}") for x, value in zip(_fractions(values), values, strict=True))[::step]


def _ranking(table: Table) -> Ranking:
    """Rank images by insertion, else by the first metric with a number an image."""
    ranked = [column for column in table.columns if any(_numbers(row, column) for row in table.rows)]
    metric = next((column for column in ranked if column.metric.name == "insertion"), next(iter(ranked), None))
    numbers = {row.label: _numbers(row, metric) for row in table.rows}
    return Ranking(metric, numbers, digits([value for kept in numbers.values() for value in kept.values()]))


def _numbers(row: Row, column: Column | None) -> Mapping[str, float]:
    """Return a metric's number an image, where there is one."""
    score = None if column is None else _score(row, column)
    ids = row.run.scores.ids
    if score is None or len(score.per_image) != len(ids):
        return {}
    return {name: value for name, value in zip(ids, score.per_image, strict=True) if math.isfinite(value)}


def _photo(table: Table, name: str, *, ranking: Ranking, roots: Sequence[Path]) -> Photo:
    """Show one image and what every method makes of it."""
    owner = next(row for row in table.rows if name in row.run.pictures)
    run, place = owner.run, owner.run.scores.ids.index(name)
    label, predicted = run.scores.labels[place], run.scores.predicted[place]
    return Photo(
        id=name,
        shot=_shot(owner, name, "image", root=roots[owner.index]),
        label=None if label is None else _class(run, label),
        predicted=_class(run, predicted),
        right=run.scores.right[place],
        probability="" if predicted < 0 else f"{100 * run.scores.probability[place]:.0f}\N{NO-BREAK SPACE}%",
        examples=tuple(_example(row, name, ranking=ranking, roots=roots) for row in table.rows),
    )


def _class(run: Run, index: int) -> str:
    """Name a class; below zero there was no classifier to ask."""
    if index < 0:
        return ""
    return run.classes[index] if 0 <= index < len(run.classes) else f"class {index}"


def _case(row: Row, *, ranking: Ranking, roots: Sequence[Path]) -> Case:
    """Choose the images on which a method does best and worst, no image twice."""
    run, numbers, metric = row.run, ranking.numbers[row.label], ranking.metric
    shown = [name for name in numbers if not run.pictures or name in run.pictures or name in run.scores.degenerate]
    order = sorted(shown, key=lambda name: numbers[name], reverse=metric is not None and bool(metric.higher_is_better))
    count = min(CASES, len(order) // 2)
    best, worst = order[:count], order[::-1][:count]
    show = partial(_example, row, ranking=ranking, roots=roots)
    return Case(row, tuple(show(name) for name in best), tuple(show(name) for name in worst))


def _example(row: Row, name: str, *, ranking: Ranking, roots: Sequence[Path]) -> Example:
    """Show one image under one method."""
    value = ranking.numbers[row.label].get(name)
    text = NOTHING if value is None else fixed(value, ranking.decimals)
    return Example(name, _shot(row, name, "overlay", root=roots[row.index]), text)


def _shot(row: Row, name: str, kind: str, *, root: Path) -> Shot:
    """Read one picture of a run."""
    alt = f"{row.label} on {name}" if kind == "overlay" else name
    path = row.run.pictures.get(name, {}).get(kind)
    if path is not None:
        return _read(root, path, alt)
    return Shot(alt, reason=row.run.scores.degenerate.get(name, "not saved") if kind == "overlay" else "not saved")


def _read(root: Path, path: str, alt: str) -> Shot:
    """Read a picture file into the page; a page takes no other files, and none from outside the run's folder."""
    if not (root / path).resolve().is_relative_to(root.resolve()):
        return Shot(alt, reason=f"{path} lies outside the run's folder")
    try:
        content = (root / path).read_bytes()
    except OSError:
        return Shot(alt, reason=f"{path} cannot be read")
    kind = next((kind for magic, kind in MAGIC.items() if content.startswith(magic)), None)
    if kind is None:
        return Shot(alt, reason=f"{path} is neither PNG nor JPEG")
    uri = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return Shot(alt, name=f"p{hashlib.sha256(content).hexdigest()[:16]}", uri=uri)


def _shots(table: Table, photos: Sequence[Photo], cases: Sequence[Case]) -> Iterator[tuple[str, str, Shot]]:
    """List every picture of a section with its method (empty for the image itself) and image."""
    for photo in photos:
        yield "", photo.id, photo.shot
        for row, example in zip(table.rows, photo.examples, strict=True):
            yield row.label, photo.id, example.shot
    for case in cases:
        yield from ((case.row.label, example.id, example.shot) for example in (*case.best, *case.worst))


def _notes(table: Table, photos: Sequence[Photo], cases: Sequence[Case]) -> tuple[Note, ...]:
    """List what is missing and why, each thing once."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in table.rows:
        for image, reason in sorted(row.run.scores.degenerate.items()):
            found.setdefault(("map that says nothing", image, reason), {})[row.label] = None
        for image, reason in sorted(row.run.skipped.items()):
            found.setdefault(("skipped file", image, reason), {})[row.label] = None
    for label, image, shot in _shots(table, photos, cases):
        if shot.reason and ("map that says nothing", image, shot.reason) not in found:
            found.setdefault(("missing picture", image, shot.reason), {})[label] = None
    return tuple(Note(*key, _who(list(labels), len(table.rows))) for key, labels in sorted(found.items()))


def _who(labels: Sequence[str], count: int) -> str:
    return "all" if count == len(labels) > 1 else ", ".join(labels)
