"""Dead cells. Where in the explained layer nothing is active.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, section 3.3: a non-activated pixel has CAM 0, and a gradient only where its
contribution window reaches an activated one.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import interpolate

from sightline.classifier import Absent
from sightline.data import Sample
from sightline.metrics._measure import Case, Measure
from sightline.registry import chosen

Of: TypeAlias = Literal["image", "object", "background"]


def dead_cells(*, of: Of = "image") -> Measure:
    """Measure 100 |{cells p : A_kp = 0 for all channels k}| / |{cells p}|, in percent; neither good nor bad.

    A is the output of the layer that is explained: one behind a ReLU has dead cells, others hardly ever. The map plays
    no part. `of` says which cells are counted: those of the "image", of the "object" (where the pixel nearest to the
    middle of the cell is of the label in the sample's mask) or of the "background" (where it is 0; 255 is neither). An
    image without such a cell does not count.

    Raises:
        LookupError: an unknown `of`.
        UnsuitedError: there is no classifier.
        ValueError: an object or a background is asked for, and an image has no mask (or no label).
    """
    part = chosen(of, PARTS, "part of the image")

    def score(case: Case) -> Tensor:
        dead = (features(case) == 0).all(1)
        cells = torch.stack([nearest(part(one), dead) for one in case.batch.samples]).to(dead.device)
        return 100 * (dead & cells).sum((1, 2)).double() / cells.sum((1, 2))

    return Measure(score, higher_is_better=None)


def features(case: Case) -> Tensor:
    """Return the explained layer's output.

    Raises:
        UnsuitedError: there is no classifier.
    """
    if isinstance(case.classifier.model, Absent):
        case.classifier(case.x)
    return case.once("features", lambda: case.classifier.features(case.x))


def nearest(region: Bool[Tensor, "h w"], dead: Bool[Tensor, "b i j"]) -> Bool[Tensor, "i j"]:
    """Return which cells have the pixel nearest to their middle in a region."""
    return interpolate(region[None, None].float(), dead.shape[1:], mode="nearest-exact")[0, 0] > 0


def whole(sample: Sample) -> Bool[Tensor, "h w"]:
    """Return all pixels."""
    return torch.ones(sample.image.shape[1:], dtype=torch.bool)


def object_of(sample: Sample) -> Bool[Tensor, "h w"]:
    """Return the pixels of the label's object.

    Raises:
        ValueError: no mask, or no label.
    """
    region = None if sample.label is None else sample.region_of(sample.label)
    if region is None:
        raise ValueError(f"dead_cells(of='object') needs a mask and a label, and {sample.id!r} lacks one of them")
    return region[0]


def background_of(sample: Sample) -> Bool[Tensor, "h w"]:
    """Return the pixels of no object.

    Raises:
        ValueError: no mask.
    """
    if sample.mask is None:
        raise ValueError(f"dead_cells(of='background') needs a mask, and {sample.id!r} has none")
    return sample.mask == 0


PARTS: Mapping[str, Callable[[Sample], Bool[Tensor, "h w"]]] = {
    "image": whole,
    "object": object_of,
    "background": background_of,
}
