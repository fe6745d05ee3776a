"""CUB-200-2011. Wah, Branson, Welinder, Perona and Belongie, Caltech, 2011: birds with parts and attributes.

This reads a copy whose images are cut out at the official boxes; for localization the full frames are needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import decoded, known_count, known_folder, known_size, spread, usable
from sightline.images import Size, fit, fit_points
from sightline.registry import unknown

T = TypeVar("T")

PARTS = (
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye",
    "right leg", "right wing", "tail", "throat",
)  # fmt: skip
"""The keypoints, in order."""

SPLITS = {"train": 1, "test": 0}
ATTRIBUTES = "attributes/class_attribute_labels_continuous.txt"
LAYOUT = (
    "root (or root/CUB_200_2011) as Caltech packs CUB-200-2011, with box crops in images/: classes.txt, images.txt, "
    f"image_class_labels.txt, train_test_split.txt, parts/part_locs.txt, {ATTRIBUTES}"
)


@dataclass(frozen=True, eq=False)
class Birds:
    """Box crops of one split; `labels` are indices into `classes`, `keypoints` are in pixels of the files."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    keypoints: Float[Tensor, "n 15 3"]
    attributes: Float[Tensor, "k a"]
    classes: tuple[str, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Rows of the keypoints."""
        return PARTS

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode and resize one crop, and move its keypoints along.

        Raises:
            ImageError: the file is broken, and was not decoded when the data set was read.
        """
        file, label = self.files[index], self.labels[index]
        image = decoded(self.root / "images" / file)
        original = (image.shape[1], image.shape[2])
        points = _moved(self.keypoints[index], original, self.size, self.resize)
        image = fit(image, self.size, self.resize)
        return Sample(file, image, label=label, keypoints=points, attributes=self.attributes[label], size=original)


def cub_crops(
    root: str | Path,
    split: str = "test",
    *,
    classes: int | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Birds:
    """Read CUB birds cut out at their boxes.

    The crop is the object, so `boxes` is None. Keypoints follow `PARTS`; an invisible one, or one that the resize
    policy cuts away, is 0 0 0. `attributes` are the class's 312 shares of annotators, in [0, 1]. Only classes that
    occur in images.txt are counted, the same ones in both splits.

    Args:
        root: the folder.
        split: "train" or "test", the official ones.
        classes: keep the first so many classes; None keeps all.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how files are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or a list is missing in it.
        LookupError: an unknown split, policy or check.
        ValueError: a damaged list, no file can be used, or more classes or files asked for than there are.
    """
    if split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of CUB"))
    home, target = inner_home(known_folder(root, LAYOUT)), known_size(size, resize)
    pictures = listed_pictures(home)
    present = sorted({p.number for p in pictures})
    kept = present[: known_count(len(present), classes, "classes")]
    of_split = [p for p in pictures if p.train == SPLITS[split] and p.number in kept]
    chosen = {of_split[index].file: of_split[index] for index in spread(len(of_split), count)}
    files, skipped = usable(home / "images", list(chosen), check)
    return Birds(
        home,
        files,
        tuple(kept.index(chosen[file].number) for file in files),
        part_points(home, [chosen[file].id for file in files]),
        class_attributes(home, kept),
        class_names(home, kept),
        skipped,
        target,
        resize,
    )


class Picture(NamedTuple):
    """A row of the lists; `number` is the official class, from 1."""

    id: int
    file: str
    number: int
    train: int


def inner_home(root: Path) -> Path:
    """Take the folder itself or the one around it."""
    inner = root / "CUB_200_2011"
    return inner if inner.is_dir() else root


def listed_pictures(home: Path) -> list[Picture]:
    """Join the three lists of images."""
    files, numbers = _pairs(home, "images.txt", str), _pairs(home, "image_class_labels.txt", int)
    train = _pairs(home, "train_test_split.txt", int)
    if not files.keys() <= numbers.keys() & train.keys():
        raise ValueError(f"images of {home / 'images.txt'} are missing in its other lists; fetch them again")
    return [Picture(i, file, numbers[i], train[i]) for i, file in files.items()]


def _pairs(home: Path, name: str, kind: Callable[[str], T]) -> dict[int, T]:
    """Read lines of a number and one word more."""
    try:
        lines = _listed(home, name).read_text().splitlines()
        return {int(number): kind(word) for number, word in (line.split() for line in lines if line.strip())}
    except ValueError as error:
        raise ValueError(
            f"{home / name} is damaged: {error}; expected lines of two words, the first a number"
        ) from error


def number_table(home: Path, name: str) -> NDArray[np.float64]:
    """Read a table of numbers."""
    try:
        return np.loadtxt(_listed(home, name), ndmin=2)
    except ValueError as error:
        raise ValueError(f"{home / name} is damaged: {error}; expected a table of numbers") from error


def _listed(home: Path, name: str) -> Path:
    """Return a list of the data set if it is there."""
    path = home / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {home}; expected {LAYOUT}")
    return path


def class_names(home: Path, numbers: list[int]) -> tuple[str, ...]:
    """Look up the names of the classes."""
    names = _pairs(home, "classes.txt", str)
    if missing := [number for number in numbers if number not in names]:
        raise ValueError(f"{home / 'classes.txt'} is damaged: no class number {missing[0]}")
    return tuple(names[number] for number in numbers)


def part_points(home: Path, ids: list[int]) -> Float[Tensor, "n 15 3"]:
    """Look up `x y visible` of every part; a part that is not listed is invisible."""
    rows = number_table(home, "parts/part_locs.txt")
    if rows.shape[1] != 5 or not np.isin(rows[:, 1], np.arange(len(PARTS)) + 1).all():
        raise ValueError(f"{home / 'parts/part_locs.txt'} is damaged; expected image, part (1 to 15), x, y, visible")
    parts = rows[:, 1].astype(int) - 1
    where = {number: index for index, number in enumerate(ids)}
    places = np.array([where.get(int(number), -1) for number in rows[:, 0]])
    known = places >= 0
    points = np.zeros((len(ids), len(PARTS), 3), dtype=np.float32)
    points[places[known], parts[known]] = rows[known, 2:]
    return torch.from_numpy(points)


def class_attributes(home: Path, numbers: list[int]) -> Float[Tensor, "k a"]:
    """Look up the shares of the classes, printed in percent."""
    table = number_table(home, ATTRIBUTES)
    if len(table) < max(numbers):
        raise ValueError(f"{home / ATTRIBUTES} is damaged: {len(table)} rows for class number {max(numbers)}")
    return torch.from_numpy(table[[number - 1 for number in numbers]] / 100).float()


def _moved(points: Float[Tensor, "p 3"], source: Size, size: Size, resize: str) -> Float[Tensor, "p 3"]:
    """Bring keypoints to the resized image; what is invisible or cut away becomes 0 0 0."""
    xy = fit_points(points[:, :2], source, size, resize)
    inside = ((xy >= 0) & (xy <= xy.new_tensor([size[1], size[0]]))).all(1)
    seen = (points[:, 2:] > 0) & inside[:, None]
    return torch.cat([xy, torch.ones_like(points[:, 2:])], 1) * seen
