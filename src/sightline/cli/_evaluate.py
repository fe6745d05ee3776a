"""`sightline evaluate`: from methods and data to numbers."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sightline.cli._options import SETTING

if TYPE_CHECKING:
    from sightline.running import Scene
    from sightline.runs import Run, Spec

METRICS = ("average_drop", "average_increase", "average_gain", "insertion", "deletion")


@click.command("evaluate", short_help="Score methods on a data set.")
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="[SPEC.toml]")
@click.option("--model", help="A model (see `sightline list models`).")
@click.option("--data", help="A data set, with its settings: creatures?split=test, folder?root=pictures.")
@click.option("--method", multiple=True, help="A method, or all; repeatable.")
@click.option("--metric", multiple=True, help="A metric, with its settings: insertion?steps=32; repeatable.")
@click.option("--explain", help="Whose map: scored, label, predicted, second or least.")
@click.option("--layer", help="The layer to explain, by its dotted name.")
@click.option("--images", type=click.IntRange(min=0), help="How many images, from the first; 0 means all.")
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@click.option("--seed", type=int, help="Seed of methods and metrics that draw.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Output folder.")
@click.option("--again", is_flag=True, help="Repeat runs that the output folder already holds.")
@SETTING
def command(
    spec: Path | None, method: tuple[str, ...], metric: tuple[str, ...], out: Path, again: bool, **rest: Any
) -> None:
    """Explain and score a data set with one or more methods, as SPEC.toml or the options say (options win).

    Writes a run a method (METHOD.json, with every argument, version and number), their pictures, table.csv and
    table.md. SPEC.toml may list several models, trained with several seeds, say: each gets a folder, and the table
    shows means and standard deviations over them. A run that the output folder already holds for the same
    specification is kept, so that a stopped command goes on where it was.
    """
    from rich.console import Console

    from sightline import table
    from sightline.running import named, scene
    from sightline.runs import write_text

    specs = specifications(spec, method, metric, rest)
    for checked in specs:
        named(checked)
    models = list(dict.fromkeys(str(one.model) for one in specs))
    folders = {model: out / f"model-{i}" if len(models) > 1 else out for i, model in enumerate(models, 1)}
    opened = lru_cache(1)(lambda model: scene(next(one for one in specs if str(one.model) == model)))
    made = [
        finished(
            one, partial(opened, str(one.model)), folders[str(one.model)], again, "all" in method, f"{i}/{len(specs)}"
        )
        for i, one in enumerate(specs, 1)
    ]
    runs = [one for one in made if one is not None]
    drawn = table.tables(runs) if len(models) == 1 else (table.across(runs),)
    write_text(out / "table.csv", table.csv(runs))
    write_text(out / "table.md", table.markdown(drawn))
    console = Console()
    for one in drawn:
        console.print(shown(one))
        console.print(f"{table.summary(one)}\n")
    click.echo(f"runs, table.csv and table.md are in {out}; `sightline report {out}` makes the page")


def specifications(
    path: Path | None, method: tuple[str, ...], metric: tuple[str, ...], rest: dict[str, Any]
) -> "list[Spec]":
    """Return one specification a method, from the file and the options."""
    from sightline.cli._options import methods
    from sightline.runs import Choice, Spec, read_specs

    settings = rest.pop("settings")
    said = {key: value for key, value in rest.items() if value is not None}
    said |= {key: Choice.parse(said[key]) for key in ("model", "data") if key in said}
    if metric:
        said["metrics"] = tuple(map(Choice.parse, metric))
    if path is not None:
        specs = list(read_specs(path))
        chosen = methods(method, settings)
        if settings and not method:
            raise ValueError("--set needs --method: it belongs to the method")
        listed = [replace(specs[0], method=one) for one in chosen] if chosen else specs
        return [Spec.of({**plain(one), **said}) for one in listed]
    metrics, creatures = tuple(map(Choice, METRICS)), Choice("creatures")
    table = {"model": creatures, "data": creatures, "metrics": metrics, **said}
    return [Spec.of({**table, "method": one}) for one in methods(method or ("grad_cam",), settings)]


def plain(spec: "Spec") -> dict[str, Any]:
    """Return a specification as a table of objects."""
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def finished(
    spec: "Spec", opened: "Callable[[], Scene]", out: Path, again: bool, lenient: bool, place: str
) -> "Run | None":
    """Return the run of a specification: the one in the output folder, or a new one, written there.

    None, if lenient, where the network does not suit the method; that is said.
    """
    from sightline.classifier import UnsuitedError
    from sightline.cli._options import bar
    from sightline.running import run
    from sightline.runs import Run, file_name

    path = out / f"{file_name(str(spec.method))}.json"
    if path.exists() and not again:
        kept = Run.read(path)
        if kept.spec == spec:
            click.echo(f"kept {path}", err=True)
            return kept
    try:
        with bar() as progress:
            task = progress.add_task(f"{place} {spec.method}", total=None, note="")
            made = run(
                spec,
                on=opened(),
                folder=out / f"{file_name(str(spec.method))}-pictures",
                report=lambda done, count: progress.update(task, completed=done, total=count),
            )
    except UnsuitedError as error:
        if not lenient:
            raise
        click.echo(f"skipped {spec.method}: {error}", err=True)
        return None
    for file, reason in made.skipped.items():
        click.echo(f"skipped {file}: {reason}", err=True)
    made.write(path)
    return made


def shown(table: Any) -> object:
    """Return a rich table: best values bold, controls below a line."""
    from rich.table import Table

    drawn = Table(title=table.heading, title_justify="left")
    drawn.add_column("method", style="cyan", overflow="fold")
    for column in table.columns:
        drawn.add_column(f"{column.label} {column.arrow}", justify="right", overflow="fold")
    drawn.add_column("s/image", justify="right", overflow="fold")
    for group in (table.methods, table.controls):
        for row in group:
            texts = [f"{c.text} ± {c.half_width}" if table.models and c.half_width else c.text for c in row.cells]
            cells = [f"[bold green]{text}[/]" if c.best else text for c, text in zip(row.cells, texts, strict=True)]
            drawn.add_row(row.label, *cells, row.seconds)
        drawn.add_section()
    return drawn
