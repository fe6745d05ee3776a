"""`sightline train`: from images to a classifier, or to an explainer that is learned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sightline.training import Progress

PATH = click.Path(path_type=Path)


def options(model: str, select: str) -> tuple[Callable[[Any], Any], ...]:
    """Return what every training is told; which network it may start from, and what is measured."""
    return (
        click.option("--data", help="What to learn from.  [default: creatures?split=train]"),
        click.option("--model", help=f"The network to start from: {model}"),
        click.option("--test", help="What to measure on after the training: creatures?split=test."),
        click.option("--epochs", type=click.IntRange(min=1), help="Passes over the images, or over their fraction."),
        click.option("--seed", type=int, help="Seed of weights, order, augmentation and draws.  [default: 0]"),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting: lr, batch, augment ..."),
        click.option("--trials", type=click.IntRange(min=0), help="Try so many learning rates (WSOL protocol: 30)."),
        click.option("--val", help="What the trials are compared on: creatures?split=val."),
        click.option("--select", help=f"Measured by what: {select}"),
        click.option("--half", is_flag=True, default=None, help="Store the weights in 16 bits."),
        click.option(
            "--track", type=click.Choice(["csv", "tensorboard"]), help="Keep every step's metrics in OUT/logs."
        ),
        click.option("--spec", type=PATH, help="A recipe (TOML) with all of this; options given here win over it."),
        click.option("--copy", type=PATH, help="Write the recipe with all its settings there, and stop."),
        click.option("--out", type=PATH, help="Folder of checkpoint and result."),
    )


def trains(*, model: str, select: str) -> Callable[[Callable[[], None]], click.Command]:
    """Make a sub-command that trains what the function is called; its docstring is the help."""

    def decorate(described: Callable[[], None]) -> click.Command:
        def run(**given: Any) -> None:
            trained(described.__name__, **given)

        run.__doc__ = described.__doc__
        for option in reversed(options(model, select)):
            run = option(run)
        return command.command(described.__name__)(run)

    return decorate


@click.group("train", short_help="Train a classifier, or an explainer that is learned.")
def command() -> None:
    """Train a network, from named data and settings or from a recipe.

    A training goes on from the checkpoint in its folder, whatever stopped it, and gives the same weights as one that
    was never stopped. Several processes: torchrun --nproc-per-node N -m sightline train ...
    """


@trains(
    model="mini_resnet, torchvision:resnet50, FILE.safetensors.  [default: mini_resnet]",
    select="accuracy, mean_average_precision, or a metric of Grad-CAM's maps.  [default: accuracy]",
)
def classifier() -> None:
    """Train a classifier and write classifier.safetensors with its manifest into the output folder.

    The network gets as many classes as the data has.
    """


@trains(
    model="a classifier, FILE.safetensors.  [default: creatures]",
    select="a metric or protocol of the masks.  [default: area?of=raw]",
)
def casm() -> None:
    """Train CASM's mask network against a pool of classifiers, and write casm.safetensors.

    The pool starts with the model (default: the embedded classifier of creatures). Use the file as a method:
    sightline explain PHOTO --method OUT/casm.safetensors
    """


@trains(
    model="a classifier, FILE.safetensors.  [default: creatures]",
    select="accuracy, mean_average_precision, or a metric of the attribution maps.  [default: accuracy]",
)
def calm() -> None:
    """Train CALM on the body of a trained classifier, and write calm.safetensors.

    Use the file as a model, with the methods whose names begin with calm_: sightline explain PHOTO --model
    OUT/calm.safetensors --method calm_attribution
    """


@trains(
    model="mini_seg, lraspp, mini_seg?weights=CLASSIFIER, FILE.safetensors.  [default: mini_seg]",
    select="a protocol of the maps.  [default: segmentation?compete=all&normalize=none&threshold=0.0]",
)
def segmenter() -> None:
    """Train a segmenter on masks, or on pseudo labels (--set labels=DIR), and write segmenter.safetensors.

    DIR is what `sightline segment` writes. Use the file as a model, or beside another one as a method:
    sightline explain PHOTO --method OUT/segmenter.safetensors
    """


def trained(
    kind: str,
    *,
    spec: Path | None,
    copy: Path | None,
    out: Path | None,
    track: str | None,
    epochs: int | None,
    settings: tuple[str, ...],
    **given: Any,
) -> None:
    """Train one kind of thing."""
    from sightline.cli._options import pairs
    from sightline.learning import LEARNERS, complete, learn
    from sightline.processes import first
    from sightline.recipes import Recipe
    from sightline.runs import Choice

    recipe = Recipe(Choice.parse("creatures?split=train"), Choice.parse(LEARNERS[kind].model))
    recipe = recipe if spec is None else Recipe.read(spec, data=recipe.data, model=recipe.model)
    chosen = {name: Choice.parse(given.pop(name)) for name in ("data", "model", "test", "val") if given[name]}
    steps = {} if epochs is None else {"epochs": epochs}
    recipe = recipe.changed(**{**given, **chosen}, settings={**pairs(settings), **steps})
    if copy is not None:
        click.echo(f"wrote {recipe.write(copy, f'sightline train {kind}', complete(kind, recipe))}")
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.", click.get_current_context())
    with reported(out, track) as report:
        path = learn(kind, recipe, out, report=report)
    if first():
        tell(path)


def tell(path: Path) -> None:
    """Say what came out of a training."""
    import json

    extra = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["extra"]
    for file, reason in extra["skipped"].items():
        click.echo(f"skipped {file}: {reason}", err=True)
    for name, value in extra.get("test", {}).items():
        if name != "data":
            shown = f"{value:.2%}" if name in ("accuracy", "mean_average_precision") else f"{value:.4g}"
            click.echo(f"{name} {shown} on {extra['test']['data']}")
    manifest = path.with_suffix(".json").read_text(encoding="utf-8")
    name = f"{path}?code=run" if '"python:' in manifest else str(path)
    click.echo(f"{path}: use it as --{'model' if path.stem in ('classifier', 'calm') else 'method'} {name}")


@contextmanager
def reported(out: Path, track: str | None) -> "Iterator[Callable[[Progress], None]]":
    """Draw a training, and log the metrics of its steps, while inside."""
    from sightline.cli._options import bar
    from sightline.training import logged

    with bar() as progress, logged(out / "logs", track) as write:
        task = progress.add_task("training", total=None, note="")

        def report(at: "Progress") -> None:
            shown = f"epoch {at.epoch + 1}/{at.epochs}"
            progress.update(task, completed=at.done, total=at.total, description=shown, note=at.note)
            write(at)

        yield report
