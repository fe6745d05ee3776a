"""COCO. Lin et al., Microsoft COCO: common objects in context, ECCV 2014: boxes and masks of 80 classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import known_folder, known_size, spread, usable
from sightline.datasets._geometry import moved, stored
from sightline.images import Size
from sightline.registry import unknown

SPLITS = ("train", "val")
YEARS = ("2014", "2017")
CROWDS = ("ignore", "object")
LAYOUT = (
    "root/<split><year>/*.jpg (or root/images/<split><year>/*.jpg) and root/annotations/instances_<split><year>.json"
)


class Outline(NamedTuple):
    """An annotated object: index of its class, half-open box, pixels of its polygons, which are None in some copies."""

    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    shape: Any


class Listed(NamedTuple):
    """An image of the list; `size` is height and width."""

    file: str
    size: Size
    outlines: tuple[Outline, ...]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images of one list with their objects."""

    root: Path
    listed: tuple[Listed, ...]
    classes: tuple[str, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str
    crowd: str

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode one image, paint its objects, and resize them together.

        Raises:
            FileNotFoundError, ImageError: the image is missing or broken, and was not decoded when the data set was
                read.
            ValueError: the image or a mask is not of the size that the list says.
        """
        file, size, outlines = self.listed[index]
        image = stored(self.root / file)
        if (image.shape[1], image.shape[2]) != size:
            got, expected = f"{image.shape[1]} x {image.shape[2]}", f"{size[0]} x {size[1]}"
            raise ValueError(f"{self.root / file} is {got}, by its annotations {expected}; fetch the original images")
        objects = _objects(outlines, self.crowd)
        mask, instances = _painted(outlines, self.crowd, size, str(self.root / file))
        boxes = torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4)
        together = moved(image, self.size, self.resize, boxes=boxes, mask=mask, instances=instances)
        present = torch.tensor([o.label for o in outlines], dtype=torch.long)
        return Sample(
            file,
            together.image,
            label=_largest(objects),
            labels=(torch.bincount(present, minlength=len(self.classes)) > 0).long(),
            boxes=together.boxes,
            box_labels=torch.tensor([o.label for o in objects], dtype=torch.long),
            mask=together.mask,
            instances=together.instances,
            size=size,
        )


def coco(
    root: str | Path,
    split: str = "val",
    *,
    year: str | int = "2017",
    annotations: str | Path | None = None,
    crowd: str = "ignore",
    unlabeled: bool = False,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Pictures:
    """Read COCO, or another data set in its form.

    The classes are those of the list in the order of their numbers (the 80 things, from person to toothbrush, whose
    numbers go up to 90). `labels` are all classes annotated in the image, crowds included; `label` is the one whose
    objects have the largest area together. `mask` is class + 1, smaller objects painted over larger ones; `instances`
    number the objects in the order of `boxes` from 1 (leaving out 255), painted alike. Where an object has no
    outline, both are None.

    Args:
        root: the folder.
        split: "train" or "val".
        year: 2014 or 2017.
        annotations: another list than instances_<split><year>.json.
        crowd: regions of many objects that are not told apart: "ignore" paints 255 below the objects and gives them no
            box; "object" takes a region as one object of its class.
        unlabeled: keep images without objects, whose label is None (a batch with one of them has no labels); else
            they are left out before anything is counted, and `skipped` says in one line how many.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many images only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder or list.
        ImportError: pycocotools, which reads the outlines, is not installed.
        LookupError: an unknown split, year, crowd, policy or check.
        ValueError: a damaged list, no image can be used, or a count outside 1 to the number of images.
    """
    for name, known, kind in (
        (split, SPLITS, "split of COCO"),
        (str(year), YEARS, "year of COCO"),
        (crowd, CROWDS, "treatment of crowds"),
    ):
        if name not in known:
            raise LookupError(unknown(name, known, kind))
    home, target = known_folder(root, LAYOUT), known_size(size, resize)
    path = Path(annotations).expanduser() if annotations else home / "annotations" / f"instances_{split}{year}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected {LAYOUT}")
    folder = _images(home, f"{split}{year}")
    _outlines()
    classes, listed = _read(path)
    labeled = [one for one in listed if unlabeled or _objects(one.outlines, crowd)]
    picked = {labeled[index].file: labeled[index] for index in spread(len(labeled), count)}
    files, skipped = usable(folder, list(picked), check)
    if len(labeled) < len(listed):
        number = f"{len(listed) - len(labeled)} of {len(listed)} images show no object and are left out"
        skipped = {path.name: f"{number}; unlabeled=True keeps them"} | skipped
    return Pictures(folder, tuple(picked[file] for file in files), classes, skipped, target, resize, crowd)


def _images(home: Path, name: str) -> Path:
    """Find the folder of the images."""
    for folder in (home / name, home / "images" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no {name} in {home}; expected {LAYOUT}")


def _outlines() -> Any:
    """Import the functions on outlines of pycocotools.

    Raises:
        ImportError: it is not installed; the message says how.
    """
    try:
        from pycocotools import mask  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('COCO is read by pycocotools: pip install "sightline[coco]"') from error
    return mask


def _read(path: Path) -> tuple[tuple[str, ...], list[Listed]]:
    """Read classes in the order of their numbers, and images in the order of theirs.

    Raises:
        ValueError: the list is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        numbers = {category["id"]: index for index, category in enumerate(categories)}
        known: dict[int, list[Outline]] = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            if row["image_id"] in known:
                known[row["image_id"]].append(_outline(row, numbers))
        listed = [
            Listed(image["file_name"], (image["height"], image["width"]), tuple(known[image["id"]]))
            for image in sorted(content["images"], key=lambda image: image["id"])
        ]
        classes = tuple(str(category["name"]) for category in categories)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {reason}; expected images, annotations and categories") from error
    if len(classes) > 254:
        raise ValueError(f"{path} has {len(classes)} classes; a mask holds 254")
    return classes, listed


def _outline(row: Mapping[str, Any], numbers: Mapping[int, int]) -> Outline:
    """Read one object; COCO's boxes are x y width height."""
    if row["category_id"] not in numbers:
        raise ValueError(f"category {row['category_id']} of an annotation is not listed")
    x, y, width, height = map(float, row["bbox"])
    area = float(row.get("area", width * height))
    shape, crowd = row.get("segmentation") or None, bool(row.get("iscrowd", 0))
    return Outline(numbers[row["category_id"]], (x, y, x + width, y + height), area, crowd, shape)


def _objects(outlines: Sequence[Outline], crowd: str) -> list[Outline]:
    """Keep what counts as an object."""
    return [one for one in outlines if crowd == "object" or not one.crowd]


def _largest(objects: Sequence[Outline]) -> int | None:
    """Return the class with the largest area, the first of equal ones; None without objects."""
    areas: dict[int, float] = {}
    for one in objects:
        areas[one.label] = areas.get(one.label, 0.0) + one.area
    return max(sorted(areas), key=lambda label: areas[label]) if areas else None


def _painted(
    outlines: Sequence[Outline], crowd: str, size: Size, name: str
) -> tuple[Int[Tensor, "h w"] | None, Int[Tensor, "h w"] | None]:
    """Paint classes and instances: crowds first, then objects from the largest to the smallest."""
    if any(one.shape is None for one in outlines):
        return None, None
    mask, instances = torch.zeros(2, *size, dtype=torch.long)
    objects = _objects(outlines, crowd)
    for one in outlines if crowd == "ignore" else ():
        if one.crowd:
            region = _pixels(one.shape, size, name)
            mask[region] = instances[region] = 255
    for index in sorted(range(len(objects)), key=lambda index: -objects[index].area):
        region = _pixels(objects[index].shape, size, name)
        mask[region] = objects[index].label + 1
        instances[region] = index + 1 + (index >= 254)
    return mask, instances


def _pixels(shape: Any, size: Size, name: str) -> Bool[Tensor, "h w"]:
    """Rasterize polygons, or run lengths, packed or not.

    Raises:
        ValueError: it is no outline of an image of that size.
    """
    outlines = _outlines()
    try:
        if isinstance(shape, list):
            polygons = [polygon for polygon in shape if len(polygon) >= 6]
            packed = outlines.merge(outlines.frPyObjects(polygons, *size)) if polygons else None
        else:
            packed = outlines.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
        pixels = np.zeros(size, np.uint8) if packed is None else outlines.decode(packed)
    except Exception as error:  # pycocotools raises nearly anything
        raise ValueError(f"an outline of {name} is damaged: {error}; fetch the annotations again") from error
    if pixels.shape != size:
        raise ValueError(f"an outline of {name} is {pixels.shape}, its image {size}; fetch the annotations again")
    return torch.from_numpy(pixels.astype(bool))
