"""Image folders. `root/class/picture.jpg`, or pictures without classes; and which files of a folder can be used."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from sightline.data import Sample
from sightline.images import POLICIES, ImageError, Size, as_size, fit, probe, read
from sightline.registry import unknown

AT_ONCE = 1024
"""How many files wait to be looked at, at most."""


@dataclass(frozen=True, eq=False)
class Folder:
    """Images of a folder; `labels` are indices into `classes`, or None."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int | None, ...]
    classes: tuple[str, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode and resize one image.

        Raises:
            ImageError: the file is broken, and was not decoded when the folder was read.
        """
        image = decoded(self.root / self.files[index])
        original = (image.shape[1], image.shape[2])
        return Sample(self.files[index], fit(image, self.size, self.resize), label=self.labels[index], size=original)


def folder(
    root: str | Path,
    *,
    size: int | Size = 224,
    resize: str = "direct",
    labels: bool = True,
    count: int | None = None,
    check: str = "decode",
) -> Folder:
    """Read a folder of images, in the order of torchvision's `ImageFolder`.

    The folders directly below `root` are the classes, sorted by name; if they hold no image, or with `labels=False`,
    images have no label. Its file endings count, and .gif; hidden files and folders are passed over. A class whose
    files are all broken, or whose folder is empty, keeps its number.

    Args:
        root: the folder.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        labels: False takes sub-folders as mere folders.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: "decode" reads every file once and skips the broken ones, "header" only opens them, "none" trusts them;
            what slips through raises `ImageError` when its sample is asked for.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        LookupError: an unknown policy or check.
        ValueError: no file can be used, or a count outside 1 to the number of files.
    """
    home, target = known_folder(root, "root/class/picture.jpg or root/picture.jpg"), known_size(size, resize)
    classes, found = _classes_and_files(home, labels)
    chosen = dict(found[index] for index in spread(len(found), count))
    files, skipped = usable(home, list(chosen), check)
    skipped |= _strays(home) if classes else {}
    return Folder(home, files, tuple(chosen[f] for f in files), classes, skipped, target, resize)


def known_folder(root: str | Path, layout: str) -> Path:
    """Return the folder if it is there.

    Raises:
        FileNotFoundError: no such folder; the message shows the layout.
    """
    home = Path(root).expanduser()
    if not home.is_dir():
        raise FileNotFoundError(f"there is no folder {home}; expected {layout}")
    return home


def known_size(size: int | Size, resize: str) -> Size:
    """Return `size` as height and width, and refuse an unknown policy before any file is read.

    Raises:
        LookupError: no such policy.
        ValueError: a size below one pixel.
    """
    if resize not in POLICIES:
        raise LookupError(unknown(resize, POLICIES, "resize policy"))
    return as_size(size)


def spread(total: int, count: int | None) -> list[int]:
    """Choose `count` of `total` indices, evenly spaced and always the same; None takes all.

    Raises:
        ValueError: a count outside 1 to `total`.
    """
    count = known_count(total, count, "images")
    return [i * total // count for i in range(count)]


def known_count(total: int, count: int | None, things: str) -> int:
    """Return how many things are asked for; None takes all.

    Raises:
        ValueError: there are none, or a count outside 1 to `total`.
    """
    if total == 0:
        raise ValueError(f"there are no {things} to choose from")
    count = total if count is None else count
    if not 1 <= count <= total:
        raise ValueError(f"there are {total} {things}, got {count}; ask for 1 to {total}")
    return count


def usable(root: Path, files: Sequence[str], check: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Separate the files that pass a check of `CHECKS` from those that do not, with the reasons.

    `AT_ONCE` files wait for a thread at a time; with "none" there is nothing to do.

    Raises:
        LookupError: no such check.
        ValueError: no file is left.
    """
    if check not in CHECKS:
        raise LookupError(unknown(check, CHECKS, "check"))
    if check == "none":
        return tuple(files), {}
    skipped, reason_of = dict[str, str](), partial(_reason, CHECKS[check])
    with ThreadPoolExecutor(4) as threads:
        for start in range(0, len(files), AT_ONCE):
            part = files[start : start + AT_ONCE]
            reasons = threads.map(reason_of, [root / file for file in part])
            skipped |= {file: reason for file, reason in zip(part, reasons, strict=True) if reason}
    if len(skipped) == len(files):
        raise ValueError(f"none of the {len(files)} images in {root} can be used; the first: {skipped[files[0]]}")
    return tuple(file for file in files if file not in skipped), skipped


def decoded(path: Path) -> Float[Tensor, "3 h w"]:
    """Read an image of a data set, and say how to pass over it if that fails.

    Raises:
        ImageError: the file is broken.
    """
    try:
        return read(path)
    except ImageError as error:
        raise ImageError(f"{error}; check='decode' skips such files") from error


CHECKS: Mapping[str, Callable[[Path], object]] = MappingProxyType({"decode": read, "header": probe, "none": Path})
"""How files are looked at before they are listed: decoded, opened, or not at all."""


def _reason(check: Callable[[Path], object], path: Path) -> str:
    """Say why a file cannot be used; nothing if it can."""
    try:
        check(path)
    except (ImageError, FileNotFoundError) as error:
        return str(error)
    return ""


def _classes_and_files(root: Path, labels: bool) -> tuple[tuple[str, ...], list[tuple[str, int | None]]]:
    """List images by class folders, or else without classes.

    Raises:
        FileNotFoundError: there is no image.
    """
    folders = tuple(sorted(f.name for f in root.iterdir() if f.is_dir() and not _hidden(f.name)))
    for classes in (folders, ()) if labels else ((),):
        if found := _files(root, classes):
            return classes, found
    endings = " ".join(_extensions())
    raise FileNotFoundError(f"no image in {root}; expected class/picture.jpg or picture.jpg, ending in {endings}")


def _files(root: Path, classes: Sequence[str]) -> list[tuple[str, int | None]]:
    """List images with their labels, relative to the root; without classes, all that lie below it."""
    from torchvision.datasets.folder import make_dataset

    home = root.resolve()
    base, numbers = (home, {c: i for i, c in enumerate(classes)}) if classes else (home.parent, {home.name: 0})
    pairs = make_dataset(base, numbers, extensions=_extensions(), allow_empty=True)
    names = [(Path(path).relative_to(home), label if classes else None) for path, label in pairs]
    return [(name.as_posix(), label) for name, label in names if not any(map(_hidden, name.parts))]


def _strays(root: Path) -> dict[str, str]:
    """Name the images that lie beside the class folders."""
    names = sorted(f.name for f in root.iterdir() if f.suffix.lower() in _extensions() and not _hidden(f.name))
    return {name: f"{root / name} lies beside the class folders; labels=false reads it" for name in names}


def _extensions() -> tuple[str, ...]:
    """Torchvision's list, and animations."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return (*IMG_EXTENSIONS, ".gif")


def _hidden(name: str) -> bool:
    """Tell what systems and tools leave behind."""
    return name.startswith((".", "__MACOSX"))
