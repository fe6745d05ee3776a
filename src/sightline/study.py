"""Studies. Trainings and evaluations over several seeds, from one TOML file to one table: what a paper's table is.

    seeds = [0, 1, 2]

    [[train]]
    name = "L100"
    kind = "casm"
    model = "out/creatures-{seed}/classifier.safetensors"
    settings = {thinning = "L100"}

    [[evaluate]]
    name = "localization"
    data = "creatures?split=test"
    model = "creatures"
    metrics = ["localization_error", "f1"]
    [evaluate.rows]
    "CASM (L100)" = {method = "{L100}"}

`{seed}` stands for the seed, `{L100}` for the weights that the training of that name gave with it. A training is a
recipe, a row a specification; what a row does not say is its evaluation's. A [[segment]] is a specification of
`segmenting`, and its name stands for the folder of labels that it writes. Steps wait for those that they name.
Everything finished is kept: a study that was killed goes on.

With `values = [...]` a step or an evaluation is done for each of them, `{value}` in its place: a step's name must tell
them apart (`net-{value}`), an evaluation is drawn as curves over its `axis`, a panel for each of the metrics that are
`shown` (all by default). `shown` also says which columns the table has; numbers.json has all.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sightline import latex
from sightline.learning import LEARNERS, claim, configured, learn
from sightline.pieces import forget
from sightline.processes import first
from sightline.protocols import PROTOCOLS
from sightline.recipes import Recipe
from sightline.registry import find, unknown
from sightline.running import finished, named, run
from sightline.runs import Choice, Run, Score, Spec, file_name, read_toml, strict, write_bytes, write_text
from sightline.segmenting import MANIFEST, Segmenting, parts, segment
from sightline.training import Progress
from sightline.viz import Curve, curves, png

TRAINING, SEGMENT = "train", "segment"
"""The arrays of steps in a file, and the folders of what they make."""

ROUNDING = 1e-9
"""A deviation, or a difference of means, below this share of the mean is rounding."""

Told = Callable[[str, int, int, str], None]
"""Told what is at work, how much of how much is done, and a note."""


@dataclass(frozen=True)
class Step:
    """What makes something that later steps and rows name, with places to fill: a recipe, or labels to write."""

    name: str
    kind: str
    """What is learned, or `SEGMENT`."""
    table: Mapping[str, Any]

    def target(self, folder: Path, seed: int | str) -> Path:
        """Return what its name stands for: the file of weights, or the folder of labels."""
        if self.kind == SEGMENT:
            return folder / SEGMENT / file_name(self.name) / f"seed-{seed}"
        return folder / TRAINING / file_name(self.name) / f"seed-{seed}" / f"{self.kind}.safetensors"


@dataclass(frozen=True)
class Sweep:
    """What the rows of an evaluation are drawn over: for each curve, its values and the rows that have them."""

    axis: str
    curves: Mapping[str, tuple[tuple[float, str], ...]]


@dataclass(frozen=True)
class Evaluation:
    """Specifications with places to fill, one a row."""

    name: str
    rows: Mapping[str, Mapping[str, Any]]
    shown: tuple[str, ...] = ()
    sweep: Sweep | None = None

    def check_shown(self, specs: Iterable[Spec]) -> None:
        """Check that what is shown will be there; what data names (the classes of a protocol) only its runs tell.

        Raises:
            LookupError: it will not.
        """
        listed = [parted(spec.metrics) for spec in specs]
        known = dict.fromkeys(name for metrics in listed for name in titles(metrics))
        open_ended = {one.name.partition(".")[0] for metrics in listed for one in metrics if "." in one.name}
        for name in self.shown:
            if name not in known and name.partition(".")[0] not in open_ended:
                raise LookupError(f"{self.name!r}: {unknown(name, known, 'metric to show')}")

    def metrics(self, rows: Iterable[Mapping[str, "Number"]]) -> tuple[str, ...]:
        """Return the metrics that are shown, of all that the rows have.

        Raises:
            LookupError: one that no row has.
        """
        known = tuple(dict.fromkeys(metric for row in rows for metric in row))
        for name in self.shown if known else ():
            if name not in known:
                raise LookupError(unknown(name, known, "metric to show"))
        return self.shown or known


@dataclass(frozen=True)
class Study:
    """Steps in the order in which they can be done, evaluations, and the seeds with which each is done."""

    title: str
    seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def read(cls, path: Path | str) -> "Study":
        """Read a TOML file.

        Raises:
            FileNotFoundError: no such file.
            LookupError: an entry that a study does not have, or a place that no training fills.
            TypeError, ValueError: not TOML, no seeds or rows, a name twice, or a recipe or specification that does not
                fit; all is checked before any work.
        """
        table = read_toml(path)
        known = ("title", "seeds", TRAINING, SEGMENT, "evaluate")
        for name in table:
            if name not in known:
                raise LookupError(unknown(name, known, "entry of a study"))
        arrays = {name: listed(table.get(name, []), f"{path}: [[{name}]]", Mapping) for name in known[2:]}
        steps = [step(one, name) for name in (TRAINING, SEGMENT) for each in arrays[name] for one in expanded(each)]
        evaluations = tuple(evaluation(one) for one in arrays["evaluate"])
        names = [*(one.name for one in steps), *(one.name for one in evaluations)]
        if "seed" in names:
            raise ValueError(f"{path} calls a step or an evaluation 'seed', which stands for the seed; rename it")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} has {twice[0]!r} twice; give steps and evaluations names of their own")
        apart((one.name for one in steps), f"{path}: the steps")
        apart((one.name for one in evaluations), f"{path}: the evaluations")
        for one in evaluations:
            apart(one.rows, f"{path}: the rows")
        seeds = tuple(listed(table.get("seeds", [0]), f"{path}: seeds = [0, 1]"))
        if not seeds or not names or not all(type(seed) is int for seed in seeds) or len({*seeds}) < len(seeds):
            raise ValueError(f"{path} needs different whole numbers as seeds and one or more [[train]] or [[evaluate]]")
        study = cls(str(table.get("title", Path(path).stem)), seeds, ordered(steps), evaluations)
        study.check()
        return study

    def check(self) -> None:
        """Read every recipe and specification once, with paths that need not exist yet.

        Raises:
            LookupError, TypeError, ValueError: one that does not fit.
        """
        places = {"seed": str(self.seeds[0])}
        for one in self.steps:
            if one.kind == SEGMENT:
                asked = Segmenting.of(filled(one.table, places))
                with suppress(FileNotFoundError):
                    parts(asked)
            else:
                configured(one.kind, recipe_of(one, places))
            places[one.name] = str(one.target(Path(), self.seeds[0]))
        for evaluation in self.evaluations:
            specs = [Spec.of(filled(row, places)) for row in evaluation.rows.values()]
            for spec in specs:
                with suppress(FileNotFoundError):
                    named(spec)
            evaluation.check_shown(specs)


def listed(value: Any, what: str, kind: Any = object) -> list[Any]:
    """Return a list as it is.

    Raises:
        TypeError: it is none, or an item is of another kind.
    """
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"expected {what}, got {value!r}")
    return value


def apart(names: Iterable[str], what: str) -> None:
    """Check that names are different as names of files.

    Raises:
        ValueError: two are not.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(file_name(name), name)
        if other != name:
            raise ValueError(f"{what} {other!r} and {name!r} would lie in one place, {file_name(name)!r}; rename one")


def step(table: Mapping[str, Any], array: str) -> Step:
    """Read a [[train]] or [[segment]] table.

    Raises:
        ValueError: without a name or, to train, a kind.
    """
    told = ("name", "kind") if array == TRAINING else ("name",)
    if missing := [name for name in told if not isinstance(table.get(name), str)]:
        raise ValueError(f"a [[{array}]] lacks {missing[0]} = ...; got {dict(table)}")
    rest = {key: value for key, value in table.items() if key not in told}
    return Step(
        table["name"], str(table.get("kind", SEGMENT)) if array == TRAINING else SEGMENT, {"seed": "{seed}", **rest}
    )


def expanded(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a table for each of its values, `{value}` filled in; the table itself where it has none."""
    rest = {key: value for key, value in table.items() if key != "values"}
    if "values" not in table:
        return [rest]
    return [valued(rest, value) for value in listed(table["values"], f"values = [...] of {table.get('name')!r}")]


def valued(thing: Any, value: Any) -> Any:
    """Return plain data with `{value}` filled in; a text that is nothing else becomes the value itself."""
    if isinstance(thing, Mapping):
        return {key: valued(item, value) for key, item in thing.items()}
    if isinstance(thing, list):
        return [valued(item, value) for item in thing]
    if thing == "{value}":
        return value
    return thing.replace("{value}", str(value)) if isinstance(thing, str) else thing


def ordered(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps so that each comes after those that it names, else as they were.

    Raises:
        ValueError: steps that wait for each other.
    """
    done: list[Step] = []
    left = list(steps)
    while left:
        names = {one.name for one in left}
        ready = next((one for one in left if not names & {*places_in(one.table)}), None)
        if ready is None:
            raise ValueError(f"the steps {', '.join(sorted(names))} wait for each other, or one for itself")
        left.remove(ready)
        done.append(ready)
    return tuple(done)


def places_in(thing: Any) -> Iterator[str]:
    """Yield the names of all places to fill."""
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    if isinstance(thing, list | tuple):
        for item in thing:
            yield from places_in(item)
    elif isinstance(thing, str):
        yield from re.findall(r"\{([^{}]*)\}", thing)


def evaluation(table: Mapping[str, Any]) -> Evaluation:
    """Read an [[evaluate]] table; what a row does not say is that of the table.

    Raises:
        ValueError: without a name or rows, or with values that are no numbers.
    """
    own = ("name", "rows", "values", "axis", "shown")
    rows = table.get("rows")
    if not isinstance(table.get("name"), str) or not isinstance(rows, Mapping) or not rows:
        raise ValueError(f"an [[evaluate]] needs a name and [evaluate.rows]; got {dict(table)}")
    shared = {"seed": "{seed}"} | {key: value for key, value in table.items() if key not in own}
    full = {label: {**shared, **row} for label, row in rows.items()}
    shown = tuple(table.get("shown", ()))
    if "values" not in table:
        return Evaluation(table["name"], full, shown)
    values, axis = listed(table["values"], f"values = [...] of {table['name']!r}"), str(table.get("axis", "value"))
    if not values or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"an [[evaluate]] is drawn over numbers, got values = {values!r}")
    label = {(row, value): f"{row}, {axis} {value}" for row in full for value in values}
    curves = {row: tuple((float(value), label[row, value]) for value in values) for row in full}
    points = {label[row, value]: valued(one, value) for row, one in full.items() for value in values}
    return Evaluation(table["name"], points, shown, Sweep(axis, curves))


def filled(value: Any, places: Mapping[str, str]) -> Any:
    """Return plain data in which `{name}` in every text is filled; a text that is a place for the seed is a number.

    Raises:
        LookupError: a place that nothing fills.
    """
    if isinstance(value, Mapping):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, places) for item in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    if value == "{seed}":
        return int(places["seed"])
    text = value
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", place)
    if "{" in text:
        wanted = text.partition("{")[2].partition("}")[0]
        raise LookupError(f"{value!r}: {unknown(wanted, places, 'place to fill')}")
    return text


def conduct(
    study: Study, out: Path | str, *, seeds: Sequence[int] | None = None, told: Told | None = None
) -> dict[str, dict[str, list[Run]]]:
    """Train and evaluate all that is not finished in `out`; return the runs by evaluation and row, one a seed.

    Weights lie in OUT/train/NAME/seed-N, labels in OUT/segment/NAME/seed-N, runs in
    OUT/runs/EVALUATION/ROW/seed-N.json. `seeds` are those to do now; runs of the others that are finished by then are
    returned, too. A run counts as finished if the specification and the weights that it names are the same.

    Raises:
        ValueError: seeds that the study does not have.
        Other errors as `learn` and `run`.
    """
    chosen, folder, tell = tuple(seeds or study.seeds), Path(out), told or (lambda *_: None)
    if strange := [seed for seed in chosen if seed not in study.seeds]:
        raise ValueError(f"the study has seeds {', '.join(map(str, study.seeds))}, got {strange[0]}")
    made: dict[Path, Run] = {}
    for seed in (one for one in study.seeds if one in chosen):
        places = places_of(study, folder, seed)
        for one in study.steps:
            taken(one, places, one.target(folder, seed), tell)
        for _, label, path, spec in rows_of(study, folder, seed):
            made[path] = finished(spec, path) or evaluated(spec, path, label, tell)
    runs: dict[str, dict[str, list[Run]]] = {one.name: {row: [] for row in one.rows} for one in study.evaluations}
    for seed in study.seeds:
        for evaluation, label, path, spec in rows_of(study, folder, seed):
            found = made.get(path) or finished(spec, path)
            runs[evaluation.name][label] += [] if found is None else [found]
    return runs


def places_of(study: Study, folder: Path, seed: int) -> dict[str, str]:
    """Return what stands in the places of a seed: the seed, and what each step makes."""
    return {"seed": str(seed)} | {one.name: str(one.target(folder, seed)) for one in study.steps}


def rows_of(study: Study, folder: Path, seed: int) -> Iterator[tuple[Evaluation, str, Path, Spec]]:
    """Yield every row of a seed: its evaluation, its label, the file of its run and the specification."""
    places = places_of(study, folder, seed)
    for evaluation in study.evaluations:
        for label, row in evaluation.rows.items():
            path = folder / "runs" / file_name(evaluation.name) / file_name(label) / f"seed-{seed}.json"
            yield evaluation, label, path, Spec.of(filled(row, places))


def recipe_of(one: Step, places: Mapping[str, str]) -> Recipe:
    """Return a training's recipe for a seed; what it does not say is the learner's default."""
    defaults = {"data": "creatures?split=train", "model": find(one.kind, LEARNERS, "learners").model}
    return Recipe.of({**defaults, **filled(one.table, places)})


def taken(one: Step, places: Mapping[str, str], target: Path, tell: Told) -> None:
    """Take a step, unless what it makes is there: train, or write labels and wait for those of other processes."""
    what = f"{one.name}, seed {places['seed']}"
    if one.kind == SEGMENT:
        asked = Segmenting.of(filled(one.table, places))
        segment(asked, target, report=lambda done, count, note: tell(what, done, count, note))
        while not (target / MANIFEST).exists():
            tell(what, 1, 1, "waits for other processes")
            time.sleep(1)
        return
    recipe = recipe_of(one, places)
    claim(one.kind, recipe, target.parent)
    if target.exists() and target.with_suffix(".json").exists():
        return

    def report(at: Progress) -> None:
        tell(what, at.done, at.total, at.note)

    learn(one.kind, recipe, target.parent, fresh=False, report=report)


def evaluated(spec: Spec, path: Path, label: str, tell: Told) -> Run:
    """Return a new run of a specification, written into its file."""
    waiting = path.with_name(f"{path.stem}-pieces")
    made = run(
        spec,
        pieces=waiting,
        report=lambda done, count, note: tell(f"{label}, {path.stem}", done, count, note),
    )
    if first():
        made.write(path)
        forget(waiting)
    return made


@dataclass(frozen=True)
class Number:
    """A metric over the seeds: mean, standard deviation (None of one seed), direction and the single values.

    A seed whose value is NaN counts in neither; without any that counts the mean is NaN.
    """

    mean: float
    deviation: float | None
    higher_is_better: bool | None
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many seeds count."""
        return len(counted(self.values))


def numbers(runs: Sequence[Run]) -> dict[str, Number]:
    """Return every metric of the runs of one row, one run a seed.

    A metric goes by its name alone where the row has it once, and else by the settings that tell it from the others.
    """
    columns = list(zip(*(one.scores.scores for one in runs), strict=True))
    names = titles([column[0].metric for column in columns])
    return {name: number(column) for name, column in zip(names, columns, strict=True)}


def number(column: Sequence[Score]) -> Number:
    """Return mean and deviation of one metric over the seeds that count."""
    values = tuple(score.value for score in column)
    known = counted(values)
    mean, spread = fmean(known) if known else math.nan, len(known) > 1 and all(map(math.isfinite, known))
    return Number(mean, stdev(known) if spread else None, column[0].higher_is_better, values)


def counted(values: Iterable[float]) -> list[float]:
    """Return the values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def parted(metrics: Iterable[Choice]) -> list[Choice]:
    """Return metrics, and of each protocol its parts, as scores are named."""
    return [
        replace(one, name=f"{one.name}.{part}") if part else one
        for one in metrics
        for part in (PROTOCOLS[one.name].parts if one.name in PROTOCOLS else ("",))
    ]


def titles(metrics: Sequence[Choice]) -> list[str]:
    """Return the names of metrics, with those settings that tell them from others of the same name."""
    return [str(replace(one, settings=telling(one, metrics))) for one in metrics]


def telling(metric: Choice, among: Sequence[Choice]) -> dict[str, Any]:
    """Return the settings of a metric that not all of its name share."""
    same = [other.settings for other in among if other.name == metric.name]
    listed = sorted(metric.settings.items())
    return {key: value for key, value in listed if any(other.get(key) != value for other in same)}


def markdown(study: Study, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """Write a table an evaluation: rows down, metrics across, mean ± standard deviation over the seeds."""
    parts = [f"# {study.title}", over(runs)]
    for one in study.evaluations:
        head, rows = laid(one, runs[one.name])
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        lines += [[f"**{text}**" if best else text for text, best in row] for row in rows]
        drawn = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
        parts += [f"## {one.name}", "\n".join(drawn)]
    return "\n\n".join(parts) + "\n"


def tex(study: Study, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """Write the same tables in LaTeX."""
    parts: list[str] = []
    for one in study.evaluations:
        head, rows = laid(one, runs[one.name])
        texts = [[(latex.escaped(text), best) for text, best in row] for row in rows]
        cells = [[latex.bold(text) if best else text for text, best in row] for row in texts]
        parts.append(latex.table(f"{study.title}: {one.name}. {over(runs)}", head, [cells]))
    return "\n".join(parts)


def over(runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """Say over how many seeds the numbers are."""
    count = max((len(one) for rows in runs.values() for one in rows.values()), default=0)
    return f"Mean ± standard deviation over {count} seeds." if count > 1 else "One seed." if count else "Trainings."


def laid(one: Evaluation, made: Mapping[str, Sequence[Run]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return the head and the rows of an evaluation, and whether a cell has the best mean of its column."""
    rows = {label: numbers(found) for label, found in made.items() if found}
    metrics = one.metrics(rows.values())
    directions = {metric: row[metric].higher_is_better for row in rows.values() for metric in row}
    arrows: Mapping[bool | None, str] = {True: " ↑", False: " ↓", None: ""}
    winners = {metric: winner([row[metric] for row in rows.values() if metric in row]) for metric in metrics}
    head = ["", *(f"{metric}{arrows[directions[metric]]}" for metric in metrics)]
    return head, [
        [(label, False), *(shown(row.get(metric), winners[metric]) for metric in metrics)]
        for label, row in rows.items()
    ]


def winner(column: Sequence[Number]) -> Number | None:
    """Return the best of several numbers of a column; None where neither direction is better. NaN is no number."""
    way, known = column[0].higher_is_better, [one for one in column if one.count]
    if way is None or len(known) < 2:
        return None
    return max(known, key=lambda one: one.mean if way else -one.mean)


def shown(number: Number | None, best: Number | None) -> tuple[str, bool]:
    """Write mean ± deviation, of how many seeds unless of all, nothing where there is no number; tell the best.

    Means that are equal but for rounding are equally good, and a deviation that is rounding is 0.
    """
    if number is None:
        return "", False
    text = f"{number.mean:.4g}"
    if number.deviation is not None:
        text += f" ± {number.deviation if number.deviation > ROUNDING * abs(number.mean) else 0:.2g}"
    some = 0 < number.count < len(number.values)
    equal = best is not None and math.isclose(number.mean, best.mean, rel_tol=ROUNDING)
    return f"{text} ({number.count} of {len(number.values)} seeds)" if some else text, equal


def record(study: Study, runs: Mapping[str, Mapping[str, Sequence[Run]]], out: Path | str) -> Path:
    """Write table.md, table.tex, numbers.json and the curves; return table.md.

    numbers.json has the value of every seed (null where it is NaN, which counts in no mean) and the specification of
    its run. The runs themselves, with all that determines them, lie below it.
    """
    folder, rows = Path(out), {name: dict(one) for name, one in runs.items()}
    plain = {
        name: {
            label: {
                "specs": [run.spec.plain() for run in made],
                "versions": made[0].provenance,
                "metrics": {metric: list(number.values) for metric, number in numbers(made).items()},
            }
            for label, made in row.items()
            if made
        }
        for name, row in rows.items()
    }
    table = strict({"title": study.title, "evaluations": plain})
    text = json.dumps(table, indent=1, sort_keys=True, default=str) + "\n"
    write_text(folder / "numbers.json", text)
    for one in study.evaluations:
        found = {label: numbers(made) for label, made in runs[one.name].items() if made}
        if one.sweep is not None and found:
            drawn = curves(panels(one.sweep, one.metrics(found.values()), found), one.sweep.axis)
            write_bytes(folder / f"{file_name(one.name)}.png", png(drawn))
    write_text(folder / "table.tex", tex(study, runs))
    return write_text(folder / "table.md", markdown(study, runs))


def panels(
    sweep: Sweep, metrics: Sequence[str], found: Mapping[str, Mapping[str, Number]]
) -> dict[str, dict[str, Curve]]:
    """Return the curves of each metric: mean and deviation over the seeds at every value that is done."""
    drawn = {metric: {row: curve(metric, points, found) for row, points in sweep.curves.items()} for metric in metrics}
    return {metric: {row: one for row, one in rows.items() if one.x} for metric, rows in drawn.items()}


def curve(metric: str, points: Sequence[tuple[float, str]], found: Mapping[str, Mapping[str, Number]]) -> Curve:
    """Return one row's curve of one metric."""
    known = [(x, found[label][metric]) for x, label in points if metric in found.get(label, {})]
    known = [(x, one) for x, one in known if one.count]
    spread = tuple(one.deviation or 0.0 for _, one in known)
    return Curve(tuple(x for x, _ in known), tuple(one.mean for _, one in known), spread)
