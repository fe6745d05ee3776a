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
    from sightline.datasets._coco import coco as coco
    from sightline.datasets._creatures import creatures as creatures
    from sightline.datasets._cub import PARTS as PARTS
    from sightline.datasets._cub import cub_crops as cub_crops
    from sightline.datasets._cub_full import cub as cub
    from sightline.datasets._cub_full import cub_v2 as cub_v2
    from sightline.datasets._folder import folder as folder
    from sightline.datasets._imagenet import imagenet as imagenet
    from sightline.datasets._imagenet import imagenet_v2 as imagenet_v2
    from sightline.datasets._medical import chest_xray as chest_xray
    from sightline.datasets._medical import kvasir as kvasir
    from sightline.datasets._mnist import mnist as mnist
    from sightline.datasets._mnist_segmentation import mnist_segmentation as mnist_segmentation
    from sightline.datasets._openimages import openimages30k as openimages30k
    from sightline.datasets._pets import pets as pets
    from sightline.datasets._voc import voc as voc


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
        "mnist_segmentation": Entry(
            "sightline.datasets._mnist_segmentation:mnist_segmentation",
            "handwritten digits of 128 x 128 pixels, nearest, the ink as mask",
            "CC BY-SA 3.0",
            needs_root=True,
        ),
        "imagenet": Entry(
            "sightline.datasets._imagenet:imagenet",
            "ImageNet (ILSVRC 2012): folders by wnid, boxes from XML or WSOL metadata",
            "ImageNet terms: non-commercial research and education",
            needs_root=True,
        ),
        "imagenet_v2": Entry(
            "sightline.datasets._imagenet:imagenet_v2",
            "ImageNetV2 with the boxes of the WSOL benchmark",
            "MIT; images under their Flickr licences",
            needs_root=True,
        ),
        "cub": Entry(
            "sightline.datasets._cub_full:cub",
            "CUB-200-2011 birds in full frames: boxes, parts, attributes, segmentations",
            "non-commercial research and education only",
            needs_root=True,
        ),
        "cub_v2": Entry(
            "sightline.datasets._cub_full:cub_v2",
            "CUBV2: five or so birds a class, the validation boxes of the WSOL benchmark",
            "images under their Flickr licences",
            needs_root=True,
        ),
        "openimages30k": Entry(
            "sightline.datasets._openimages:openimages30k",
            "OpenImages30k, masks of 100 classes of the WSOL benchmark",
            "annotations CC BY 4.0; images CC BY 2.0",
            needs_root=True,
        ),
        "voc": Entry(
            "sightline.datasets._voc:voc",
            "Pascal VOC 2007 and 2012: boxes or segmentations of 20 classes",
            "Flickr terms",
            needs_root=True,
        ),
        "coco": Entry(
            "sightline.datasets._coco:coco",
            "COCO 2014 and 2017: boxes and masks of 80 classes",
            "annotations CC BY 4.0; images under their Flickr licences",
            needs_root=True,
        ),
        "pets": Entry(
            "sightline.datasets._pets:pets",
            "Oxford-IIIT Pets: 37 breeds, trimaps and head boxes",
            "CC BY-SA 4.0",
            needs_root=True,
        ),
        "kvasir": Entry(
            "sightline.datasets._medical:kvasir",
            "Kvasir: endoscopy of the gastrointestinal tract, 8 classes",
            "research and education only",
            needs_root=True,
        ),
        "chest_xray": Entry(
            "sightline.datasets._medical:chest_xray",
            "chest X-rays of children, normal or pneumonia",
            "CC BY 4.0",
            needs_root=True,
        ),
    }
)
"""Name -> data set."""

_HOMES = {name: entry.load for name, entry in DATASETS.items()} | {"PARTS": "sightline.datasets._cub:PARTS"}

__all__ = ["DATASETS", "PARTS", "Entry", *DATASETS]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_HOMES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
