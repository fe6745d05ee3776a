"""`sightline list`: what there is."""

from collections.abc import Sequence

import click

KINDS = ("methods", "combinators", "metrics", "protocols", "models", "datasets")

BETTER = {True: "higher", False: "lower", None: ""}


@click.command("list", short_help="Show methods, metrics, models, data sets and more.")
@click.argument("kind", type=click.Choice(KINDS), required=False)
def command(kind: str | None) -> None:
    """Show every method, combinator of methods, metric, protocol, model and data set, or one KIND of them."""
    from rich.console import Console

    console = Console()
    for one in [kind] if kind else KINDS:
        headings, rows = TABLES[one]()
        console.print(table(one, headings, rows))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    """Return a rich table."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in headings:
        shown.add_column(heading, no_wrap=heading == "name", style="cyan" if heading == "name" else "")
    for row in rows:
        shown.add_row(*row)
    return shown


def methods() -> tuple[list[str], list[list[str]]]:
    """Return the table of methods."""
    from sightline.methods import METHODS

    rows = [[name, e.summary, e.paper, ", ".join(e.needs) or "nothing", e.cost] for name, e in METHODS.items()]
    return ["name", "what it shows", "paper", "needs", "cost an image"], rows


def combinators() -> tuple[list[str], list[list[str]]]:
    """Return the table of combinators."""
    from sightline.methods import COMBINATORS

    rows = [
        [name, e.summary, e.paper, f"{e.takes} in parentheses" + "".join(f", {one}=" for one in e.needs), e.cost]
        for name, e in COMBINATORS.items()
    ]
    return ["name", "what it gives", "paper", "needs", "cost an image"], rows


def metrics() -> tuple[list[str], list[list[str]]]:
    """Return the table of metrics."""
    from sightline.metrics import METRICS

    rows = [[name, e.summary, e.paper, BETTER[e.higher_is_better], e.unit] for name, e in METRICS.items()]
    return ["name", "what it measures", "paper", "better", "unit"], rows


def protocols() -> tuple[list[str], list[list[str]]]:
    """Return the table of protocols."""
    from sightline.protocols import PROTOCOLS

    rows = [
        [name, e.summary, e.paper, ", ".join(f"{one}=" for one in e.needs), ", ".join(e.parts)]
        for name, e in PROTOCOLS.items()
    ]
    return ["name", "what it measures", "paper", "needs", "numbers"], rows


def models() -> tuple[list[str], list[list[str]]]:
    """Return the table of models."""
    from sightline.models import FORMS, MODELS

    return ["name", "what it is"], [*([n, e.summary] for n, e in MODELS.items()), *([n, s] for n, s in FORMS.items())]


def datasets() -> tuple[list[str], list[list[str]]]:
    """Return the table of data sets."""
    from sightline.datasets import DATASETS

    rows = [[name, e.summary, e.licence, "root=FOLDER" if e.needs_root else ""] for name, e in DATASETS.items()]
    return ["name", "what it holds", "licence", "needs"], rows


TABLES = {
    "methods": methods,
    "combinators": combinators,
    "metrics": metrics,
    "protocols": protocols,
    "models": models,
    "datasets": datasets,
}
