"""Weak localization. A box from a map, with the threshold that is best on other images.

Fong and Vedaldi, Interpretable explanations of black boxes by meaningful perturbation, ICCV 2017, section 5.5.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches
from sightline.evaluation import cases
from sightline.maps import Rule, resize, span
from sightline.metrics import Case
from sightline.runs import Choice, Score
from sightline.types import Saliency

ALPHAS: Mapping[Rule, tuple[float, ...]] = MappingProxyType(
    {
        "value": tuple(step / 20 for step in range(20)),
        "energy": tuple(step / 20 for step in range(20)),
        "mean": tuple(step / 2 for step in range(21)),
    }
)
"""The grid of each rule."""


def weak_localization(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    held_out: Indexed[Sample],
    iou: float = 0.5,
    inclusive: bool = True,
    batch: int = 16,
) -> dict[str, Score]:
    """Return the share of images, in percent, whose box misses every true one; lower is better.

    The map of the label is cut at its own resolution by one of three rules (`maps.threshold`):

        value    h - min h >= alpha (max h - min h)                                         alpha = 0, .05, ..., .95
        energy   the longest run of cells, the highest first, of sum < alpha sum h          alpha = 0, .05, ..., .95
        mean     h >= alpha mean h                                                          alpha = 0, .5, ..., 10

    What is left is resized to the image (nearest), and the box is the tightest one around all of it, no components;
    the whole image where nothing is left. It is right if its IoU with any box of the label is at least `iou`. For each
    rule the alpha with the lowest error on `held_out` (of equal ones the smallest) is applied to `samples`.

    Parts: "value", "energy" and "mean", the errors on `samples`, each with the errors on `held_out` over alpha as its
    curve; "value_alpha" and so on, the alphas that were chosen, neither good nor bad. An image without a box of the
    label does not count. True boxes are not clipped: what a crop cut away still counts as area, and a box wholly
    outside the image, or without area, is always missed.

    `inclusive`: true boxes are sets of whole pixels, and one that they touch belongs to them; else their exact area
    counts. Both agree for boxes of whole pixels.

    *Differs:* the paper's boxes are scored at the size of the original picture, here at that of the classifier's input.

    Raises:
        ValueError: an IoU outside (0, 1], an image that is in both sets, one without boxes and mask, or no image of
            `held_out` that counts.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"expected iou in (0, 1], got {iou}")
    seen = set[tuple[str, bytes]]()

    def missed(some: Indexed[Sample], *, known: bool) -> Float[Tensor, "n alphas"]:
        found = []
        for case in cases(method, classifier, batches(some, batch), explain="label", scored="label"):
            register(case, seen, known=known)
            found.append(errors(case, iou, inclusive=inclusive))
        return torch.cat(found) if found else torch.zeros(0, sum(map(len, ALPHAS.values())))

    tuned = missed(held_out, known=False)
    curves = tuned.nanmean(0)
    if bool(curves.isnan().any()):
        raise ValueError("no image of held_out has a box of its label; there is nothing to choose the thresholds by")
    tested = missed(samples, known=True)
    parts: dict[str, Score] = {}
    for (rule, alphas), curve, error in zip(ALPHAS.items(), by_rule(curves), by_rule(tested), strict=True):
        best = int(curve.argmin())
        chosen = error[:, best]
        count = int((~chosen.isnan()).sum())
        held = tuple(curve.tolist())
        parts[rule] = Score(Choice(rule), float(chosen.nanmean()), False, tuple(chosen.tolist()), held, alphas, count)
        parts[f"{rule}_alpha"] = Score(Choice(f"{rule}_alpha"), alphas[best], None)
    return parts


def by_rule(numbers: Float[Tensor, "*n alphas"]) -> tuple[Tensor, ...]:
    """Split numbers of all alphas into those of each rule."""
    return torch.split(numbers, [len(alphas) for alphas in ALPHAS.values()], dim=-1)


def register(case: Case, seen: set[tuple[str, bytes]], *, known: bool) -> None:
    """Remember the images on which thresholds are chosen; check that those to be tested are others.

    Raises:
        ValueError: an image that is in both sets.
    """
    for sample in case.batch.samples:
        mark = sample.id, hashlib.sha256(sample.image.cpu().contiguous().numpy().tobytes()).digest()
        if known and mark in seen:
            raise ValueError(
                f"{sample.id!r} is in samples and in held_out; choose the thresholds on other images, or the error is "
                "too low"
            )
        if not known:
            seen.add(mark)


def errors(case: Case, iou: float, *, inclusive: bool) -> Float[Tensor, "b alphas"]:
    """Return 100 where the box of a rule and an alpha misses every true one, else 0; NaN where there is no true one."""
    size = (case.x.shape[2], case.x.shape[3])
    found = torch.cat([cut_boxes(case.raw.double(), rule, size) for rule in ALPHAS], 1).cpu()
    rows = []
    for sample, label, boxes in zip(case.batch.samples, case.y.tolist(), found, strict=True):
        true = sample.boxes_of(label)
        if true is None:
            raise ValueError(f"weak_localization needs boxes, and {sample.id!r} has neither boxes nor a mask")
        missed = ~(overlap(boxes, whole(true.double()) if inclusive else true.double()) >= iou).any(1)
        rows.append(100.0 * missed.double() if len(true) else torch.full((len(boxes),), torch.nan).double())
    return torch.stack(rows)


def cut_boxes(h: Saliency, rule: Rule, size: tuple[int, int]) -> Float[Tensor, "b alphas 4"]:
    """Return `maps.boxes(maps.threshold(h, alpha, rule), size)` for every alpha of a rule at once.

    A row has a kept cell if and only if its highest cell is kept.
    """
    key, bound = cuts(h, rule)
    shown = resize(key, size, "nearest")[:, 0]
    across, down = (shown.amax(axis)[:, None] >= bound[:, :, None] for axis in (1, 2))
    (x0, x1), (y0, y1) = (span(line.flatten(0, 1)) for line in (across, down))
    return torch.stack([x0, y0, x1, y1], 1).view(*bound.shape, 4).double()


def cuts(h: Saliency, rule: Rule) -> tuple[Saliency, Float[Tensor, "b alphas"]]:
    """Return numbers of the cells, and the bound at each alpha above which, or at which, a cell is kept."""
    alpha, flat = h.new_tensor(ALPHAS[rule]), h.flatten(1)
    if rule == "value":
        low, high = flat.aminmax(dim=1, keepdim=True)
        return h - low[:, :, None, None], alpha * (high - low)
    if rule == "mean":
        return h, alpha * flat.mean(1, keepdim=True)
    values, order = flat.sort(dim=1, descending=True, stable=True)
    sums = values.cumsum(1)
    kept = torch.searchsorted(sums.cummax(1).values, alpha * sums[:, -1:])
    place = torch.zeros_like(flat).scatter_(1, order, torch.arange(flat.shape[1]).to(flat).expand_as(flat))
    return -place.view(h.shape), 1 - kept.to(h.dtype)


def whole(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Widen boxes to whole pixels."""
    return torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1)


def overlap(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Return the intersection over union of half-open boxes; 0 where the union has no area."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(2)
    one, other = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b))
    union = one[:, None] + other - both
    return both / torch.where(union > 0, union, 1)
