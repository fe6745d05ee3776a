"""`sightline segment`: from images to pseudo labels in files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sightline.cli._options import SETTING

if TYPE_CHECKING:
    from sightline.segmenting import Manifest, Segmenting

NAMES = ("model", "data", "method", "resolve", "classes")

TOLD = 10
"""How many skipped files are named."""


@click.command("segment", short_help="Write pseudo labels for a data set.")
@click.option("--model", help="The network that is explained.  [default: creatures]")
@click.option("--data", help="What to label: folder?root=pictures, voc?root=VOC2012&split=train.  [default: creatures]")
@click.option(
    "--method",
    help="Whose maps become labels: flip_and_scale(cam). The maps of a segmenter (its file) are log-odds: add "
    "--normalize none --threshold 0 --classes all.  [default: cam]",
)
@click.option("--layer", help="The layer to explain, by its dotted name.")
@click.option(
    "--resolve",
    help="What refines maps: basic, smooth?sigma=5, superpixel; or labels, at each threshold: crf.  [default: basic]",
)
@click.option("--threshold", metavar="T|LOW,HIGH", help="Background up to T; between two: 255.  [default: 0.3]")
@click.option("--normalize", help="Maps divided by their maximum: max; unit: to [0, 1]; none.  [default: max]")
@click.option("--classes", help="Which compete: labels, predicted?above=0.5, top or all.  [default: labels]")
@click.option("--size", help="Label maps of the original picture's size, or of the input's.  [default: original]")
@click.option(
    "--irn",
    type=click.Choice(["npy", "npz"]),
    is_flag=False,
    flag_value="npy",
    help="Write the maps as IRN's dictionaries too: pickles that IRN reads (npy, also where nothing is said), or npz.",
)
@click.option("--images", type=click.IntRange(min=0), help="How many images, from the first; 0 means all.")
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.  [default: 16]")
@click.option("--seed", type=int, help="Seed of a method that draws.  [default: 0]")
@click.option("--spec", type=click.Path(path_type=Path), help="All of this as TOML; options given here win over it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the labels.")
@SETTING
def command(spec: Path | None, out: Path, settings: tuple[str, ...], **given: Any) -> None:
    """Write a label map of every image, from a method's maps: OUT/labels/ID.png, 0 background, 255 ignored.

    A stopped command goes on where it was; kill -9 loses nothing. Several processes or machines write the same bytes as
    one: torchrun --nproc-per-node N -m sightline segment ..., on one folder. Beside the labels: manifest.json (counts,
    skipped images, maps that show nothing), timing.json, contact.png.
    """
    from sightline.cli._options import bar
    from sightline.segmenting import process, segment

    asked = specification(spec, given, settings)
    if process()[0] > 0:
        tell(segment(asked, out), out)
        return
    with bar() as progress:
        task = progress.add_task("segment", total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            if not note:
                progress.reset(task, total=total, completed=done)
            progress.update(task, completed=done, total=total, note=note)

        manifest = segment(asked, out, report=report)
    tell(manifest, out)


def specification(path: Path | None, given: dict[str, Any], settings: tuple[str, ...]) -> "Segmenting":
    """Return what the file and the options say.

    Raises:
        LookupError, TypeError, ValueError, OSError: an option or a file that does not fit.
    """
    from dataclasses import replace

    from sightline.cli._options import pairs
    from sightline.runs import Choice, read_value
    from sightline.segmenting import Segmenting

    said = {name: value for name, value in given.items() if value is not None}
    said |= {name: Choice.parse(said[name]) for name in NAMES if name in said}
    if "threshold" in said:
        numbers = [read_value(text.strip()) for text in said["threshold"].split(",")]
        said["threshold"] = numbers if len(numbers) > 1 else numbers[0]
    defaults = {"model": "creatures", "data": "creatures", "method": "cam"}
    asked = Segmenting.of({**defaults, **said}) if path is None else Segmenting.read(path, **said)
    if not settings:
        return asked
    return replace(asked, method=Choice(asked.method.name, {**asked.method.settings, **pairs(settings)}))


def tell(manifest: "Manifest | None", out: Path) -> None:
    """Say what came out, and where it is."""
    import json

    if manifest is None:
        click.echo(f"this process is done; the last one to finish writes {out / 'manifest.json'}", err=True)
        return
    for file, reason in list(manifest.skipped.items())[:TOLD]:
        click.echo(f"skipped {file}: {reason}", err=True)
    if len(manifest.skipped) > TOLD:
        click.echo(f"skipped {len(manifest.skipped) - TOLD} more, which manifest.json names", err=True)
    shares = ", ".join(f"{share:.1%} {kind}" for kind, share in manifest.shares.items())
    nothing = f"; {len(manifest.degenerate)} maps show nothing" if manifest.degenerate else ""
    click.echo(f"{manifest.images} images, {len(manifest.skipped)} skipped: {shares}{nothing}")
    timing = json.loads((out / "timing.json").read_text(encoding="utf-8"))
    speed, several = timing["images_per_second_of_a_process"], len(timing["processes"])
    where = "in a process" if several == 1 else f"in each of {several} processes"
    click.echo(f"{speed:.1f} images/s {where}; labels, manifest.json, timing.json and contact.png are in {out}")
