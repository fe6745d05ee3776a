"""Pascal VOC. Everingham, Van Gool, Williams, Winn and Zisserman, IJCV, 2010: boxes or segmentations of 20 classes.

The form of its annotations, an XML file of boxes and a PNG of numbers for each image, is that of other data sets too:
`things` and `plane` read them.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import CHECKS, known_folder, known_size, spread, usable
from sightline.datasets._geometry import moved, stored
from sightline.images import ImageError, Size, probe
from sightline.registry import chosen, unknown

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The official names; class c has the number c + 1 in the masks."""

SPLITS = ("train", "val", "trainval", "test")
YEARS = ("2007", "2008", "2009", "2010", "2011", "2012")
TASKS = {"segmentation": "Segmentation", "detection": "Main"}
"""Task -> the folder of its lists in ImageSets."""

LAYOUT = (
    "root/VOCdevkit/VOC<year> (or root/VOC<year>, or root) with JPEGImages/*.jpg, "
    "ImageSets/Segmentation/<split>.txt and SegmentationClass/*.png (segmentation; SegmentationObject/*.png as well "
    "where there are instances), ImageSets/Main/<split>.txt and Annotations/*.xml (detection)"
)


class Thing(NamedTuple):
    """An object of an XML file; its box is half-open."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


class Found(NamedTuple):
    """The boxes of an image."""

    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    difficult: Bool[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images of one list; `masks` and `things` are theirs, None where the data set has none."""

    root: Path
    files: tuple[str, ...]
    masks: tuple[str | None, ...]
    things: tuple[tuple[Thing, ...] | None, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str
    classes: tuple[str, ...] = CLASSES

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode one image with its masks, and resize them together.

        Raises:
            FileNotFoundError, ImageError: the image or its mask is missing, broken or of another size, and was not
                decoded when the data set was read.
        """
        file, mask_file, things = self.files[index], self.masks[index], self.things[index]
        image = stored(self.root / "JPEGImages" / file)
        original = (image.shape[1], image.shape[2])
        mask = None if mask_file is None else decoded_plane(self.root / mask_file, original, _no_mask)
        instances = None if mask is None else self._instances(file, original)
        found = _outlined(mask, instances) if things is None else _of_things(things)
        boxes = None if found is None else found.boxes
        label, labels = _classes_of(mask, found)
        together = moved(image, self.size, self.resize, boxes=boxes, mask=mask, instances=instances)
        return Sample(
            file,
            together.image,
            label=label,
            labels=labels,
            boxes=together.boxes,
            box_labels=None if found is None else found.labels,
            difficult=None if found is None else found.difficult,
            mask=together.mask,
            instances=together.instances,
            size=original,
        )

    def _instances(self, file: str, size: Size) -> Int[Tensor, "h w"] | None:
        """Read the numbers of the objects, where the image has a file of them."""
        path = self.root / "SegmentationObject" / f"{Path(file).stem}.png"
        return decoded_plane(path, size) if path.is_file() else None


def voc(
    root: str | Path,
    split: str = "val",
    *,
    year: str | int = "2012",
    task: str = "segmentation",
    listing: str | Path | None = None,
    masks: str = "SegmentationClass",
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Scenes:
    """Read Pascal VOC.

    `mask` has the palette's numbers: 0 background, class + 1, 255 void, which is ignored; `instances` number the
    objects from 1, 255 is void. Boxes of the XML files (pixels counted from 1, both ends inside) become half-open.

    With "segmentation" the labels are the classes with pixels in the whole mask, and `label` is the one with most of
    them. Where there is no Annotations folder, boxes are the tightest ones around the instances, none of them
    difficult; without instances either, there are none. With "detection" the labels are the classes with a box, the
    difficult ones included, and `label` is the class of the largest box, difficult ones last; there are no masks.

    Args:
        root: the folder.
        split: "train", "val", "trainval" or "test"; the test annotations of 2007 alone are public.
        year: 2007 to 2012.
        task: "segmentation" or "detection", of which the list is read and which labels count.
        listing: another list instead of the split's: a path, or a name in the task's folder of ImageSets. A line has
            the image's name or path, and may name its mask, as `train_aug` of SBD does.
        masks: the folder of masks, SegmentationClassAug for SBD's; a mask named in a list has precedence.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many images only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images and masks are looked at before they are listed, see `folder`. XML files are always read.

    Raises:
        FileNotFoundError: no such folder or list.
        LookupError: an unknown split, year, task, policy or check.
        ValueError: no image can be used, or a count outside 1 to the number of images.
    """
    lists = chosen(task, TASKS, "task of VOC")
    if listing is None and split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of VOC"))
    if str(year) not in YEARS:
        raise LookupError(unknown(str(year), YEARS, "year of VOC"))
    home, target = _home(known_folder(root, LAYOUT), str(year)), known_size(size, resize)
    listed = _listed(home / "ImageSets" / lists, listing or f"{split}.txt", masks)
    picked = dict(listed[index] for index in spread(len(listed), count))
    things, skipped = _annotated(home, list(picked), task)
    if task == "segmentation":
        _known(home, masks if listing is None else "JPEGImages")
        pairs = {file: home / picked[file] for file in things}
        files, broken = usable_pairs(home / "JPEGImages", pairs, check, _no_mask)
    else:
        files, broken = usable(home / "JPEGImages", list(things), check)
    return Scenes(
        home,
        files,
        tuple(picked[file] if task == "segmentation" else None for file in files),
        tuple(things[file] for file in files),
        skipped | broken,
        target,
        resize,
    )


def things(path: Path) -> tuple[Thing, ...]:
    """Read the objects of an XML file in the form of VOC.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return tuple(_thing(node) for node in ElementTree.parse(path).getroot().findall("object"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; expected objects with name and bndbox") from error


def plane(path: Path, size: Size, wrong: Callable[[Tensor], str] | None = None) -> Int[Tensor, "h w"]:
    """Read a palette or gray PNG of numbers that lies on an image of `size`; `wrong` says what is wrong with them.

    Raises:
        FileNotFoundError: no such file.
        ImageError: it is broken, of another kind or size, or its numbers are wrong.
    """
    numbers = _numbers(path)
    height, width = numbers.shape
    if (height, width) != size:
        raise ImageError(f"{path} is {height} x {width}, its image {size[0]} x {size[1]}; both must have one size")
    if wrong is not None and (reason := wrong(numbers)):
        raise ImageError(f"{path} {reason}")
    return numbers


def decoded_plane(path: Path, size: Size, wrong: Callable[[Tensor], str] | None = None) -> Int[Tensor, "h w"]:
    """Read the mask of a sample, and say how to pass over it if that fails.

    Raises:
        FileNotFoundError: no such file.
        ImageError: as `plane`.
    """
    try:
        return plane(path, size, wrong)
    except ImageError as error:
        raise ImageError(f"{error}; check='decode' skips such files") from error


def usable_pairs(
    root: Path, masks: Mapping[str, Path], check: str, wrong: Callable[[Tensor], str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Separate the images that pass a check together with their masks from those that do not, with the reasons.

    Raises:
        LookupError: no such check.
        ValueError: no image is left.
    """

    def flaw(file: str) -> str:
        try:
            if check == "decode":
                plane(masks[file], probe(root / file), wrong)
            else:
                CHECKS[check](masks[file])
        except (ImageError, FileNotFoundError) as error:
            return str(error)
        return ""

    files, skipped = usable(root, list(masks), check)
    with ThreadPoolExecutor(4) as threads:
        flaws = {file: reason for file, reason in zip(files, threads.map(flaw, files), strict=True) if reason}
    if len(flaws) == len(files):
        raise ValueError(f"none of the {len(files)} masks of {root} can be used; the first: {flaws[files[0]]}")
    return tuple(file for file in files if file not in flaws), skipped | flaws


def _home(root: Path, year: str) -> Path:
    """Find the folder of a year."""
    for home in (root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", root):
        if (home / "JPEGImages").is_dir():
            return home
    raise FileNotFoundError(f"no VOC{year}/JPEGImages in {root}; expected {LAYOUT}")


def _known(home: Path, name: str) -> None:
    """Refuse a data set without a folder that it needs."""
    if not (home / name).is_dir():
        raise FileNotFoundError(f"no {name} in {home}; expected {LAYOUT}")


def _listed(folder: Path, listing: str | Path, masks: str) -> list[tuple[str, str]]:
    """Read a list: file names of images, and paths of their masks below the root."""
    given = Path(listing).expanduser()
    path = next((p for p in (folder / given, given) if p.is_file()), None)
    if path is None:
        others = " ".join(sorted(p.name for p in folder.glob("*.txt"))[:9]) or "none"
        raise FileNotFoundError(f"no {listing} in {folder} (lists there: {others}); expected {LAYOUT}")
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; expected an image's name on every line") from error
    named = [(Path(words[0]).stem, [w for w in words[1:] if w.lower().endswith(".png")]) for words in lines]
    return [(f"{name}.jpg", png[0].lstrip("/") if png else f"{masks}/{name}.png") for name, png in named]


def _annotated(home: Path, files: list[str], task: str) -> tuple[dict[str, tuple[Thing, ...] | None], dict[str, str]]:
    """Read the boxes of images, and say of which they cannot be used.

    Raises:
        FileNotFoundError: there are none, and the task needs them.
        ValueError: all are damaged.
    """
    if task == "segmentation" and not (home / "Annotations").is_dir():
        return dict.fromkeys(files), {}
    _known(home, "Annotations")
    read: dict[str, tuple[Thing, ...] | None] = {}
    skipped: dict[str, str] = {}
    for file in files:
        try:
            read[file] = _of_voc(home / "Annotations" / f"{Path(file).stem}.xml", task)
        except (ValueError, FileNotFoundError) as error:
            skipped[file] = str(error)
    if not read:
        reason = next(iter(skipped.values()))
        raise ValueError(f"none of the {len(files)} files in {home / 'Annotations'} can be used; the first: {reason}")
    return read, skipped


def _of_voc(path: Path, task: str) -> tuple[Thing, ...]:
    """Read objects, all of VOC's classes."""
    found = things(path)
    if strangers := sorted({thing.name for thing in found} - set(CLASSES)):
        raise ValueError(f"{path} is damaged: {unknown(strangers[0], CLASSES, 'class of VOC')}")
    if task == "detection" and not found:
        raise ValueError(f"{path} lists no object")
    return found


def _thing(node: ElementTree.Element) -> Thing:
    """Read one object."""
    x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    box = (x0 - 1, y0 - 1, x1, y1)
    if not all(map(isfinite, box)) or x1 < x0 or y1 < y0:
        raise ValueError(f"box {x0:g} {y0:g} {x1:g} {y1:g}")
    return Thing(node.findtext("name", "").strip(), box, node.findtext("difficult", "0").strip() == "1")


def _numbers(path: Path) -> Int[Tensor, "h w"]:
    """Decode the numbers of a PNG, not its colors."""
    probe(path)
    try:
        with Image.open(path) as picture:
            mode, numbers = picture.mode, np.array(picture)
    except Exception as error:  # as in `images.read`
        raise ImageError(f"{path} cannot be decoded: {error}") from error
    if mode not in ("L", "P"):
        raise ImageError(f"{path} is a picture in mode {mode}; expected a palette or gray PNG of numbers")
    return torch.from_numpy(numbers).long()


def _no_mask(mask: Int[Tensor, "h w"]) -> str:
    """Say what is wrong with a mask; nothing if it can be used."""
    strange = mask[(mask > len(CLASSES)) & (mask != 255)]
    if len(strange):
        return f"has the number {int(strange[0])}; expected 0 to {len(CLASSES)}, and 255"
    return "" if bool(((mask > 0) & (mask != 255)).any()) else "shows no object"


def _of_things(things: tuple[Thing, ...]) -> Found:
    """Turn the objects of a file into tensors."""
    return Found(
        torch.tensor([thing.box for thing in things], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([CLASSES.index(thing.name) for thing in things], dtype=torch.long),
        torch.tensor([thing.difficult for thing in things], dtype=torch.bool),
    )


def _outlined(mask: Int[Tensor, "h w"] | None, instances: Int[Tensor, "h w"] | None) -> Found | None:
    """Draw the tightest boxes around instances; the class is the one most of their pixels have in the mask."""
    if mask is None or instances is None:
        return None
    found: list[Thing] = []
    for number in torch.unique(instances[(instances > 0) & (instances != 255)]):
        own = instances == number
        pixels = _pixels(mask[own])
        if pixels.any():
            found.append(Thing(CLASSES[int(pixels.argmax())], tight(own), difficult=False))
    return _of_things(tuple(found))


def tight(region: Bool[Tensor, "h w"]) -> tuple[float, float, float, float]:
    """Return the tightest half-open box around the pixels of a region that is not empty."""
    rows, columns = (region.any(axis).nonzero().flatten() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _pixels(mask: Int[Tensor, "*_shape"]) -> Int[Tensor, " k"]:
    """Count the pixels of every class."""
    return torch.bincount(mask.flatten(), minlength=256)[1 : len(CLASSES) + 1]


def _classes_of(mask: Int[Tensor, "h w"] | None, found: Found | None) -> tuple[int | None, Int[Tensor, " k"]]:
    """Return the label and all labels, of the mask if there is one, else of the boxes."""
    if mask is not None:
        pixels = _pixels(mask)
        return int(pixels.argmax()), (pixels > 0).long()
    if found is None or not len(found.labels):
        return None, torch.zeros(len(CLASSES), dtype=torch.long)
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1).tolist()
    largest = max(range(len(areas)), key=lambda i: (not found.difficult[i], areas[i]))
    return int(found.labels[largest]), (torch.bincount(found.labels, minlength=len(CLASSES)) > 0).long()
