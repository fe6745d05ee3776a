"""OpenImages30k. Choe, Oh, Lee, Chun, Akata and Shim, CVPR 2020: 100 classes of Open Images V5 with masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import known_folder, known_size, spread, usable
from sightline.datasets._geometry import moved, stored
from sightline.datasets._wsol import (
    first_folder,
    label_of,
    list_folder,
    listed_ids,
    listed_labels,
    listed_masks,
    marked,
)
from sightline.images import Size
from sightline.registry import unknown

SPLITS = ("train", "val", "test")
LAYOUT = (
    "root/OpenImages/<split>/<class>/picture.jpg (or root/<split>/...), the masks beside the pictures or in masks=..., "
    "and metadata/OpenImages/<split> of the WSOL benchmark (https://github.com/clovaai/wsolevaluation)"
)


@dataclass(frozen=True, eq=False)
class Masked:
    """Images of one split with the files of their masks; `labels` are indices into `classes`."""

    root: Path
    mask_root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    masks: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] | None
    """File -> masks of the objects, masks of what to ignore; None in the training split."""
    classes: tuple[str, ...]
    skipped: Mapping[str, str]
    size: Size
    resize: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode and resize one image, and its mask along.

        Raises:
            ImageError: the file is broken, and was not decoded when the data set was read; or a mask is.
        """
        file, label = self.files[index], self.labels[index]
        image = stored(self.root / file)
        original = (image.shape[1], image.shape[2])
        mask = None if self.masks is None else self._mask(*self.masks[file], label, original)
        thing = moved(image, self.size, self.resize, mask=mask)
        return Sample(file, thing.image, label=label, mask=thing.mask, size=original)

    def _mask(self, objects: tuple[str, ...], ignored: tuple[str, ...], label: int, size: Size) -> Int[Tensor, "h w"]:
        """Put the masks of an image together: objects lie over what is ignored."""
        mask = torch.zeros(size, dtype=torch.long)
        for name in ignored:
            mask[marked(self.mask_root / name, size)] = 255
        for name in objects:
            mask[marked(self.mask_root / name, size)] = label + 1
        return mask


def openimages30k(
    root: str | Path,
    split: str = "test",
    *,
    masks: str | Path | None = None,
    metadata: str | Path | None = None,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "header",
) -> Masked:
    """Read OpenImages30k of the WSOL benchmark.

    `mask` is label + 1 where any mask of the image is not zero, 255 where only the mask of what to ignore is, 0
    elsewhere; masks have sizes of their own and are brought to the image's by nearest neighbor first. The training
    split has no masks. An image without a line in localization.txt, or of which a mask file is missing, is skipped.

    Args:
        root: the folder.
        split: "train", "val" or "test".
        masks: the folder of the masks, if they do not lie beside the images.
        metadata: the folder of the WSOL benchmark's lists; None looks in `root/metadata` and beside `root`.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many files only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or no list in it.
        LookupError: an unknown split, policy or check.
        ValueError: a damaged list, no file can be used, or a count outside 1 to the number of files.
    """
    if split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of OpenImages30k"))
    base, target = known_folder(root, LAYOUT), known_size(size, resize)
    home = first_folder((base / "OpenImages" / split, base / split), split, base, LAYOUT).parent
    mask_root = home if masks is None else _mask_root(known_folder(masks, LAYOUT), split)
    lists = list_folder(base, metadata, f"OpenImages/{split}")
    ids, labels = listed_ids(lists), listed_labels(lists)
    numbers = [label_of(labels, name, lists) for name in ids]
    taken = {ids[index]: numbers[index] for index in spread(len(ids), count)}
    table = None if split == "train" else listed_masks(lists)
    skipped = {} if table is None else _unmasked(mask_root, list(taken), table, lists / "localization.txt")
    if len(skipped) == len(taken):
        raise ValueError(f"none of the {len(taken)} images can be used; the first: {next(iter(skipped.values()))}")
    files, broken = usable(home, [file for file in taken if file not in skipped], check)
    kept = None if table is None else {file: table[file] for file in files}
    names = _names(dict(zip(ids, numbers, strict=True)))
    found = tuple(taken[file] for file in files)
    return Masked(home, mask_root, files, found, kept, names, {**skipped, **broken}, target, resize)


def _mask_root(folder: Path, split: str) -> Path:
    """Take the folder of the splits or the one around it."""
    inner = folder / "OpenImages"
    return inner if (inner / split).is_dir() else folder


def _unmasked(
    mask_root: Path, files: list[str], table: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], path: Path
) -> dict[str, str]:
    """Name the images without a line, and those of which a mask file is not there."""
    skipped = {file: f"{file} is not in {path}" for file in files if file not in table}
    for file in files:
        gone = [name for names in table.get(file, ()) for name in names if not (mask_root / name).is_file()]
        if gone:
            skipped[file] = f"there is no mask {mask_root / gone[0]}, which {path} names for {file}"
    return skipped


def _names(numbers: Mapping[str, int]) -> tuple[str, ...]:
    """Name the classes after their folders; a number that no image has is its own name."""
    folders = {number: Path(file).parent.name for file, number in reversed(list(numbers.items()))}
    return tuple(folders.get(number) or str(number) for number in range(max(numbers.values()) + 1))
