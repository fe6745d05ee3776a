"""Average drop, average increase, average gain.

Chattopadhay et al., Grad-CAM++, WACV 2018 (drop and increase); Zhang et al., Opti-CAM, CVIU 2024, section 5.1 (gain).
p is the probability of the scored class on the image, o on the image seen through the map; all in float64.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sightline.classifier import probability
from sightline.data import Sample
from sightline.erase import Eraser, mix, resolve
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.registry import chosen, unknown
from sightline.types import Saliency, Values

Compare: TypeAlias = Callable[[Values, Values], Values]

Region: TypeAlias = Literal["map", "map_in_box", "map_outside_box", "box", "outside_box"]
On: TypeAlias = Literal["boxes", "mask"]

REGIONS: Mapping[Region, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "map": lambda S, inside, outside: S,
    "map_in_box": lambda S, inside, outside: S * inside,
    "map_outside_box": lambda S, inside, outside: S * outside,
    "box": lambda S, inside, outside: inside.to(S.dtype),
    "outside_box": lambda S, inside, outside: outside.to(S.dtype),
}
"""The mask of the box study (Opti-CAM, Table 5): S, B and S, S without B, B, I without B."""


def drop(p: Values, o: Values) -> Values:
    """Return 100 [p - o]_+ / p, each in [0, 100]; 0 where p = 0: what is not there cannot drop."""
    return 100 * torch.where(p > 0, (p - o).clamp(min=0) / torch.where(p > 0, p, 1), 0)


def increase(p: Values, o: Values) -> Values:
    """Return 100 where o > p and 0 elsewhere."""
    return 100 * (o > p).to(p.dtype)


def gain(p: Values, o: Values) -> Values:
    """Return 100 [o - p]_+ / (1 - p), each in [0, 100]; 0 where p = 1: there is nothing left to gain."""
    return 100 * torch.where(p < 1, (o - p).clamp(min=0) / torch.where(p < 1, 1 - p, 1), 0)


def average_drop(
    *,
    erase: Eraser = "black",
    exponent: float = 1.0,
    region: Region = "map",
    on: On = "boxes",
    scored: Scored = "label",
) -> Measure:
    """Measure AD = mean 100 [p - o]_+ / p, in percent, lower is better (Opti-CAM, eq 14).

    `exponent` is the power to which the map is raised before masking (the selectivity study). The hidden part shows
    `erase`; black in [0, 1] as in the official code.

    `region` says what the image is seen through (the box study, Table 5), where S is the map and B the union of the
    scored class's boxes: the map S; `map_in_box` S 1_B; `map_outside_box` S (1 - 1_B); `box` 1_B; `outside_box`
    1 - 1_B. A pixel is in B if its center is in a box. With on="mask", B is the object's exact pixels, and ignored
    pixels (255) are neither inside nor outside. An image in which B has no pixel (no box of the class, or none within
    the picture) does not count.

    Raises:
        LookupError: an unknown region, or `on`.
        ValueError: an exponent not above zero, an unknown scored class, or an image without the annotation.
    """
    return compared(drop, erase, exponent, region, on, scored, higher_is_better=False)


def average_increase(
    *,
    erase: Eraser = "black",
    exponent: float = 1.0,
    region: Region = "map",
    on: On = "boxes",
    scored: Scored = "label",
) -> Measure:
    """Measure AI = mean 100 1[p < o], in percent, higher is better (Opti-CAM, eq 15); see `average_drop`."""
    return compared(increase, erase, exponent, region, on, scored, higher_is_better=True)


def average_gain(
    *,
    erase: Eraser = "black",
    exponent: float = 1.0,
    region: Region = "map",
    on: On = "boxes",
    scored: Scored = "label",
) -> Measure:
    """Measure AG = mean 100 [o - p]_+ / (1 - p), in percent, higher is better (Opti-CAM, eq 13); see `average_drop`."""
    return compared(gain, erase, exponent, region, on, scored, higher_is_better=True)


def compared(
    compare: Compare,
    erase: Eraser,
    exponent: float,
    region: Region,
    on: On,
    scored: Scored,
    *,
    higher_is_better: bool,
) -> Measure:
    """Return the measure that compares p with o."""
    if exponent <= 0:
        raise ValueError(f"expected exponent > 0, got {exponent}")
    if region not in REGIONS:
        raise LookupError(unknown(region, REGIONS, "region"))
    chosen(on, OBJECTS, "annotation")
    check_scored(scored)

    def score(case: Case) -> Tensor:
        if region == "map":
            return compare(case.probability(), case.masked_probability(erase, exponent))
        o = case.once(
            ("masked", erase, exponent, region, on), lambda: region_probability(case, erase, exponent, region, on)
        )
        return torch.where(o.isnan(), torch.nan, compare(case.probability(), o))

    return Measure(score, higher_is_better, scored)


def region_probability(case: Case, erase: Eraser, exponent: float, region: Region, on: On) -> Values:
    """Return the scored class's probability on the image seen through a region; NaN where B is empty."""
    found = [OBJECTS[on](sample, label) for sample, label in zip(case.batch.samples, case.y.tolist(), strict=True)]
    inside, outside = (torch.stack(masks).to(case.x.device)[:, None] for masks in zip(*found, strict=True))
    mask: Saliency = REGIONS[region](case.saliency**exponent, inside, outside)
    o = probability(case.classifier(mix(case.x, mask, resolve(erase, case.classifier.mean))).double(), case.y)
    return torch.where(inside.flatten(1).any(1), o, torch.nan)


Sides: TypeAlias = tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]
"""The pixels inside an object, and those outside."""


def boxed(sample: Sample, label: int) -> Sides:
    """Return the pixels inside and outside the union of a class's boxes."""
    boxes = sample.boxes_of(label)
    if boxes is None:
        raise ValueError(f"a region of on='boxes' needs boxes, and {sample.id!r} has none; use region='map'")
    inside = covered(boxes, (sample.image.shape[1], sample.image.shape[2]))
    return inside, ~inside


def drawn(sample: Sample, label: int) -> Sides:
    """Return the pixels of a class in the mask, and those of anything else; ignored ones are in neither."""
    region = sample.region_of(label)
    if region is None:
        raise ValueError(f"a region of on='mask' needs a mask, and {sample.id!r} has none; use on='boxes'")
    inside, counts = region
    return inside & counts, ~inside & counts


OBJECTS: Mapping[str, Callable[[Sample, int], Sides]] = {"boxes": boxed, "mask": drawn}


def covered(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """Mark the pixels whose center lies in a half-open box x0 y0 x1 y1."""
    rows, columns = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    return (((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]).any(0)
