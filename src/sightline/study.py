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
recipe, a row a specification; what a row does not say is its evaluation's. Everything finished is kept: a study that
was killed goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sightline.learning import LEARNERS, claim, configured, learn
from sightline.recipes import Recipe
from sightline.registry import find, unknown
from sightline.running import finished, named, run
from sightline.runs import Run, Spec, file_name, read_toml, write_text
from sightline.training import Progress

TRAINING = "train"

Told = Callable[[str, int, int, str], None]
"""Told what is at work, how much of how much is done, and a note."""


@dataclass(frozen=True)
class Training:
    """A recipe with places to fill: `{seed}` and the names of trainings before it."""

    name: str
    kind: str
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Specifications with places to fill, one a row."""

    name: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Study:
    """Trainings, evaluations and the seeds with which each is done."""

    title: str
    seeds: tuple[int, ...]
    trainings: tuple[Training, ...]
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
        known = ("title", "seeds", "train", "evaluate")
        for name in table:
            if name not in known:
                raise LookupError(unknown(name, known, "entry of a study"))
        trainings = tuple(training(one) for one in table.get("train", ()))
        evaluations = tuple(evaluation(one) for one in table.get("evaluate", ()))
        names = [*(one.name for one in trainings), *(one.name for one in evaluations)]
        if "seed" in names:
            raise ValueError(f"{path} calls a training or an evaluation 'seed', which stands for the seed; rename it")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} has {twice[0]!r} twice; give trainings and evaluations names of their own")
        seeds = tuple(table.get("seeds", (0,)))
        if not seeds or not names or not all(type(seed) is int for seed in seeds) or len({*seeds}) < len(seeds):
            raise ValueError(f"{path} needs different whole numbers as seeds and one or more [[train]] or [[evaluate]]")
        study = cls(str(table.get("title", Path(path).stem)), seeds, trainings, evaluations)
        study.check()
        return study

    def check(self) -> None:
        """Read every recipe and specification once, with paths that need not exist yet.

        Raises:
            LookupError, TypeError, ValueError: one that does not fit.
        """
        places = {"seed": str(self.seeds[0])}
        for one in self.trainings:
            configured(one.kind, recipe_of(one, places))
            places[one.name] = f"{one.name}.safetensors"
        for evaluation in self.evaluations:
            for row in evaluation.rows.values():
                named(Spec.of(filled(row, places)))


def training(table: Mapping[str, Any]) -> Training:
    """Read a [[train]] table.

    Raises:
        ValueError: without a name or a kind.
    """
    if missing := [name for name in ("name", "kind") if not isinstance(table.get(name), str)]:
        raise ValueError(f"a [[train]] lacks {missing[0]} = ...; got {dict(table)}")
    rest = {key: value for key, value in table.items() if key not in ("name", "kind")}
    return Training(table["name"], table["kind"], {"seed": "{seed}", **rest})


def evaluation(table: Mapping[str, Any]) -> Evaluation:
    """Read an [[evaluate]] table; what a row does not say is that of the table.

    Raises:
        ValueError: without a name or rows.
    """
    rows = table.get("rows")
    if not isinstance(table.get("name"), str) or not isinstance(rows, Mapping) or not rows:
        raise ValueError(f"an [[evaluate]] needs a name and [evaluate.rows]; got {dict(table)}")
    shared = {"seed": "{seed}"} | {key: value for key, value in table.items() if key not in ("name", "rows")}
    return Evaluation(table["name"], {label: {**shared, **row} for label, row in rows.items()})


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

    Weights lie in OUT/train/NAME/seed-N, runs in OUT/runs/EVALUATION/ROW/seed-N.json. `seeds` are those to do now; runs
    of the others that are finished are returned, too. A run counts as finished if the specification and the weights
    that it names are the same.

    Raises:
        ValueError: seeds that the study does not have.
        Other errors as `learn` and `run`.
    """
    chosen, folder, tell = tuple(seeds or study.seeds), Path(out), told or (lambda *_: None)
    if strange := [seed for seed in chosen if seed not in study.seeds]:
        raise ValueError(f"the study has seeds {', '.join(map(str, study.seeds))}, got {strange[0]}")
    runs: dict[str, dict[str, list[Run]]] = {one.name: {row: [] for row in one.rows} for one in study.evaluations}
    for seed in study.seeds:
        places = {"seed": str(seed)}
        for one in study.trainings:
            home = folder / TRAINING / file_name(one.name) / f"seed-{seed}"
            places[one.name] = str(home / f"{one.kind}.safetensors")
            if seed in chosen:
                trained(one, places, home, tell)
        for evaluation, label, row in rows_of(study):
            path = folder / "runs" / file_name(evaluation.name) / file_name(label) / f"seed-{seed}.json"
            spec = Spec.of(filled(row, places))
            made = finished(spec, path)
            if made is None and seed in chosen:
                made = evaluated(spec, path, label, tell)
            runs[evaluation.name][label] += [] if made is None else [made]
    return runs


def rows_of(study: Study) -> Iterator[tuple[Evaluation, str, Mapping[str, Any]]]:
    """Yield every row with its evaluation."""
    for evaluation in study.evaluations:
        for label, row in evaluation.rows.items():
            yield evaluation, label, row


def recipe_of(one: Training, places: Mapping[str, str]) -> Recipe:
    """Return a training's recipe for a seed; what it does not say is the learner's default."""
    defaults = {"data": "creatures?split=train", "model": find(one.kind, LEARNERS, "learners").model}
    return Recipe.of({**defaults, **filled(one.table, places)})


def trained(one: Training, places: Mapping[str, str], home: Path, tell: Told) -> Path:
    """Return the weights of a training: those in its folder, if they are finished, or new ones."""
    recipe, target = recipe_of(one, places), Path(places[one.name])
    claim(one.kind, recipe, home)
    if target.exists() and target.with_suffix(".json").exists():
        return target

    def report(at: Progress) -> None:
        tell(f"{one.name}, seed {places['seed']}", at.done, at.total, at.note)

    return learn(one.kind, recipe, home, fresh=False, report=report)


def evaluated(spec: Spec, path: Path, label: str, tell: Told) -> Run:
    """Return a new run of a specification, written into its file."""
    made = run(spec, report=lambda done, count, note: tell(f"{label}, {path.stem}", done, count, note))
    made.write(path)
    return made


@dataclass(frozen=True)
class Number:
    """A metric over the seeds: mean, standard deviation (None of one seed), direction and the single values."""

    mean: float
    deviation: float | None
    higher_is_better: bool | None
    values: tuple[float, ...]


def numbers(runs: Sequence[Run]) -> dict[str, Number]:
    """Return every metric of the runs of one row, one run a seed.

    A metric goes by its name alone where the row has it once: rows may measure the same with settings of their own.
    """
    table: dict[str, Number] = {}
    names = [score.metric.name for score in runs[0].scores.scores]
    for score in runs[0].scores.scores:
        values = tuple(found.value for one in runs for found in one.scores.scores if found.metric == score.metric)
        deviation = stdev(values) if len(values) > 1 else None
        name = score.metric.name if names.count(score.metric.name) == 1 else str(score.metric)
        table[name] = Number(fmean(values), deviation, score.higher_is_better, values)
    return table


def markdown(study: Study, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """Write a table an evaluation: rows down, metrics across, mean ± standard deviation over the seeds."""
    count = max((len(one) for rows in runs.values() for one in rows.values()), default=0)
    over = f"Mean ± standard deviation over {count} seeds." if count > 1 else "One seed." if count else "Trainings."
    parts = [f"# {study.title}", over]
    for name, rows in runs.items():
        parts += [f"## {name}", table({label: numbers(one) for label, one in rows.items() if one})]
    return "\n\n".join(parts) + "\n"


def table(rows: Mapping[str, Mapping[str, Number]]) -> str:
    """Write one table in Markdown; the best mean of a column is bold."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    directions = {metric: row[metric].higher_is_better for row in rows.values() for metric in row}
    arrows: Mapping[bool | None, str] = {True: " ↑", False: " ↓", None: ""}
    lines = [["", *(f"{metric}{arrows[directions[metric]]}" for metric in metrics)], ["---", *["---:"] * len(metrics)]]
    winners = {metric: winner([row[metric] for row in rows.values() if metric in row]) for metric in metrics}
    for label, row in rows.items():
        cells = [shown(row[metric], best=row[metric] is winners[metric]) if metric in row else "" for metric in metrics]
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def winner(column: Sequence[Number]) -> Number | None:
    """Return the best number of a column of several; None where neither direction is better."""
    way = column[0].higher_is_better
    if way is None or len(column) < 2:
        return None
    return max(column, key=lambda one: one.mean if way else -one.mean)


def shown(number: Number, *, best: bool) -> str:
    """Write mean ± deviation."""
    text = f"{number.mean:.4g}" if number.deviation is None else f"{number.mean:.4g} ± {number.deviation:.2g}"
    return f"**{text}**" if best else text


def record(study: Study, runs: Mapping[str, Mapping[str, Sequence[Run]]], out: Path | str) -> Path:
    """Write table.md and numbers.json (every value and the specification of its run) into a folder; return the table.

    The runs themselves, with all that determines them, lie below it.
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
    text = json.dumps({"title": study.title, "evaluations": plain}, indent=1, sort_keys=True, default=str) + "\n"
    write_text(folder / "numbers.json", text)
    return write_text(folder / "table.md", markdown(study, runs))
