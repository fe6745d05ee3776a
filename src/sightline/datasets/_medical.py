"""Medical images. Pogorelov et al., Kvasir, MMSys 2017; Kermany et al., chest X-rays of children, Cell, 2018."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from sightline.datasets._folder import Folder, folder, known_folder, known_size, spread, usable
from sightline.images import Size
from sightline.registry import unknown

KVASIR = (
    "dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus", "normal-z-line",
    "polyps", "ulcerative-colitis",
)  # fmt: skip
"""The classes of Kvasir, which are its folders."""

X_RAYS = ("NORMAL", "PNEUMONIA")
SPLITS = ("train", "val", "test")
KVASIR_LAYOUT = f"root/kvasir-dataset-v2 (or root/kvasir-dataset, or root) with *.jpg in {', '.join(KVASIR)}"
X_RAY_LAYOUT = "root/chest_xray (or root) with train, val and test, each with *.jpeg in NORMAL and PNEUMONIA"


def kvasir(
    root: str | Path,
    split: str = "test",
    *,
    listing: str | Path | None = None,
    seed: int = 0,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Folder:
    """Read Kvasir (version 1, of 4,000 images, or 2, of 8,000): 8 classes, no boxes.

    There are no official splits. Here the files of a class are put in the order of the SHA-256 of "seed/class/file";
    of n the first n // 8 are the test split, the next n // 8 the validation split, the rest is for training. Of
    version 2 that is 6000/1000/1000, the sizes that Zhang et al., Opti-CAM, CVIU 2024, give.

    *Differs:* Opti-CAM does not say which images are in its splits, so they are others.

    Args:
        root: the folder.
        split: "train", "val" or "test".
        listing: a text file with the images to take, a line each as `class/file.jpg`, instead of a split.
        seed: of the splits.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how files are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, a class or the list is missing.
        LookupError: an unknown split, policy or check.
        ValueError: a list that names other files, no file can be used, or a count outside 1 to the number of files.
    """
    if split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of Kvasir"))
    known_size(size, resize)
    home = known_folder(root, KVASIR_LAYOUT)
    for name in ("kvasir-dataset-v2", "kvasir-dataset-v1", "kvasir-dataset"):
        home = home / name if (home / name).is_dir() else home
    whole = _whole(home, KVASIR, KVASIR_LAYOUT, size=size, resize=resize)
    named = _share(whole, split, seed) if listing is None else _named(whole, Path(listing).expanduser())
    files, skipped = usable(home, [named[index] for index in spread(len(named), count)], check)
    return replace(whole, files=files, labels=_labels(files), skipped={**whole.skipped, **skipped})


def chest_xray(
    root: str | Path,
    split: str = "test",
    *,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Folder:
    """Read chest X-rays of children, normal or with pneumonia, in the splits of 5216, 16 and 624 images; no boxes.

    Args:
        root: the folder.
        split: "train", "val" or "test".
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how files are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or a split or class is missing in it.
        LookupError: an unknown split, policy or check.
        ValueError: no file can be used, or a count outside 1 to the number of files.
    """
    if split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of the chest X-rays"))
    home = known_folder(root, X_RAY_LAYOUT)
    for _ in range(2):  # the archive holds chest_xray/chest_xray
        home = home / "chest_xray" if (home / "chest_xray").is_dir() else home
    if not (home / split).is_dir():
        raise FileNotFoundError(f"no {split} in {home}; expected {X_RAY_LAYOUT}")
    _whole(home / split, X_RAYS, X_RAY_LAYOUT, size=size, resize=resize)
    return folder(home / split, size=size, resize=resize, count=count, check=check)


def _whole(home: Path, classes: tuple[str, ...], layout: str, *, size: int | Size, resize: str) -> Folder:
    """List all files of a folder whose folders are these classes.

    Raises:
        FileNotFoundError: a class is missing, or there is one more.
    """
    if missing := [name for name in classes if not (home / name).is_dir()]:
        raise FileNotFoundError(f"no {missing[0]} in {home}; expected {layout}")
    whole = folder(home, size=size, resize=resize, check="none")
    if strangers := sorted(set(whole.classes) - set(classes)):
        raise FileNotFoundError(f"no class {strangers[0]} belongs in {home}; expected {layout}")
    return whole


def _share(whole: Folder, split: str, seed: int) -> list[str]:
    """Return the files of a split, in their order."""
    taken: set[str] = set()
    for label in range(len(KVASIR)):
        own = [file for file, of in zip(whole.files, whole.labels, strict=True) if of == label]
        own.sort(key=lambda file: sha256(f"{seed}/{file}".encode()).hexdigest())
        eighth = len(own) // 8
        taken |= set({"test": own[:eighth], "val": own[eighth : 2 * eighth], "train": own[2 * eighth :]}[split])
    return [file for file in whole.files if file in taken]


def _named(whole: Folder, path: Path) -> list[str]:
    """Return the files that a list names.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: it names a file that is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}; expected lines like polyps/picture.jpg")
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; expected lines like polyps/picture.jpg") from error
    if strangers := sorted(set(lines) - set(whole.files)):
        raise ValueError(f"{path} names {strangers[0]}, which is not in {whole.root}; write class/file.jpg")
    return list(dict.fromkeys(lines))


def _labels(files: tuple[str, ...]) -> tuple[int, ...]:
    """Read the classes off the folders."""
    return tuple(KVASIR.index(file.split("/", 1)[0]) for file in files)
