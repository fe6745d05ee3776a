"""CUB-200-2011, full frames. Wah, Branson, Welinder, Perona and Belongie, Caltech, 2011; CUBV2: Choe et al., CVPR 2020.

Birds with boxes, parts, attributes and segmentations. Box and part coordinates are taken as they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._cub import (
    ATTRIBUTES,
    PARTS,
    SPLITS,
    class_attributes,
    class_names,
    inner_home,
    listed_pictures,
    number_table,
    part_points,
)
from sightline.datasets._folder import known_count, known_folder, known_size, spread, usable
from sightline.datasets._geometry import moved, stored
from sightline.datasets._wsol import (
    Boxed,
    label_of,
    list_folder,
    listed_boxes,
    listed_ids,
    listed_labels,
    looked_up,
    marked,
)
from sightline.images import Size
from sightline.registry import chosen

LISTS = (
    "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt",
    "parts/part_locs.txt", ATTRIBUTES,
)  # fmt: skip
LAYOUT = (
    "root (or root/CUB_200_2011) as Caltech packs CUB-200-2011 (https://data.caltech.edu/records/65de6-vp158), with "
    f"the full frames in images/: {', '.join(LISTS)}; the segmentations, a second archive, beside it or in it"
)
LAYOUT_V2 = (
    "root/<class folder>/picture.jpg (or in root/CUB or root/CUBV2) as https://github.com/clovaai/wsolevaluation packs "
    "CUBV2, and metadata/CUB/val of the same benchmark"
)


@dataclass(frozen=True, eq=False)
class Frames:
    """Full frames of one split; `labels` are indices into `classes`, boxes and keypoints are in pixels of the files."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    boxes: Float[Tensor, "n 4"]
    keypoints: Float[Tensor, "n 15 3"]
    attributes: Float[Tensor, "k a"]
    segmentations: Path | None
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
        """Decode and resize one frame, and move its annotations along.

        Raises:
            ImageError: the file is broken, and was not decoded when the data set was read; or its segmentation is.
        """
        file, label = self.files[index], self.labels[index]
        image = stored(self.root / "images" / file)
        original, mask = (image.shape[1], image.shape[2]), None
        if self.segmentations is not None:
            mask = marked(_segmentation(self.segmentations, file), original).long() * (label + 1)
        thing = moved(
            image, self.size, self.resize, boxes=self.boxes[index][None], mask=mask, keypoints=self.keypoints[index]
        )
        return Sample(
            file,
            thing.image,
            label=label,
            boxes=thing.boxes,
            mask=thing.mask,
            keypoints=thing.keypoints,
            attributes=self.attributes[label],
            size=original,
        )


def cub(
    root: str | Path,
    split: str = "test",
    *,
    classes: int | None = None,
    segmentations: str | Path | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "header",
) -> Frames:
    """Read CUB birds in full frames.

    The one box is x, y, x + w, y + h of bounding_boxes.txt. Keypoints follow `PARTS`; an invisible one, or one that the
    resize policy cuts away, is 0 0 0. `mask` is label + 1 wherever an annotator saw bird (a segmentation's value is not
    zero), None without segmentations; with them, an image that has none is skipped. `attributes` are the class's 312
    shares of annotators, in [0, 1]. Only classes that occur in images.txt are counted, the same ones in both splits.

    Args:
        root: the folder.
        split: "train" or "test", the official ones.
        classes: keep the first so many classes; None keeps all.
        segmentations: the folder of the segmentations; None looks for one of that name in `root` and beside it.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or a list is missing in it.
        LookupError: an unknown split, policy or check.
        ValueError: a damaged list, no file can be used, or more classes or files asked for than there are.
    """
    train = chosen(split, SPLITS, "split of CUB")
    base, target = known_folder(root, LAYOUT), known_size(size, resize)
    home = inner_home(base)
    if missing := [name for name in LISTS if not (home / name).is_file()]:
        raise FileNotFoundError(f"no {missing[0]} in {home}; expected {LAYOUT}")
    outlines = _segmentations(home, segmentations)
    pictures = listed_pictures(home)
    present = sorted({p.number for p in pictures})
    kept = present[: known_count(len(present), classes, "classes")]
    of_split = [p for p in pictures if p.train == train and p.number in kept]
    taken = {of_split[index].file: of_split[index] for index in spread(len(of_split), count)}
    skipped = {} if outlines is None else _unsegmented(outlines, list(taken))
    if len(skipped) == len(taken):
        raise ValueError(f"none of the {len(taken)} images can be used; the first: {next(iter(skipped.values()))}")
    files, broken = usable(home / "images", [file for file in taken if file not in skipped], check)
    ids = [taken[file].id for file in files]
    return Frames(
        home,
        files,
        tuple(kept.index(taken[file].number) for file in files),
        _boxes(home, ids),
        part_points(home, ids),
        class_attributes(home, kept),
        outlines,
        class_names(home, kept),
        {**skipped, **broken},
        target,
        resize,
    )


def cub_v2(
    root: str | Path,
    *,
    metadata: str | Path | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "header",
) -> Boxed:
    """Read CUBV2, the validation images of the WSOL benchmark: 5 or so from Flickr for each of CUB's 200 classes.

    Boxes are taken as localization.txt writes them, and scaled if a file's size is not the listed one. Classes are
    named after their folders.

    Args:
        root: the folder; the benchmark unpacks CUBV2 into the same folder as CUB.
        metadata: the folder of the WSOL benchmark's lists; None looks in `root/metadata` and beside `root`.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or a list is missing.
        LookupError: an unknown policy or check.
        ValueError: a damaged list, no file can be used, or a count outside 1 to the number of files.
    """
    base, target = known_folder(root, LAYOUT_V2), known_size(size, resize)
    lists = list_folder(base, metadata, "CUB/val")
    ids, labels, marks = listed_ids(lists), listed_labels(lists), listed_boxes(lists)
    numbers = {name: label_of(labels, name, lists) for name in ids}
    if missing := [name for name in ids if name not in marks]:
        raise ValueError(f"{lists / 'localization.txt'} is damaged: no line for {missing[0]}; fetch it again")
    taken = [ids[index] for index in spread(len(ids), count)]
    places = (base, base / "CUB", base / "CUBV2")
    home = next((place for place in places if any((place / name).is_file() for name in taken)), base)
    files, skipped = usable(home, taken, check)
    folders = {numbers[name]: Path(name).parent.name for name in reversed(ids)}
    names = tuple(folders.get(number) or str(number) for number in range(max(numbers.values()) + 1))
    found = tuple(numbers[file] for file in files)
    return Boxed(home, files, found, names, skipped, target, resize, partial(looked_up, marks))


def _boxes(home: Path, ids: list[int]) -> Float[Tensor, "n 4"]:
    """Look up the boxes of images, half-open."""
    path, rows = home / "bounding_boxes.txt", number_table(home, "bounding_boxes.txt")
    if rows.shape[1] != 5:
        raise ValueError(f"{path} is damaged; expected image, x, y, width, height")
    places = {int(row[0]): index for index, row in enumerate(rows)}
    if missing := [number for number in ids if number not in places]:
        raise ValueError(f"{path} is damaged: no box of image {missing[0]}; fetch it again")
    x, y, w, h = rows[[places[number] for number in ids], 1:].T
    return torch.from_numpy(np.stack([x, y, x + w, y + h], 1)).float()


def _segmentations(home: Path, given: str | Path | None) -> Path | None:
    """Find the folder of the segmentations."""
    if given is not None:
        return known_folder(given, "segmentations/<class>/picture.png, CUB's second archive")
    places = (home / "segmentations", home.absolute().parent / "segmentations")
    return next((place for place in places if place.is_dir()), None)


def _segmentation(folder: Path, file: str) -> Path:
    return (folder / file).with_suffix(".png")


def _unsegmented(folder: Path, files: list[str]) -> dict[str, str]:
    """Name the images of which the segmentation is not there."""
    paths = {file: _segmentation(folder, file) for file in files}
    return {file: f"there is no segmentation {path}" for file, path in paths.items() if not path.is_file()}
