"""`sightline explain`: from pictures to maps."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sightline.cli._options import ACCELERATOR, SETTING

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.classifier import Classifier
    from sightline.explanation import Explanation
    from sightline.runs import Choice

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}

WIDEST = 9
"""How many maps stand side by side on a contact sheet."""


@click.command("explain", short_help="Draw where a classifier looks on your pictures.")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--model", default="creatures", show_default=True, help="A model (see `sightline list models`).")
@click.option("--method", multiple=True, default=("grad_cam",), show_default=True, help="A method, or all; repeatable.")
@click.option("--target", default=None, help="The class to explain, number or name; by default the predicted one.")
@click.option("--layer", default=None, help="The layer to explain, by its dotted name.")
@click.option("--resize", default="direct", show_default=True, help="How pictures are fitted: direct, crop, crop256.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Output folder.")
@ACCELERATOR
@SETTING
def command(
    images: tuple[Path, ...],
    model: str,
    method: tuple[str, ...],
    target: str | None,
    layer: str | None,
    resize: str,
    out: Path,
    accelerator: str,
    settings: tuple[str, ...],
) -> None:
    """Explain each IMAGE (a picture or a folder of them) and write NAME-METHOD.png (overlay), .npy (raw map) and .json
    (specification, class, score) into the output folder; several maps also make a contact sheet, sheet.png.

    A method may carry its own settings, --method "opti_cam?steps=50&objective=diff", and others in parentheses:
    --method "smooth(gradient)?samples=20". Of all methods, those that the network does not suit are skipped. One method
    with several settings gets a folder for each.
    """
    from sightline import models
    from sightline.cli._options import bar, methods
    from sightline.processes import fabric_of
    from sightline.runs import file_name
    from sightline.settings import method_of

    chosen = methods(method, settings)
    for one in chosen:
        method_of(one)
    files = [file for image in images for file in pictures(image)]
    classifier = models.load(model)
    classifier = classifier if layer is None else classifier.at(layer)
    classifier.model.to(fabric_of(accelerator).device)
    folders = places(files, out)
    twice = {one.name for one in chosen if [each.name for each in chosen].count(one.name) > 1}
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
                    row[-1].save(folder / file_name(str(one)) if one.name in twice else folder)
            made.append(row)
    tell(made, [str(one) if one.name in twice else one.name for one in chosen], out, skipped)


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


def tell(made: "list[list[Explanation | None]]", names: list[str], out: Path, skipped: dict[str, str]) -> None:
    """Print what was explained, by the names of the methods, and write the contact sheet.

    Raises:
        ValueError: every picture was broken.
    """
    done = [(name, one) for row in made for name, one in zip(names, row, strict=True) if one is not None]
    for file, reason in skipped.items():
        click.echo(f"skipped {file}: {reason}", err=True)
    if not done:
        raise ValueError(f"none of the {len(made)} pictures could be read")
    for name, one in done:
        problem = one.problems[0]
        note = f"  (the map is {problem})" if problem else ""
        click.echo(f"{one.names[0]}  {name}  {one.label()}  {float(one.scores[0]):.1%}{note}")
    if len(done) > 1:
        sheet(made, names, out)
    click.echo(f"written to {out}" + (f", {len(skipped)} skipped" if skipped else ""))


def sheet(made: "list[list[Explanation | None]]", names: list[str], out: Path) -> None:
    """Write pictures x methods; more methods than fit in a line go on below, in lines of the same length."""
    from PIL.Image import new

    from sightline import viz
    from sightline.runs import write_bytes

    rows = [row for row in made if any(row)]
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    length = -(-len(kept) // -(-len(kept) // WIDEST))
    parts = [drawn(rows, names, kept[start : start + length]) for start in range(0, len(kept), length)]
    whole = new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), viz.PAPER)
    for i, part in enumerate(parts):
        whole.paste(part, (0, sum(above.height for above in parts[:i])))
    write_bytes(out / "sheet.png", viz.png(whole))


def drawn(rows: "list[list[Explanation | None]]", names: list[str], columns: list[int]) -> "Image":
    """Draw the pictures, and beside them the maps of some of the methods."""
    from sightline import viz

    firsts = [next(one for one in row if one is not None) for row in rows]
    maps = [[row[i] for i in columns] for row in rows]
    cells = [
        [first.photos[0], *(None if one is None or one.problems[0] else one.overlay() for one in row)]
        for first, row in zip(firsts, maps, strict=True)
    ]
    return viz.grid(
        cells,
        columns=["image", *(names[i] for i in columns)],
        titles=[f"{first.names[0]}\n{first.label()} {float(first.scores[0]):.0%}" for first in firsts],
    )
