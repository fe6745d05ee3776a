"""WSOL lists. Choe, Oh, Lee, Chun, Akata and Shim, CVPR 2020: metadata of their benchmark, and images with boxes.

The lists of a split are `metadata/<DATASET>/<split>/` of https://github.com/clovaai/wsolevaluation. Images and masks
are read as their pixels are stored, without EXIF turning: annotators and benchmarks saw them so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from sightline.data import Sample
from sightline.datasets._geometry import moved, pixels, stored
from sightline.images import Size

LISTS = (
    "the WSOL benchmark's metadata (https://github.com/clovaai/wsolevaluation), in root/metadata, beside root, or "
    "metadata=its folder; in it {name}/ with image_ids.txt, class_labels.txt and localization.txt"
)


class Marks(NamedTuple):
    """What is annotated on an image: boxes, their classes where these are not its label, and the size they refer to."""

    boxes: Float[Tensor, "n 4"] | None = None
    labels: Int[Tensor, " n"] | None = None
    size: Size | None = None


@dataclass(frozen=True, eq=False)
class Boxed:
    """Images with boxes; `labels` are indices into `classes`, `marks` tells from file and label what is annotated."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str
    marks: Callable[[str, int], Marks]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode and resize one image, and move its boxes along.

        Raises:
            ImageError: the file is broken, and was not decoded when the data set was read.
            ValueError: its annotation is damaged.
        """
        file, label = self.files[index], self.labels[index]
        image = stored(self.root / file)
        original = (image.shape[1], image.shape[2])
        boxes, box_labels, size = self.marks(file, label)
        if boxes is not None and size is not None:
            boxes = boxes * boxes.new_tensor([original[1] / size[1], original[0] / size[0]] * 2)
        thing = moved(image, self.size, self.resize, boxes=boxes)
        return Sample(file, thing.image, label=label, boxes=thing.boxes, box_labels=box_labels, size=original)


def unmarked(file: str, label: int) -> Marks:
    """Know nothing of a file."""
    return Marks()


def looked_up(table: Mapping[str, Marks], file: str, label: int) -> Marks:
    """Know of a file what a table says."""
    return table[file]


def marked(path: Path, size: Size) -> Bool[Tensor, "h w"]:
    """Read the non-zero pixels of a mask file, brought to `size` by nearest neighbor; opacity does not count.

    Raises:
        ImageError, FileNotFoundError: the file is broken or gone.
    """
    plane = torch.from_numpy(pixels(path, "L") > 0)
    return interpolate(plane[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5


def list_folder(root: Path, metadata: str | Path | None, name: str) -> Path:
    """Find the folder of a split's lists; `name` is like "CUB/val".

    `metadata` may be the folder `metadata`, the data set's folder in it, or the split's; None looks in `root/metadata`
    and beside `root`.

    Raises:
        FileNotFoundError: there are no such lists; the message shows where they are looked for.
    """
    given = root / "metadata" if metadata is None else Path(metadata).expanduser()
    beside = root.absolute().parent / "metadata" / name
    places = [given / name, beside] if metadata is None else [given / name, given / Path(name).name, given]
    for place in places:
        if (place / "image_ids.txt").is_file():
            return place
    raise FileNotFoundError(f"no {name}/image_ids.txt in {given}; expected {LISTS.format(name=name)}")


def listed_ids(home: Path) -> tuple[str, ...]:
    """Read the images of a split: paths below the folder of the images."""
    return tuple(line for line in _text(home / "image_ids.txt").splitlines() if line.strip())


def listed_labels(home: Path) -> dict[str, int]:
    """Read the class of every image, from 0."""
    path, form = home / "class_labels.txt", "image,label"
    return {row[0]: _whole(row[1], path, form, from_zero=True) for row in _rows(path, 2, form)}


def listed_sizes(home: Path) -> dict[str, Size]:
    """Read height and width of every image; empty without such a list."""
    path, form = home / "image_sizes.txt", "image,width,height"
    rows = _rows(path, 3, form) if path.is_file() else []
    return {row[0]: (_whole(row[2], path, form), _whole(row[1], path, form)) for row in rows}


def listed_boxes(home: Path) -> dict[str, Marks]:
    """Read the boxes of every image, `x0 y0 x1 y1` as they are written."""
    path, form, sizes = home / "localization.txt", "image,x0,y0,x1,y1", listed_sizes(home)
    corners: dict[str, list[list[float]]] = {}
    for name, *numbers in _rows(path, 5, form):
        corners.setdefault(name, []).append([float(_whole(number, path, form)) for number in numbers])
    return {name: Marks(torch.tensor(boxes), size=sizes.get(name)) for name, boxes in corners.items()}


def listed_masks(home: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Read the mask files of every image, and those of what is to be ignored (at most one, in the benchmark)."""
    files: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for name, mask, ignored in _rows(home / "localization.txt", 3, "image,mask,mask of what to ignore or nothing"):
        masks, ignores = files.get(name, ((), ()))
        files[name] = (*masks, mask), (*ignores, ignored) if ignored else ignores
    return files


def label_of(labels: Mapping[str, int], name: str, home: Path) -> int:
    """Return the class of a listed image.

    Raises:
        ValueError: it is not in class_labels.txt.
    """
    if name not in labels:
        raise ValueError(f"{home / 'class_labels.txt'} is damaged: no line for {name}; fetch it again")
    return labels[name]


def first_folder(places: Iterable[Path], wanted: str, root: Path, layout: str) -> Path:
    """Return the first of these folders that is there.

    Raises:
        FileNotFoundError: none is; the message shows the layout.
    """
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no folder {wanted} in {root}; expected {layout}")


def _text(path: Path) -> str:
    """Read a list if it is there."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected it among the WSOL benchmark's metadata")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from error


def _rows(path: Path, columns: int, form: str) -> list[list[str]]:
    """Split the lines of a list at their commas."""
    rows = [[word.strip() for word in line.split(",")] for line in _text(path).splitlines() if line.strip()]
    for row in rows:
        if len(row) != columns or not row[0] or not row[1]:
            raise ValueError(_damaged(path, ",".join(row), form))
    return rows


def _whole(word: str, path: Path, form: str, *, from_zero: bool = False) -> int:
    """Read a whole number of a list."""
    try:
        number = int(word)
    except ValueError as error:
        raise ValueError(_damaged(path, word, form)) from error
    if from_zero and number < 0:
        raise ValueError(_damaged(path, word, form))
    return number


def _damaged(path: Path, found: str, form: str) -> str:
    return f"{path} is damaged: {found!r}; expected lines {form}"
