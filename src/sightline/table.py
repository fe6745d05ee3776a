"""Tables. Methods against metrics, as the page, the command line, Markdown, LaTeX and CSV all show them.

Only runs that share everything but the method, its layer and the list of metrics stand in one table. Controls (maps
that look at nothing or at no classifier) stand apart and are never the best.
"""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from csv import writer
from dataclasses import dataclass
from io import StringIO
from statistics import fmean, median, stdev
from typing import Any

from sightline import latex as tex
from sightline.methods import METHODS
from sightline.runs import Choice, Run, Score

CONTROLS = frozenset(name for name, entry in METHODS.items() if entry.control)
"""Methods that a table needs for comparison only."""

FIELDS = (
    "model",
    "data",
    "method",
    "arguments",
    "explain",
    "layer",
    "seed",
    "metric",
    "value",
    "half_width",
    "n",
    "higher_is_better",
    "seconds",
)
"""Columns of the CSV file."""

SAID = ("explain", "seed", "fast")
"""Conditions that a heading gives as they are; of others it gives the number."""

WIDE = 9
"""Columns beyond which a table is turned: metrics down, methods across."""

NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""


@dataclass(frozen=True)
class Column:
    """One metric with its settings."""

    metric: Choice
    label: str
    higher_is_better: bool | None

    @property
    def arrow(self) -> str:
        """Up where larger is better, down where smaller is, nothing where neither is."""
        return "" if self.higher_is_better is None else "↑" if self.higher_is_better else "↓"

    @property
    def title(self) -> str:
        """Label and arrow."""
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True)
class Cell:
    """One number as shown, its half width as shown (empty where unknown), and whether it is the best of its column."""

    text: str
    half_width: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One run: a label that is unique in its table, a cell a column, and the seconds an image as shown.

    `index` is its place among the runs that were given.
    """

    label: str
    control: bool
    cells: tuple[Cell, ...]
    seconds: str
    run: Run
    index: int


@dataclass(frozen=True)
class Table:
    """Runs that may be compared. `heading` tells this table from the others; `models` are the classifiers averaged."""

    heading: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    models: tuple[Run, ...] = ()
    """One run of each classifier, where the cells are means over several."""

    @property
    def methods(self) -> tuple[Row, ...]:
        """The rows that compete."""
        return tuple(row for row in self.rows if not row.control)

    @property
    def controls(self) -> tuple[Row, ...]:
        """The rows that do not."""
        return tuple(row for row in self.rows if row.control)

    @property
    def wide(self) -> bool:
        """Whether it reads better with metrics down and methods across."""
        return len(self.columns) > WIDE


def tables(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Sort runs into tables, in the order in which they come.

    Raises:
        ValueError: no runs.
    """
    _check(runs)
    groups: dict[Hashable, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(tuple(conditions(run).values()), []).append(index)
    names = headings([conditions(runs[group[0]]) for group in groups.values()])
    singles = [[run] for run in runs]
    return tuple(_table(name, singles, group) for name, group in zip(names, groups.values(), strict=True))


def across(runs: Sequence[Run]) -> Table:
    """Lay out the same methods on several classifiers: means over the classifiers, ± their standard deviation.

    The classifiers differ in their seeds, say; `seconds` are means too.

    Raises:
        ValueError: no runs, runs on other images or of other settings, or a method that a classifier lacks.
    """
    _check(runs)
    if apart := [key for key in differences(runs) if key not in ("model", "predictions")]:
        raise ValueError(f"runs that differ in {', '.join(apart)} cannot be averaged over classifiers")
    grid: dict[str, dict[str, Run]] = {}
    for run in runs:
        grid.setdefault(named(run.spec.model), {})[named(run.spec.method)] = run
    columns = list(grid.values())
    if lacking := [f"{name} lacks {method}" for name, column in grid.items() for method in columns[0].keys() ^ column]:
        raise ValueError(f"every classifier needs a run of every method, and {lacking[0]}")
    groups = [[column[method] for column in columns] for method in columns[0]]
    heading = f"{len(columns)} classifiers on {named(runs[0].spec.data)}"
    return _table(heading, groups, range(len(groups)), tuple(groups[0]))


def conditions(run: Run) -> dict[str, Hashable]:
    """Return what two runs must share to be compared."""
    spec = run.spec
    return {
        "model": named(spec.model),
        "data": named(spec.data),
        "explain": spec.explain,
        "seed": spec.seed,
        "fast": spec.fast,
        "image set": (run.scores.ids, run.scores.labels),
        "predictions": run.scores.predicted,
    }


def differences(runs: Sequence[Run]) -> tuple[str, ...]:
    """Name the conditions in which runs differ; other images have other predictions, which goes without saying."""
    kept = [conditions(run) for run in runs]
    found = tuple(key for key in kept[0] if len({one[key] for one in kept}) > 1)
    return tuple(key for key in found if key != "predictions" or "image set" not in found)


def headings(groups: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Name each group by model and data, and by what else tells it from the others."""
    names = [f"{group['model']} on {group['data']}" for group in groups]
    for key in (*SAID, "image set", "predictions"):
        values = list(dict.fromkeys(group[key] for group in groups))
        if len(values) == 1 or (key in ("image set", "predictions") and len(set(names)) == len(names)):
            continue
        shown = [group[key] if key in SAID else f"no. {values.index(group[key]) + 1}" for group in groups]
        names = [f"{name}, {key} {value}" for name, value in zip(names, shown, strict=True)]
    return names


def labels(runs: Sequence[Run]) -> list[str]:
    """Name each run by its method with the settings given; runs of one method also by those in which they differ."""
    found: list[str] = []
    for run in runs:
        alike = [_settings(other) for other in runs if other.spec.method.name == run.spec.method.name]
        keys = {key for settings in alike for key in settings}
        shown = {key for key in keys if len({repr(settings.get(key)) for settings in alike}) > 1}
        shown |= set(run.spec.method.settings)
        settings = {key: value for key, value in _settings(run).items() if key in shown}
        label = named(Choice(run.spec.method.name, settings))
        found.append(label)
    return [label if (n := found[:i].count(label)) == 0 else f"{label} #{n + 1}" for i, label in enumerate(found)]


def named(choice: Choice) -> str:
    """Write a choice with its settings in alphabetical order: `name(key=value)`, `smooth(gradient)[key=value]`."""
    inside = ", ".join(f"{key}={_shown(value)}" for key, value in sorted(choice.settings.items()))
    if not inside:
        return choice.name
    return f"{choice.name}[{inside}]" if "(" in choice.name else f"{choice.name}({inside})"


def digits(values: Sequence[float], half_widths: Sequence[float | None] = ()) -> int:
    """Return the decimals of a column: two significant digits of the median half width, else three of the largest."""
    widths = [width for width in half_widths if width and math.isfinite(width)]
    if widths:
        return min(6, max(0, 1 - math.floor(math.log10(median(widths)))))
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(4, max(0, 2 - math.floor(math.log10(largest)))) if largest else 0


def fixed(value: float, decimals: int) -> str:
    """Write a number with so many decimals, a true minus sign and no negative zero."""
    if math.isnan(value):
        return NOTHING
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def summary(table: Table) -> str:
    """Say in one sentence what a table is about."""
    models = table.models or (table.rows[0].run,)
    spec, images = models[0].spec, plural(len(models[0].scores.ids), "image")
    who = [_counted(table.methods, "method"), _counted(table.controls, "control")]
    verb = "explains" if len(table.rows) == 1 else "explain"
    whom = " and ".join(named(run.spec.model) for run in models)
    what = f"{' and '.join(filter(None, who))} {verb} {whom} on {images} of {named(spec.data)}"
    right = [run.scores.accuracy for run in models]
    if any(accuracy is None for accuracy in right):
        without = (
            "there is no classifier to ask" if models[0].scores.predicted[:1] == (-1,) else "the images have no labels"
        )
        return f"{what}; accuracy unknown, {without}."
    shares = " and ".join(f"{100 * accuracy:.1f}" for accuracy in right if accuracy is not None)
    if any(one is not None for run in models for one in run.scores.among):
        return f"{what}; the class of the largest logit is in {shares} % of them."
    return f"{what}; {'it classifies' if len(models) == 1 else 'they classify'} {shares} % of them correctly."


def markdown(tables: Sequence[Table]) -> str:
    """Write tables in Markdown: best values bold, ± half of the 95 % confidence interval or the standard deviation."""
    return "\n".join(_markdown(table) for table in tables)


def latex(tables: Sequence[Table]) -> str:
    """Write the same tables in LaTeX, for booktabs."""
    return "\n".join(_latex(table) for table in tables)


def csv(runs: Sequence[Run]) -> str:
    """Write one line a run and metric in full precision; `seconds` are those of all maps of the run.

    Of the metrics' arguments a line has those of its own.

    Raises:
        ValueError: no runs.
    """
    _check(runs)
    file = StringIO()
    lines = writer(file, lineterminator="\n")
    lines.writerow(FIELDS)
    for run in runs:
        lines.writerows(_record(run, score) for score in run.scores.scores)
    return file.getvalue()


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("there are no runs to show, expected at least one; `sightline evaluate` writes them")


@dataclass(frozen=True)
class _Number:
    """What stands in a cell, before rounding."""

    value: float
    half_width: float | None
    higher_is_better: bool | None


def _number_of(scores: Sequence[Score | None]) -> _Number | None:
    """Return one run's number with its half width, or the mean over runs with their standard deviation."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    if len(known) == 1:
        return _Number(known[0].value, _half_width(known[0]), known[0].higher_is_better)
    values = [score.value for score in known]
    return _Number(fmean(values), stdev(values), known[0].higher_is_better)


def _table(heading: str, rows: Sequence[Sequence[Run]], group: Sequence[int], models: tuple[Run, ...] = ()) -> Table:
    """Lay out those rows whose places are given, controls last; a row has one run, or one a classifier."""
    places = sorted(group, key=lambda place: rows[place][0].spec.method.name in CONTROLS)
    order = [rows[place] for place in places]
    controls = [row[0].spec.method.name in CONTROLS for row in order]
    scores = [[{(named(s.metric), s.higher_is_better): s for s in run.scores.scores} for run in row] for row in order]
    columns: dict[tuple[str, bool | None], Column] = {}
    for key, score in (item for row in scores for run in row for item in run.items()):
        columns.setdefault(key, Column(score.metric, *key))
    cells = [_cells([_number_of([run.get(key) for run in row]) for row in scores], controls) for key in columns]
    seconds = [fmean(_pace(run) for run in row) for row in order]
    times = [_seconds(value, min(3, digits((), [min(seconds)]))) for value in seconds]
    made = [
        Row(label, controls[i], tuple(cell[i] for cell in cells), times[i], order[i][0], places[i])
        for i, label in enumerate(labels([row[0] for row in order]))
    ]
    return Table(heading, tuple(columns.values()), tuple(made), models)


def _pace(run: Run) -> float:
    """Return the seconds an image."""
    return run.scores.seconds / len(run.scores.ids) if run.scores.ids else math.nan


def _cells(numbers: Sequence[_Number | None], controls: Sequence[bool]) -> list[Cell]:
    """Show one column with its best values marked."""
    known = [number for number in numbers if number is not None]
    decimals = digits([number.value for number in known], [number.half_width for number in known])
    texts = [NOTHING if number is None else fixed(number.value, decimals) for number in numbers]
    widths = [None if number is None else number.half_width for number in numbers]
    best = _best(numbers, texts, controls)
    return [
        Cell(text, "" if width is None else fixed(width, decimals), text == best and not controls[i])
        for i, (text, width) in enumerate(zip(texts, widths, strict=True))
    ]


def _seconds(value: float, decimals: int) -> str:
    """Write a time; what would be rounded to nothing is still some time."""
    least = 10.0**-decimals
    return f"< {fixed(least, decimals)}" if 0 < value < least / 2 else fixed(value, decimals)


def _half_width(score: Score) -> float | None:
    """Return the half width where no image has an infinite number."""
    return None if any(math.isinf(value) for value in score.per_image) else score.half_width


def _best(numbers: Sequence[_Number | None], texts: Sequence[str], controls: Sequence[bool]) -> str | None:
    """Return the best number as shown; equal as shown is equally good, and where all are equal none is the best."""
    competing = {
        number.value if number.higher_is_better else -number.value: text
        for number, text, control in zip(numbers, texts, controls, strict=True)
        if number is not None and number.higher_is_better is not None and math.isfinite(number.value) and not control
    }
    return competing[max(competing)] if len(set(competing.values())) > 1 else None


def _settings(run: Run) -> dict[str, Any]:
    """Return the method's settings as far as known, defaults and layer included."""
    inside, model = run.arguments.get("method"), run.arguments.get("model")
    known = inside if isinstance(inside, Mapping) else run.arguments
    layer = run.spec.layer or (model.get("layer") if isinstance(model, Mapping) else None)
    return {**known, **({"layer": layer} if layer else {}), **run.spec.method.settings}


def _shown(value: Any) -> str:
    """Write a setting: a table with a name like a choice, a fraction in its shortest form."""
    if isinstance(value, Mapping) and "name" in value:
        return named(Choice.of(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(rows: Sequence[Row], noun: str) -> str:
    """Count the methods of rows, and the rows where a method has several; nothing for no rows."""
    count = len({row.run.spec.method.name for row in rows})
    return (plural(count, noun) + (f" in {len(rows)} settings" if len(rows) > count else "")) if rows else ""


def plural(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _notes(table: Table) -> str:
    """Say what a table is about and how it marks."""
    spread = "the standard deviation over the classifiers" if table.models else "half of the 95 % confidence interval"
    aside = " Behind the empty column: controls." if table.wide and table.methods and table.controls else ""
    return f"{summary(table)} Bold: the best method; ± {spread}.{aside}"


def _laid(table: Table) -> tuple[list[str], list[list[list[str | Cell]]]]:
    """Return the head, and the rows of methods and of controls; or of metrics, where the table is turned."""
    if table.wide:
        return _turned(table)
    head = ["method", *(column.title for column in table.columns), "s/image"]
    blocks = [[_row(row) for row in rows] for rows in (table.methods, table.controls) if rows]
    return head, blocks


def _turned(table: Table) -> tuple[list[str], list[list[list[str | Cell]]]]:
    """Lay metrics down and methods across, controls behind an empty column."""
    gap = [None] if table.methods and table.controls else []
    across: list[Row | None] = [*table.methods, *gap, *table.controls]
    head = ["metric", *("" if row is None else row.label for row in across)]
    body: list[list[str | Cell]] = [
        [column.title, *("" if row is None else row.cells[place] for row in across)]
        for place, column in enumerate(table.columns)
    ]
    return head, [[*body, ["s/image", *("" if row is None else Cell(row.seconds, "", False) for row in across)]]]


def _row(row: Row) -> list[str | Cell]:
    return [row.label, *row.cells, Cell(row.seconds, "", False)]


def _markdown(table: Table) -> str:
    """Write one table with its heading and summary."""
    head, blocks = _laid(table)
    lines = [_line(map(_cell, head)), _line([":--", *["--:"] * (len(head) - 1)])]
    for place, block in enumerate(blocks):
        lines += [_line(["*controls*", *[""] * (len(head) - 1)])] if place else []
        lines += [_line(_cell(cell) if isinstance(cell, str) else _number(cell) for cell in row) for row in block]
    return "\n".join([f"### {_cell(table.heading)}", "", _cell(_notes(table)), "", *lines, ""])


def _latex(table: Table) -> str:
    """Write one table in LaTeX."""
    head, blocks = _laid(table)
    rows = [[[_printed(cell) for cell in row] for row in block] for block in blocks]
    return tex.table(f"{table.heading}. {_notes(table)}", head, rows)


def _printed(cell: str | Cell) -> str:
    """Write one cell in LaTeX."""
    if isinstance(cell, str):
        return tex.escaped(cell)
    text = tex.escaped(f"{cell.text} ± {cell.half_width}" if cell.half_width else cell.text)
    return tex.bold(text) if cell.best else text


def _number(cell: Cell) -> str:
    text = f"{cell.text} ± {cell.half_width}" if cell.half_width else cell.text
    return f"**{text}**" if cell.best else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Keep names from being read as Markdown."""
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|*<`[" else letter for letter in flat)


def _record(run: Run, score: Score) -> list[Any]:
    spec = run.spec
    metrics = run.arguments.get("metrics")
    own = {"metrics": metrics.get(str(score.metric))} if isinstance(metrics, Mapping) else {}
    arguments = json.dumps({**run.arguments, **own}, sort_keys=True)
    layer = "" if spec.layer is None else spec.layer
    half_width = _half_width(score)
    width = "" if half_width is None else repr(half_width)
    better = "" if score.higher_is_better is None else str(score.higher_is_better).lower()
    who = [named(spec.model), named(spec.data), named(spec.method), arguments, spec.explain, layer, spec.seed]
    value, count = repr(score.value), len(run.scores.ids) if score.count is None else score.count
    return [*who, named(score.metric), value, width, count, better, repr(run.scores.seconds)]
