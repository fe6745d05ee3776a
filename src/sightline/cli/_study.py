"""`sightline study`: the trainings and evaluations of a table, over several seeds."""

from pathlib import Path

import click


@click.command("study", short_help="Train and evaluate over several seeds: one file, one table.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.toml")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of weights, runs and the table.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Do this seed alone; repeat for more.")
def command(file: Path, out: Path, seeds: tuple[int, ...]) -> None:
    """Do what is not finished of the trainings and evaluations of FILE.toml; write table.md and table.tex.

    The file says seeds, [[train]] recipes and [[evaluate]] specifications; `{seed}` and the names of trainings stand
    for what they gave. What was stopped goes on where it was.
    """
    from sightline.cli._options import bar
    from sightline.study import Study, conduct, record

    study = Study.read(file)
    with bar() as progress:
        task = progress.add_task(study.title, total=None, note="")

        def told(what: str, done: int, count: int, note: str) -> None:
            progress.update(task, description=what, completed=done, total=count, note=note)

        runs = conduct(study, out, seeds=seeds or None, told=told)
    table = record(study, runs, out)
    click.echo(table.read_text(encoding="utf-8"))
    click.echo(f"runs, numbers.json and table.md, .tex are in {out}")
