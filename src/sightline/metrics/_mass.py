"""Mass. The share of a map that lies on what it should lie on.

The energy of the pointing game of Wang et al., Score-CAM, CVPR workshop 2020, on masks and points instead of boxes.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from sightline.data import Sample
from sightline.maps import resize, unit
from sightline.metrics._measure import Case, Measure
from sightline.registry import unknown

Target: TypeAlias = Literal["object", "cue", "points"]


def mass(*, on: Target = "object", radius: float = 15 / 224) -> Measure:
    """Measure 100 sum_R S / sum S, in percent, higher is better; R is what an image's annotation gives.

    S = n([A]_+), A the raw map at the input's resolution: what speaks for the class, scaled to [0, 1]; a map without
    any has no mass on anything. `on`: "object", the pixels of the label in the sample's mask (255 is left out of both
    sums); "cue", what tells the label from the nearest classes; "points", the discs of `radius` shorter sides around
    the visible keypoints.

    Raises:
        LookupError: an unknown target.
        ValueError: a radius not above zero, or an image without the annotation.
    """
    if on not in REGIONS:
        raise LookupError(unknown(on, REGIONS, "target"))
    if radius <= 0:
        raise ValueError(f"expected radius > 0 shorter sides, got {radius}")

    def score(case: Case) -> Tensor:
        size = (case.x.shape[2], case.x.shape[3])
        varies = (case.raw.flatten(1).amin(1) < case.raw.flatten(1).amax(1))[:, None, None]
        S = torch.where(varies, unit(resize(case.raw, size).clamp(min=0).double())[:, 0], 0)
        found = [REGIONS[on](sample, radius) for sample in case.batch.samples]
        inside, counted = (torch.stack(masks).to(S.device) for masks in zip(*found, strict=True))
        whole = (S * counted).sum((1, 2))
        return 100 * (S * inside).sum((1, 2)) / torch.where(whole > 0, whole, 1)

    return Measure(score, higher_is_better=True)


Region: TypeAlias = tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]
"""The pixels of the target, and those that count."""


def object_of(sample: Sample, radius: float) -> Region:
    """Return the pixels of the label's object, and all that are not ignored."""
    region = None if sample.label is None else sample.region_of(sample.label)
    if region is None:
        raise ValueError(f"mass(on='object') needs a mask and a label, and {sample.id!r} lacks one of them")
    return region


def cue_of(sample: Sample, radius: float) -> Region:
    """Return the pixels that tell the label from the nearest classes, and all."""
    if sample.cue is None:
        raise ValueError(f"mass(on='cue') needs a cue, and {sample.id!r} has none; creatures have")
    return sample.cue, torch.ones_like(sample.cue)


def points_of(sample: Sample, radius: float) -> Region:
    """Return the pixels near a visible keypoint, and all."""
    if sample.keypoints is None:
        raise ValueError(f"mass(on='points') needs keypoints, and {sample.id!r} has none")
    h, w = sample.image.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    x, y = (column[:, None, None] for column in sample.keypoints[sample.keypoints[:, 2] > 0, :2].unbind(1))
    near = ((columns - x) ** 2 + (rows - y) ** 2 < (radius * min(h, w)) ** 2).any(0)
    return near, torch.ones_like(near)


REGIONS: Mapping[str, Callable[[Sample, float], Region]] = {"object": object_of, "cue": cue_of, "points": points_of}
