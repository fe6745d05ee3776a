"""MNIST segmentation. Maruf, Daw, Dutta, Bu and Karpatne, 2023, appendix B.1.1: enlarged digits, their ink as mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.nn.functional import interpolate

from sightline.data import Sample
from sightline.datasets._mnist import Digits, mnist
from sightline.images import Size, as_image, as_size


@dataclass(frozen=True, eq=False)
class SegmentedDigits:
    """Digits of one split with their ink, enlarged when they are asked for."""

    digits: Digits
    size: Size

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the digits."""
        return self.digits.classes

    @property
    def skipped(self) -> Mapping[str, str]:
        """Nothing: the files are read whole."""
        return self.digits.skipped

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int, /) -> Sample:
        """Enlarge one digit and mark its ink."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} digits, got index {index}")
        index %= len(self)
        pixels, label = self.digits.pixels[index], int(self.digits.labels[index])
        grown = interpolate(pixels[None, None].float(), self.size, mode="nearest-exact")[0, 0].byte()
        mask = (grown > 0).long() * (label + 1)
        name, original = f"{self.digits.split}/{index:05d}", (pixels.shape[0], pixels.shape[1])
        return Sample(name, as_image(grown), label=label, mask=mask, size=original)


def mnist_segmentation(
    root: str | Path, split: str = "test", *, size: int | Size = 128, count: int | None = None
) -> SegmentedDigits:
    """Read MNIST for segmentation: white ink on black, three equal channels, enlarged by nearest neighbor.

    `mask` is label + 1 at every pixel that is not zero, 0 elsewhere. Files as for `mnist`; `count` takes the first so
    many.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        LookupError: a split other than "train" and "test".
        ValueError: a damaged file, a size below one pixel, or a count outside 1 to the number of images.
    """
    return SegmentedDigits(mnist(root, split, count=count), as_size(size))
