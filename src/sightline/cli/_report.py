"""`sightline report`: from runs to one page."""

from pathlib import Path

import click


@click.command("report", short_help="Write runs as one self-contained HTML page.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page."
)
@click.option("--title", default=None, help="Its title.")
def command(runs: tuple[Path, ...], out: Path, title: str | None) -> None:
    """Write one HTML page from RUN files or folders of them: table, curves, pictures, extremes, provenance."""
    from sightline.report import TITLE, write

    files = [file for path in runs for file in (files_of(path) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no run in {', '.join(map(str, runs))}; `sightline evaluate` writes them")
    click.echo(write(files, out, title=title or TITLE))


def files_of(folder: Path) -> list[Path]:
    """Return the runs of a folder, and those below it that `sightline evaluate` wrote: of data sets and of models."""
    deeper = (
        ("model-*/*.json", "*/*.json", "*/model-*/*.json") if (folder / "table.md").exists() else ("model-*/*.json",)
    )
    return sorted({*folder.glob("*.json"), *(file for pattern in deeper for file in folder.glob(pattern))})
