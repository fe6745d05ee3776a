"""`sightline train`: from images to a classifier."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from sightline.classifier import Classifier
    from sightline.data import Dataset
    from sightline.runs import Choice
    from sightline.training import Progress


@click.group("train", short_help="Train a classifier.")
def command() -> None:
    """Train a network."""


@command.command("classifier")
@click.option("--data", required=True, help="What to learn from: creatures?split=train, folder?root=train.")
@click.option("--test", default=None, help="What to measure the accuracy on, after the training.")
@click.option("--model", default="mini_resnet", show_default=True, help="mini_resnet, torchvision:resnet18, python:...")
@click.option("--epochs", type=click.IntRange(min=1), default=None, help="How often every image is seen.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, order and augmentation.")
@click.option("--half", is_flag=True, help="Store the weights in 16 bits.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of checkpoint and result.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting: lr, batch, schedule, freeze ..."
)
def classifier(
    data: str,
    test: str | None,
    model: str,
    epochs: int | None,
    seed: int,
    half: bool,
    out: Path,
    settings: tuple[str, ...],
) -> None:
    """Train a classifier and write classifier.safetensors with its manifest into the output folder.

    The network gets as many classes as the data has. The training goes on from the folder's checkpoint, whatever
    stopped it, and gives the same weights as one that was never stopped.
    """
    from sightline import models
    from sightline.classifier_training import ClassifierConfig, accuracy, train
    from sightline.cli._options import bar, pairs
    from sightline.runs import Choice
    from sightline.settings import bind
    from sightline.training import remember

    config = bind(ClassifierConfig, tuples({**pairs(settings), **({"epochs": epochs} if epochs else {})}))()
    learned = Choice.parse(data)
    built, dataset, stored = fitting(Choice.parse(model), learned, seed)
    with bar() as progress:
        history = train(built, remember(dataset), config, seed=seed, out=out, report=drawn(progress, config.epochs))
    extra: dict[str, Any] = {"data": learned.plain(), "images": len(dataset), "seed": seed}
    extra |= {"config": {name: getattr(config, name) for name in config.__dataclass_fields__}, "history": list(history)}
    target = models.save(built, out / "classifier.safetensors", model=stored, extra=extra, half=half)
    if test is not None:
        measured, unseen = models.load(str(target)), Choice.parse(test)
        extra["test"] = {"data": unseen.plain(), "accuracy": accuracy(measured, like(unseen, measured))}
        models.save(built, target, model=stored, extra=extra, half=half)
        click.echo(f"accuracy {extra['test']['accuracy']:.2%} on {test}")
    for file, reason in dataset.skipped.items():
        click.echo(f"skipped {file}: {reason}", err=True)
    click.echo(f"{target}: {len(dataset.classes)} classes; use it as --model {target}")


def tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Read `freeze=layer1,layer2` as names."""
    freeze = settings.get("freeze")
    return settings if freeze is None else {**settings, "freeze": tuple(str(freeze).split(","))}


def like(data: "Choice", built: "Classifier") -> "Dataset":
    """Return the data set in the classifier's size."""
    from sightline.running import reader_of

    return reader_of(data, built)()


def fitting(model: "Choice", data: "Choice", seed: int) -> "tuple[Classifier, Dataset, Choice]":
    """Return a classifier with as many classes as the data has, the data in its size, and how to build it again.

    Raises:
        ValueError: data without classes, or a network of one's own with another number of them.
    """
    from dataclasses import replace

    from sightline import models
    from sightline.classifier import wrap
    from sightline.classifier_training import replace_head
    from sightline.runs import Choice

    ours = model.name in models.MODELS
    seeds = {"seed": seed} if ours and "seed" not in model.settings else {}
    built = models.load(Choice(model.name, {**model.settings, **seeds}))
    dataset = like(data, built)
    count = len(dataset.classes)
    if count < 2:
        raise ValueError(f"{data} has {count} classes; training needs at least two, one folder a class")
    name = "classes" if ours else "num_classes"
    stored = Choice(model.name, {**model.settings, name: count})
    if ours:
        built = models.load(Choice(stored.name, {**stored.settings, **seeds}))
    elif model.name.startswith("torchvision:"):
        network = replace_head(built.model, count, seed=seed)
        built = wrap(network, layer=built.layer, normalization=(built.mean, built.std), size=built.size)
    return replace(built, classes=tuple(dataset.classes)), dataset, stored


def drawn(progress: "Bar", epochs: int) -> "Callable[[Progress], None]":
    """Return a callback that draws the training."""
    task = progress.add_task("training", total=None, note="")

    def draw(at: "Progress") -> None:
        note = "  ".join(f"{name} {value:.3f}" for name, value in at.metrics.items())
        place = at.epoch * at.steps + at.step
        shown = f"epoch {at.epoch + 1}/{epochs}"
        progress.update(task, completed=place, total=epochs * at.steps, description=shown, note=note)

    return draw
