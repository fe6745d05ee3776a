"""ImageNet. Russakovsky et al., IJCV 2015 (ILSVRC 2012), and ImageNetV2 of Recht et al., ICML 2019, with boxes.

The coordinates in ILSVRC's XML files count pixels from 0 and include the last one: a box around the whole of a picture
of 500 x 375 is written 0 0 499 374.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from sightline.datasets._folder import known_count, known_folder, known_size, spread, usable
from sightline.datasets._wsol import (
    Boxed,
    Marks,
    first_folder,
    list_folder,
    listed_boxes,
    listed_labels,
    looked_up,
    unmarked,
)
from sightline.images import Size
from sightline.registry import chosen

SPLITS: Mapping[str, str] = MappingProxyType({"train": "train", "val": "test"})
"""Split -> what the WSOL benchmark calls it."""
BOXES: Mapping[str, str] = MappingProxyType(
    {"xml": "the XML files of ILSVRC", "wsol": "localization.txt of the WSOL benchmark", "none": "no boxes"}
)
"""Where boxes come from."""
LAYOUT = (
    "root/val/<wnid>/picture.JPEG and root/train/<wnid>/picture.JPEG; or root/ILSVRC/Data/CLS-LOC/{train,val} as "
    "Kaggle packs it, whose flat val needs root/LOC_val_solution.csv. Boxes are in Annotations/CLS-LOC/{train,val} "
    "(*.xml) below root or root/ILSVRC, or in annotations=...; or in the WSOL benchmark's metadata (boxes='wsol'); "
    "boxes='none' needs neither"
)
LAYOUT_V2 = (
    "root/<class number from 0 to 999>/picture.jpeg, as ImageNetV2 is packed, or these folders in root/val2 or "
    "root/imagenetv2-*; boxes are in metadata/ILSVRC/val of the WSOL benchmark, boxes='none' needs none"
)
_ENDINGS = (".jpeg", ".jpg", ".png")
_WNID = re.compile(r"n\d{8}")


class _Picture(NamedTuple):
    """A file of a split; `kind` is the name of its class."""

    file: str
    kind: str


def imagenet(
    root: str | Path,
    split: str = "val",
    *,
    boxes: str = "xml",
    annotations: str | Path | None = None,
    metadata: str | Path | None = None,
    origin: int = 0,
    exclude: str | Path | None = None,
    classes: int | Sequence[str] | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "header",
) -> Boxed:
    """Read ImageNet (ILSVRC 2012): images in folders by wnid, or as Kaggle packs them, with the boxes of their class.

    Labels are indices into the sorted wnids that have a folder (in a flat folder: that its lists name), so 0 to 999 of
    the usual networks where all 1000 are there; `classes` gives a part of the images these numbers too.
    Boxes are scaled if a file's size is not the annotated one, and an XML's become x0 y0 x1 y1 = xmin, ymin, xmax + 1,
    ymax + 1 (coordinates from 0, the last pixel inside); WSOL's are taken as they are written. `box_labels` is None
    unless an object is of another class than its image (-1: of a class that is not read). With boxes, images without
    an annotation are skipped.

    Args:
        root: the folder.
        split: "train" or "val".
        boxes: "xml", "wsol" or "none".
        annotations: the folder of the XML files; None looks where ILSVRC's archives put them.
        metadata: the folder of the WSOL benchmark's lists; None looks in `root/metadata` and beside `root`.
        origin: the number of the first pixel in the XML files; 1 reads them like Pascal VOC's.
        exclude: a text file of validation images to pass over, one number or name a line (ILSVRC's blacklist).
        classes: keep the first so many classes; or the wnids of a classifier, in its order. None keeps all.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how files are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or no image, label or annotation in it.
        LookupError: an unknown split, policy, check or kind of boxes.
        ValueError: a damaged list, an `origin` but 0 and 1, no file can be used, or more classes or files asked for
            than there are.
    """
    listed = chosen(split, SPLITS, "split of ImageNet")
    chosen(boxes, BOXES, "kind of boxes")
    if origin not in (0, 1):
        raise ValueError(f"the first pixel has the number 0 or 1, got origin={origin}")
    base, target = known_folder(root, LAYOUT), known_size(size, resize)
    home = _split_folder(base, split)
    lists = list_folder(base, metadata, f"ILSVRC/{listed}") if boxes == "wsol" else None
    xml = _xml_folder(base, split, annotations, needed=boxes == "xml")
    pictures, present, skipped = _pictures(base, home, lists, xml)
    kept = _kept(present, classes)
    numbers = {kind: index for index, kind in enumerate(kept)}
    stems = {} if exclude is None else _excluded(Path(exclude).expanduser())
    reasons = {p.file: stems.get(Path(p.file).stem, "") for p in pictures if p.kind in numbers}
    pictures = _without([p for p in pictures if p.kind in numbers], reasons, skipped)
    marks: Callable[[str, int], Marks] = unmarked
    if lists is not None:
        pictures, marks = _listed(pictures, lists, lambda name: Path(name).name, skipped)
    elif boxes == "xml" and xml is not None:
        reasons = {p.file: "" if _xml_file(xml, p.file).is_file() else f"without XML file in {xml}" for p in pictures}
        pictures, marks = _without(pictures, reasons, skipped), partial(_marks_of_xml, xml, numbers, origin)
    return _boxed(home, pictures, numbers, kept, skipped, target, resize, marks, count, check)


def imagenet_v2(
    root: str | Path,
    *,
    boxes: str = "wsol",
    metadata: str | Path | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "header",
) -> Boxed:
    """Read ImageNetV2: folders 0 to 999, whose number is the label, with the boxes of the WSOL benchmark or without.

    The benchmark's boxes belong to the images of the Threshold0.7 variant, in folder `val2`; they are found by class
    folder and file name, taken as they are written, and scaled if a file's size is not the listed one. Images that are
    not listed are skipped, unless `boxes` is "none". `classes` are the numbers as words, always all 1000.

    Args:
        root: the folder.
        boxes: "wsol" or "none".
        metadata: the folder of the WSOL benchmark's lists; None looks in `root/metadata` and beside `root`.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how files are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or no image or list in it.
        LookupError: an unknown policy, check or kind of boxes.
        ValueError: a damaged list, several variants in `root`, no file can be used, or a count outside 1 to the number
            of files.
    """
    chosen(boxes, {kind: BOXES[kind] for kind in ("wsol", "none")}, "kind of boxes")
    base, target = known_folder(root, LAYOUT_V2), known_size(size, resize)
    home = _variant(base)
    folders = [str(number) for number in range(1000) if (home / str(number)).is_dir()]
    pictures = [_Picture(f"{number}/{file}", number) for number in folders for file in _images(home / number)]
    if not pictures:
        raise FileNotFoundError(f"no image in {home}; expected {LAYOUT_V2}")
    skipped: dict[str, str] = {}
    marks: Callable[[str, int], Marks] = unmarked
    if boxes == "wsol":
        lists = list_folder(base, metadata, "ILSVRC/val")
        pictures, marks = _listed(pictures, lists, lambda name: "/".join(name.split("/")[-2:]), skipped)
    names = tuple(map(str, range(1000)))
    numbers = {name: number for number, name in enumerate(names)}
    return _boxed(home, pictures, numbers, names, skipped, target, resize, marks, count, check)


def _boxed(
    home: Path,
    pictures: Sequence[_Picture],
    numbers: Mapping[str, int],
    classes: tuple[str, ...],
    skipped: Mapping[str, str],
    size: Size,
    resize: str,
    marks: Callable[[str, int], Marks],
    count: int | None,
    check: str,
) -> Boxed:
    """Look at as many pictures as are asked for."""
    taken = {pictures[index].file: numbers[pictures[index].kind] for index in spread(len(pictures), count)}
    files, broken = usable(home, list(taken), check)
    labels = tuple(taken[file] for file in files)
    return Boxed(home, files, labels, classes, {**skipped, **broken}, size, resize, marks)


def _listed(
    pictures: Sequence[_Picture], lists: Path, short: Callable[[str], str], skipped: dict[str, str]
) -> tuple[list[_Picture], Callable[[str, int], Marks]]:
    """Keep the pictures that the WSOL benchmark lists; a name is the same where it is when `short`."""
    named = {short(name): marks for name, marks in listed_boxes(lists).items()}
    table = {p.file: named[short(p.file)] for p in pictures if short(p.file) in named}
    reasons = {p.file: "" if p.file in table else f"not in {lists / 'localization.txt'}" for p in pictures}
    return _without(pictures, reasons, skipped), partial(looked_up, table)


def _split_folder(root: Path, split: str) -> Path:
    """Find the images of a split."""
    places = (root / split, root / "ILSVRC/Data/CLS-LOC" / split, root / "Data/CLS-LOC" / split)
    return first_folder(places, split, root, LAYOUT)


def _xml_folder(root: Path, split: str, annotations: str | Path | None, *, needed: bool) -> Path | None:
    """Find the XML files of a split."""
    places = (root / "Annotations/CLS-LOC" / split, root / "ILSVRC/Annotations/CLS-LOC" / split)
    if annotations is not None:
        return known_folder(annotations, "annotations/picture.xml or annotations/<wnid>/picture.xml")
    found = next((place for place in places if place.is_dir()), None)
    if needed and found is None:
        raise FileNotFoundError(f"no folder Annotations/CLS-LOC/{split} in {root}; expected {LAYOUT}")
    return found


def _pictures(
    root: Path, home: Path, lists: Path | None, xml: Path | None
) -> tuple[list[_Picture], tuple[str, ...], dict[str, str]]:
    """List the images with their classes, all classes in order, and the images whose class nobody knows."""
    wnids = sorted(f.name for f in home.iterdir() if _WNID.fullmatch(f.name) and f.is_dir())
    pictures = [_Picture(f"{wnid}/{file}", wnid) for wnid in wnids for file in _images(home / wnid)]
    if pictures:
        return pictures, tuple(wnids), {}
    files = _images(home)
    if not files:
        raise FileNotFoundError(f"no image in {home}; expected {LAYOUT}")
    kinds = _kinds(root, files, lists, xml)
    listed = {file: kinds[Path(file).stem] for file in files if Path(file).stem in kinds}
    skipped = {file: f"{file} is without class in the lists" for file in files if file not in listed}
    if not listed:
        raise ValueError(f"none of the {len(files)} images can be used; the first: {skipped[files[0]]}")
    present = tuple(sorted(set(kinds.values()), key=lambda kind: (len(kind), kind)))
    return [_Picture(file, kind) for file, kind in listed.items()], present, skipped


def _kinds(root: Path, files: Sequence[str], lists: Path | None, xml: Path | None) -> dict[str, str]:
    """Look up stem -> class for a flat folder: Kaggle's list, else WSOL's, whose classes are numbers, else XML files.

    Raises:
        FileNotFoundError: there is neither.
    """
    for place in (root, root.absolute().parent):
        if (place / "LOC_val_solution.csv").is_file():
            return _solution(place / "LOC_val_solution.csv")
    if lists is not None:
        return {Path(name).stem: str(label) for name, label in listed_labels(lists).items()}
    if xml is not None:
        objects = {Path(f).stem: _objects(path)[1] for f in files if (path := _xml_file(xml, f)).is_file()}
        return {stem: names[0] for stem, names in objects.items() if names}
    raise FileNotFoundError(f"no LOC_val_solution.csv in {root}, so its images have no class; expected {LAYOUT}")


def _solution(path: Path) -> dict[str, str]:
    """Read image -> wnid of Kaggle's list, whose lines are `image,wnid x0 y0 x1 y1 wnid ...`."""
    kinds: dict[str, str] = {}
    with path.open(newline="") as lines:
        for row in csv.reader(lines):
            words = row[1].split() if len(row) == 2 else []
            if row and row[0] != "ImageId":
                if not words or not _WNID.fullmatch(words[0]):
                    raise ValueError(f"{path} is damaged: {','.join(row)!r}; expected lines image,wnid x0 y0 x1 y1 ...")
                kinds[row[0]] = words[0]
    return kinds


def _kept(present: tuple[str, ...], classes: int | Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes to read, in the order of their labels."""
    if classes is None or isinstance(classes, int):
        return present[: known_count(len(present), classes, "classes")]
    kept = tuple(classes)
    if isinstance(classes, str) or len(set(kept)) < len(kept) or not set(kept) & set(present):
        examples = f"{present[0]} to {present[-1]}"
        raise ValueError(f"classes are wnids, each once; there are {examples}, got {classes!r}")
    return kept


def _excluded(path: Path) -> dict[str, str]:
    """Read the images to pass over: their stems, and why."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected the numbers of validation images, one a line")
    words = path.read_text().split()
    stems = [f"ILSVRC2012_val_{int(word):08d}" if word.isdecimal() else Path(word).stem for word in words]
    return dict.fromkeys(stems, f"excluded by {path}")


def _without(pictures: Sequence[_Picture], reasons: Mapping[str, str], skipped: dict[str, str]) -> list[_Picture]:
    """Leave out the pictures that there is a reason against, and record them in `skipped`."""
    skipped.update({file: f"{file} is {reason}" for file, reason in reasons.items() if reason})
    rest = [p for p in pictures if not reasons[p.file]]
    if pictures and not rest:
        raise ValueError(f"none of the {len(pictures)} images can be used; the first: {skipped[pictures[0].file]}")
    return rest


def _images(folder: Path) -> list[str]:
    """List the names of the images in a folder."""
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    return sorted(name for name in names if not name.startswith("."))


def _variant(root: Path) -> Path:
    """Find the folder of the numbered folders."""
    if any(f.name.isdecimal() for f in root.iterdir()):
        return root
    variants = sorted(f for f in (*root.glob("val2"), *root.glob("imagenetv2-*")) if f.is_dir())
    if len(variants) > 1:
        raise ValueError(f"{root} holds several variants; give one of them: {', '.join(f.name for f in variants)}")
    return first_folder(variants, "0", root, LAYOUT_V2)


def _xml_file(xml: Path, file: str) -> Path:
    """Say where the annotation of an image is: flat, or in a folder by wnid."""
    stem, flat = Path(file).stem, xml / f"{Path(file).stem}.xml"
    return flat if flat.is_file() else xml / (Path(file).parent.name or stem.partition("_")[0]) / f"{stem}.xml"


def _marks_of_xml(xml: Path, numbers: Mapping[str, int], origin: int, file: str, label: int) -> Marks:
    """Read the boxes of one image, half-open from pixel 0; corners in the wrong order are put right."""
    corners, names, size = _objects(_xml_file(xml, file))
    ordered = corners.reshape(-1, 2, 2).sort(1).values.reshape(-1, 4)
    boxes = ordered - origin + ordered.new_tensor([0, 0, 1, 1])
    labels = torch.tensor([numbers.get(name, -1) for name in names], dtype=torch.long)
    return Marks(boxes, None if (labels == label).all() else labels, size)


def _objects(path: Path) -> tuple[torch.Tensor, list[str], Size | None]:
    """Read an annotation: corners as they are written, names, and the picture's height and width if they are there.

    Raises:
        ValueError: it is damaged.
    """
    try:
        top = ElementTree.parse(path).getroot()
        width, height = (int(top.findtext(f"size/{name}", "0")) for name in ("width", "height"))
        things = top.findall("object")
        corners = [[float(_word(o, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")] for o in things]
        names = [_word(o, "name").strip() for o in things]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; expected an annotation with objects of name and bndbox"
        ) from error
    return torch.tensor(corners).reshape(-1, 4), names, (height, width) if width > 0 and height > 0 else None


def _word(element: ElementTree.Element, path: str) -> str:
    """Return the text of a tag inside an element."""
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path} in an object")
    return text
