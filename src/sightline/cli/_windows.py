"""`sightline windows`: what the cells of a network see."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sightline.windows import Window


@click.command("windows", short_help="Measure which pixels each layer's cells see.")
@click.option("--model", default="creatures", show_default=True, help="A model (see `sightline list models`).")
@click.option("--layer", "layers", multiple=True, help="A layer, by its dotted name; repeatable. By default all.")
@click.option("--tries", type=click.IntRange(min=1), default=8, show_default=True, help="Images of noise to ask about.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
def command(model: str, layers: tuple[str, ...], tries: int, seed: int) -> None:
    """Measure the contribution windows of a network's layers: how many cells depend on the pixel in the middle of the
    image, and how many pixels the cell in the middle of the layer depends on (height x width).

    They are where exact gradients are not zero: at least as large as shown, and more --tries find all of it. By formula
    is how many pixels a cell sees at most behind convolutions and poolings, the border of the image apart; "-" behind
    what sees all, such as attention.
    """
    from rich.console import Console

    from sightline.cli._list import table
    from sightline.models import load
    from sightline.windows import measured_windows

    found = measured_windows(load(model), layers=layers or None, seed=seed, tries=tries)
    titles = ["name", "cells", "a pixel reaches, cells", "a cell sees, pixels", "by formula", "of the image"]
    h, w = found[0].size
    Console().print(table(f"{model}, {h} x {w} pixels", titles, [row(one) for one in found]))


def row(one: "Window") -> list[str]:
    """Return one layer's line of the table."""
    pairs = [
        "-" if pair is None else f"{pair[0]} x {pair[1]}" for pair in (one.grid, one.cells, one.pixels, one.formula)
    ]
    return [one.layer, *pairs, "whole" if one.whole else f"{one.share:.1f} %"]
