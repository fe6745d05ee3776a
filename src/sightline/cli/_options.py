"""Options. What several sub-commands read in the same way, and the bars they draw."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from sightline.runs import Choice

SETTING = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the method; repeat for more."
)

ACCELERATOR = click.option(
    "--accelerator",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the network runs: auto is a GPU where there is one.",
)


def pairs(settings: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` options.

    Raises:
        ValueError: no equals sign.
    """
    from sightline.runs import read_value

    split = [setting.partition("=") for setting in settings]
    if wrong := [setting for setting, (key, equals, _) in zip(settings, split, strict=True) if not (key and equals)]:
        raise ValueError(f"expected --set key=value, got {wrong[0]!r}")
    return {key: read_value(value) for key, _, value in split}


def methods(names: Sequence[str], settings: Sequence[str]) -> "list[Choice]":
    """Read method options; `all` stands for every method of ours."""
    from sightline.methods import METHODS
    from sightline.runs import Choice

    listed = [one for name in names for one in (METHODS if name == "all" else [name])]
    chosen = [Choice.parse(one) for one in listed]
    return [Choice(one.name, {**one.settings, **pairs(settings)}) for one in chosen]


def bar() -> "Progress":
    """Return the first process's progress bar on standard error, with count and time left; it is gone at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sightline.processes import first

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note, console = TextColumn("{task.fields[note]}"), Console(stderr=True)
    return Progress(*columns, note, console=console, transient=True, disable=not first())
