"""Data sets. Readers of images with their annotations, by name; nothing is imported before it is called.

Every reader returns an `Indexed` of `Sample`s with `.classes` and `.skipped` (file -> why it could not be used).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sightline.registry import load as _load

if TYPE_CHECKING:
    from sightline.data import Dataset
    from sightline.datasets._creatures import creatures as creatures
    from sightline.datasets._cub import PARTS as PARTS
    from sightline.datasets._cub import cub_crops as cub_crops
    from sightline.datasets._folder import folder as folder
    from sightline.datasets._mnist import mnist as mnist


@dataclass(frozen=True)
class Entry:
    """A data set of the catalogue; calling it calls the reader."""

    load: str
    """Where the reader is: `package.module:name`."""
    summary: str
    licence: str
    """What the images may be used for."""
    needs_root: bool
    """Whether the first argument is the folder that holds the files."""

    def __call__(self, *arguments: Any, **settings: Any) -> "Dataset":
        """Import the reader and call it."""
        dataset: Dataset = _load(self.load)(*arguments, **settings)
        return dataset


DATASETS: Mapping[str, Entry] = MappingProxyType(
    {
        "creatures": Entry(
            "sightline.datasets._creatures:creatures",
            "drawn creatures of 20 classes whose parts, and so the truth of a map, are known",
            "Apache-2.0, generated",
            needs_root=False,
        ),
        "folder": Entry(
            "sightline.datasets._folder:folder",
            "your own images: root/class/picture.jpg, or one folder of pictures without classes",
            "yours",
            needs_root=True,
        ),
        "mnist": Entry(
            "sightline.datasets._mnist:mnist",
            "handwritten digits, 28 x 28, with the ink as mask",
            "CC BY-SA 3.0",
            needs_root=True,
        ),
        "cub_crops": Entry(
            "sightline.datasets._cub:cub_crops",
            "CUB-200-2011 birds cut out at their boxes, with 15 keypoints and 312 attributes",
            "non-commercial research and education only",
            needs_root=True,
        ),
    }
)
"""Name -> data set."""

_HOMES = {name: entry.load for name, entry in DATASETS.items()} | {"PARTS": "sightline.datasets._cub:PARTS"}

__all__ = ["DATASETS", "PARTS", "Entry", "creatures", "cub_crops", "folder", "mnist"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_HOMES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
