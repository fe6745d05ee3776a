"""`sightline evaluate`: from methods and data to numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sightline.cli._options import ACCELERATOR, SETTING

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from sightline.running import Scene
    from sightline.runs import Run, Spec
    from sightline.table import Cell, Table

METRICS = ("average_drop", "average_increase", "average_gain", "insertion", "deletion")


@click.command("evaluate", short_help="Score methods on a data set.")
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="[SPEC.toml]")
@click.option("--model", help="A model (see `sightline list models`).")
@click.option("--data", help="A data set, with its settings: creatures?split=test, folder?root=pictures.")
@click.option("--method", multiple=True, help="A method, or all; repeatable.")
@click.option("--maps", multiple=True, metavar="DIR", help="A folder of maps that another tool wrote; repeatable.")
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Write every map here, as DIR/METHOD/ID.npy."
)
@click.option("--metric", multiple=True, help="A metric, with its settings: insertion?steps=32; repeatable.")
@click.option("--explain", help="Whose map: scored, label, predicted, second or least.")
@click.option("--layer", help="The layer to explain, by its dotted name.")
@click.option("--fast", help="Ask the classifier faster: exact (the same numbers) or bf16 (half precision).")
@click.option("--images", type=click.IntRange(min=0), help="How many images, from the first; 0 means all.")
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@click.option("--seed", type=int, help="Seed of methods and metrics that draw.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Output folder.")
@click.option("--again", is_flag=True, help="Repeat runs that the output folder already holds.")
@ACCELERATOR
@SETTING
def command(
    spec: Path | None,
    method: tuple[str, ...],
    maps: tuple[str, ...],
    keep: Path | None,
    metric: tuple[str, ...],
    out: Path,
    again: bool,
    accelerator: str,
    **rest: Any,
) -> None:
    """Explain and score a data set with one or more methods, as SPEC.toml or the options say (options win).

    Writes a run a method (METHOD.json, with every argument, version and number), their pictures, and table.csv, .md
    and .tex. SPEC.toml may list several models, trained with several seeds, say: each gets a folder, and the table
    shows means and standard deviations over them. Its [[scene]] tables are several data sets, a folder each. A run that
    the output folder already holds for the same specification is kept, and so are the pieces of one that was stopped,
    even killed: the same command goes on where it was.

    Under `torchrun --nproc-per-node N -m sightline evaluate ...` N processes share the images, with the same numbers.

    --maps scores maps in files (DIR/IMAGE.npy, .npz or .png; settings as in DIR?form=irn&resize=crop) like a method;
    --model none goes with it where no metric asks the classifier.
    """
    from rich.console import Console

    from sightline import table
    from sightline.processes import fabric_of
    from sightline.running import named, scene
    from sightline.runs import write_text

    listed = (*method, *(f"maps?root={folder.replace('?', '&', 1)}" for folder in maps))
    specs = specifications(spec, listed, metric, rest)
    for checked in specs:
        named(checked)
    homes = places(specs, out)
    fabric = fabric_of(accelerator)
    opened = lru_cache(1)(lambda place: scene(specs[homes.index(place)], fabric=fabric))
    made = [
        run_of(
            one,
            partial(opened, home),
            home,
            keep=kept(keep, home, out),
            fabric=fabric,
            again=again,
            lenient="all" in method,
            place=f"{i}/{len(specs)}",
        )
        for i, (one, home) in enumerate(zip(specs, homes, strict=True), 1)
    ]
    if not fabric.is_global_zero:
        return
    runs = [one for one in made if one is not None]
    drawn = tabled(runs)
    write_text(out / "table.csv", table.csv(runs))
    write_text(out / "table.md", table.markdown(drawn))
    write_text(out / "table.tex", table.latex(drawn))
    console = Console()
    for one in drawn:
        console.print(shown(one))
        console.print(f"{table.summary(one)}\n")
    click.echo(f"runs and table.csv, .md and .tex are in {out}; `sightline report {out}` makes the page")


def conditions(spec: "Spec") -> str:
    """Return what specifications share that differ in model and method alone, as text."""
    table = spec.plain()
    return repr({key: table[key] for key in sorted(table) if key not in ("model", "method")})


def places(specs: "Sequence[Spec]", out: Path) -> list[Path]:
    """Return the folder of each specification: one a data set where there are several, in it one a model."""
    from sightline.runs import file_name

    groups: dict[str, dict[str, None]] = {}
    for spec in specs:
        groups.setdefault(conditions(spec), {})[str(spec.model)] = None
    names = [next(spec.data.name for spec in specs if conditions(spec) == group) for group in groups]
    folders = [
        name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]
    homes = {
        group: out / file_name(folder) if len(groups) > 1 else out
        for group, folder in zip(groups, folders, strict=True)
    }

    def place(spec: "Spec") -> Path:
        group = conditions(spec)
        models = list(groups[group])
        return homes[group] / f"model-{models.index(str(spec.model)) + 1}" if len(models) > 1 else homes[group]

    return [place(spec) for spec in specs]


def kept(keep: Path | None, home: Path, out: Path) -> Path | None:
    """Return where the maps of a folder's runs go."""
    return None if keep is None else keep / home.relative_to(out)


def tabled(runs: "Sequence[Run]") -> "list[Table]":
    """Return a table of each data set; of several models with the same methods the mean, else a table each."""
    from sightline import table

    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(conditions(one.spec), []).append(one)
    drawn: list[Table] = []
    for group in groups.values():
        methods: dict[str, set[str]] = {}
        for one in group:
            methods.setdefault(str(one.spec.model), set()).add(str(one.spec.method))
        many = len(methods) > 1 and len({frozenset(names) for names in methods.values()}) == 1
        drawn += [table.across(group)] if many else table.tables(group)
    return drawn


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
        listed = [replace(one, method=other) for one in specs for other in chosen] if chosen else specs
        made = [Spec.of({**plain(one), **said}) for one in listed]
        return list({repr(one.plain()): one for one in made}.values())
    metrics, creatures = tuple(map(Choice, METRICS)), Choice("creatures")
    table = {"model": creatures, "data": creatures, "metrics": metrics, **said}
    return [Spec.of({**table, "method": one}) for one in methods(method or ("grad_cam",), settings)]


def plain(spec: "Spec") -> dict[str, Any]:
    """Return a specification as a table of objects."""
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def run_of(
    spec: "Spec",
    opened: "Callable[[], Scene]",
    out: Path,
    *,
    keep: Path | None,
    fabric: "Fabric",
    again: bool,
    lenient: bool,
    place: str,
) -> "Run | None":
    """Return the run of a specification: the one in the output folder, or a new one, written there.

    None, if lenient, where the network does not suit the method; that is said. The first process alone writes and says.
    """
    from sightline.classifier import UnsuitedError
    from sightline.cli._options import bar
    from sightline.pieces import forget
    from sightline.running import finished, run
    from sightline.runs import file_name

    path = out / f"{file_name(str(spec.method))}.json"

    def echo(text: str) -> None:
        if fabric.is_global_zero:
            click.echo(text, err=True)

    kept = None if again else finished(spec, path)
    waiting = out / f"{file_name(str(spec.method))}-pieces"
    if kept is not None:
        echo(f"kept {path}")
        forget(waiting)
        return kept
    try:
        with bar() as progress:
            task = progress.add_task(f"{place} {spec.method}", total=None, note="")
            made = run(
                spec,
                on=opened(),
                folder=out / f"{file_name(str(spec.method))}-pictures",
                keep=None if keep is None else keep / file_name(str(spec.method)),
                pieces=waiting,
                fabric=fabric,
                report=lambda done, count, note: progress.update(task, completed=done, total=count, note=note),
            )
    except UnsuitedError as error:
        if not lenient:
            raise
        echo(f"skipped {spec.method}: {error}")
        return None
    for file, reason in made.skipped.items():
        echo(f"skipped {file}: {reason}")
    if fabric.is_global_zero:
        made.write(path)
        forget(waiting)
    return made


def shown(table: "Table") -> object:
    """Return a rich table: best values bold, controls below a line, or behind it where metrics stand in rows."""
    from rich.table import Table as Drawn

    drawn = Drawn(title=table.heading, title_justify="left")
    rows = [*table.methods, *table.controls]
    texts = [[written(cell, table) for cell in row.cells] + [row.seconds] for row in rows]
    titles = [*(column.title for column in table.columns), "s/image"]
    first, across = ("metric", [row.label for row in rows]) if table.wide else ("method", titles)
    drawn.add_column(first, style="cyan", overflow="fold")
    for title in across:
        drawn.add_column(title, justify="right", overflow="fold")
    if table.wide:
        for title, numbers in zip(titles, zip(*texts, strict=True), strict=True):
            drawn.add_row(title, *numbers)
        return drawn
    for index, (row, cells) in enumerate(zip(rows, texts, strict=True), 1):
        drawn.add_row(row.label, *cells, end_section=index == len(table.methods))
    return drawn


def written(cell: "Cell", table: "Table") -> str:
    """Return a number as the terminal shows it."""
    text = f"{cell.text} ± {cell.half_width}" if table.models and cell.half_width else cell.text
    return f"[bold green]{text}[/]" if cell.best else text
