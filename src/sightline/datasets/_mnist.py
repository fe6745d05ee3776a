"""MNIST. LeCun, Cortes and Burges, 1998: 60,000 and 10,000 handwritten digits of 28 x 28 pixels."""

import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import known_count, known_folder
from sightline.images import Size, as_image, as_size, fit
from sightline.registry import unknown

PREFIXES = {"train": "train", "test": "t10k"}
LAYOUT = (
    "root/MNIST/raw (or root/raw, or root) with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they are or as .gz"
)


@dataclass(frozen=True, eq=False)
class Digits:
    """Digits of one split, held in memory in 8 bits."""

    pixels: UInt8[Tensor, "n h w"]
    labels: UInt8[Tensor, " n"]
    split: str
    size: Size
    classes: tuple[str, ...] = tuple("0123456789")
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Sample:
        """Resize one digit and mark its ink."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} digits, got index {index}")
        index %= len(self)
        label, original = int(self.labels[index]), (self.pixels.shape[1], self.pixels.shape[2])
        image = fit(as_image(self.pixels[index]), self.size, "direct")
        mask = (image[0] > 0.5).long() * (label + 1)
        return Sample(f"{self.split}/{index:05d}", image, label=label, mask=mask, size=original)


def mnist(root: str | Path, split: str = "test", *, size: int | Size = 28, count: int | None = None) -> Digits:
    """Read MNIST: white ink on black, three equal channels, squashed to `size` with the "direct" policy.

    `mask` is label + 1 where the resized image is brighter than one half, 0 elsewhere. The files are read unpacked or
    as .gz (torchvision takes the former only); `count` takes the first so many.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        LookupError: a split other than "train" and "test".
        ValueError: a damaged file, or a count outside 1 to the number of images.
    """
    if split not in PREFIXES:
        raise LookupError(unknown(split, PREFIXES, "split of MNIST"))
    raw = _raw(known_folder(root, LAYOUT), PREFIXES[split])
    pixels = _idx(raw, f"{PREFIXES[split]}-images-idx3-ubyte", 3)
    labels = _idx(raw, f"{PREFIXES[split]}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels):
        raise ValueError(f"{raw} holds {len(pixels)} images but {len(labels)} labels of {split!r}; fetch them again")
    count = known_count(len(labels), count, "images")
    return Digits(pixels[:count], labels[:count], split, as_size(size))


def _raw(root: Path, prefix: str) -> Path:
    """Find the folder with the files of a split."""
    for home in (root / "MNIST" / "raw", root / "raw", root):
        if any(home.glob(f"{prefix}-images-idx3-ubyte*")):
            return home
    raise FileNotFoundError(f"no {prefix}-images-idx3-ubyte in {root}; expected {LAYOUT}")


def _idx(folder: Path, name: str, axes: int) -> UInt8[Tensor, "..."]:
    """Read an idx file of bytes: 0 0 8 axes, the sizes as big-endian uint32, the bytes.

    Raises:
        FileNotFoundError: no such file, packed or not.
        ValueError: it is damaged.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {folder}; expected {LAYOUT}")
    try:
        data = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from error
    start = 4 + 4 * axes
    shape = np.frombuffer(data[4:start].ljust(4 * axes, b"\0"), ">u4").tolist()
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) != start + math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(data)} bytes are no idx file of {axes} axes; fetch it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
