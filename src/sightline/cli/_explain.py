"""`sightline explain`: from pictures to maps."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sightline.cli._options import SETTING

if TYPE_CHECKING:
    from sightline.classifier import Classifier
    from sightline.explanation import Explanation
    from sightline.runs import Choice

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


@click.command("explain", short_help="Draw where a classifier looks on your pictures.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--model", default="creatures", show_default=True, help="A model (see `sightline list models`).")
@click.option("--method", multiple=True, default=("grad_cam",), show_default=True, help="A method, or all; repeatable.")
@click.option("--target", default=None, help="The class to explain, number or name; by default the predicted one.")
@click.option("--layer", default=None, help="The layer to explain, by its dotted name.")
@click.option("--resize", default="direct", show_default=True, help="How pictures are fitted: direct, crop, crop256.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Output folder.")
@SETTING
def command(
    images: tuple[Path, ...],
    model: str,
    method: tuple[str, ...],
    target: str | None,
    layer: str | None,
    resize: str,
    out: Path,
    settings: tuple[str, ...],
) -> None:
    """Explain each IMAGE (a picture or a folder of them) and write NAME-METHOD.png (overlay), .npy (raw map) and .json
    (specification, class, score) into the output folder; several maps also make a contact sheet, sheet.png.

    A method may carry its own settings, --method "opti_cam?steps=50&objective=diff", and others in parentheses:
    --method "smooth(gradient)?samples=20". Of all methods, those that the network does not suit are skipped.
    """
    from sightline import models
    from sightline.cli._options import bar, methods
    from sightline.settings import method_of

    chosen = methods(method, settings)
    for one in chosen:
        method_of(one)
    files = [file for image in images for file in pictures(image)]
    classifier = models.load(model)
    classifier = classifier if layer is None else classifier.at(layer)
    folders = places(files, out)
    made: list[list[Explanation | None]] = []
    skipped: dict[str, str] = {}
    explained = partial(
        attempt, classifier, target=target, resize=resize, model=model, lenient="all" in method, skipped=skipped
    )
    with bar() as progress:
        task = progress.add_task("explaining", total=len(files) * len(chosen), note="")
        for file, folder in zip(files, folders, strict=True):
            row: list[Explanation | None] = []
            for one in chosen:
                progress.update(task, note=str(one))
                row.append(explained(file, one))
                progress.advance(task)
                if row[-1] is not None:
                    row[-1].save(folder)
            made.append(row)
    tell(made, out, skipped)


def pictures(path: Path) -> list[Path]:
    """Return the picture, or those in a folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder without pictures.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no picture {path}")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"the folder {path} holds no picture ({', '.join(sorted(PICTURES))})")
    return found


def places(files: list[Path], out: Path) -> list[Path]:
    """Return the folder of each picture's files: numbered ones inside `out` for pictures that share a name."""
    stems = [file.stem for file in files]
    return [out if stems.count(file.stem) == 1 else out / str(index) for index, file in enumerate(files)]


def attempt(
    classifier: "Classifier",
    file: Path,
    method: "Choice",
    *,
    target: str | None,
    resize: str,
    model: str,
    lenient: bool,
    skipped: dict[str, str],
) -> "Explanation | None":
    """Explain one picture; a broken file is noted and skipped, and so, if lenient, is an unsuited method."""
    from dataclasses import replace

    from sightline.classifier import UnsuitedError
    from sightline.explanation import explain
    from sightline.images import ImageError

    try:
        made = explain(classifier, str(file), target, method, resize_policy=resize)
    except ImageError as error:
        skipped[str(file)] = str(error)
        return None
    except UnsuitedError as error:
        if not lenient:
            raise
        skipped[str(method)] = str(error)
        return None
    return replace(made, spec={**made.spec, "model": model})


def tell(made: "list[list[Explanation | None]]", out: Path, skipped: dict[str, str]) -> None:
    """Print what was explained, and write the contact sheet.

    Raises:
        ValueError: every picture was broken.
    """
    done = [one for row in made for one in row if one is not None]
    for file, reason in skipped.items():
        click.echo(f"skipped {file}: {reason}", err=True)
    if not done:
        raise ValueError(f"none of the {len(made)} pictures could be read")
    for one in done:
        problem = one.problems[0]
        note = f"  (the map is {problem})" if problem else ""
        click.echo(f"{one.names[0]}  {one.spec['method']}  {one.label()}  {float(one.scores[0]):.1%}{note}")
    if len(done) > 1:
        sheet(made, out)
    click.echo(f"written to {out}" + (f", {len(skipped)} skipped" if skipped else ""))


def sheet(made: "list[list[Explanation | None]]", out: Path) -> None:
    """Write pictures x methods."""
    from sightline import viz
    from sightline.runs import write_bytes

    rows = [[one for one in row if one is not None] for row in made]
    rows = [row for row in rows if row]
    cells = [[row[0].photos[0], *(None if one.problems[0] else one.overlay() for one in row)] for row in rows]
    drawn = viz.grid(
        cells,
        columns=["image", *(str(one.spec["method"]) for one in rows[0])],
        titles=[f"{row[0].names[0]}\n{row[0].label()} {float(row[0].scores[0]):.0%}" for row in rows],
    )
    write_bytes(out / "sheet.png", viz.png(drawn))
