"""Saliency metric. Dabkowski and Gal, Real time image saliency for black box classifiers, NeurIPS 2017, section 4.3.

With the box of Zhang et al., Opti-CAM, CVIU 2024, equation B.7.
"""

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import log_probability
from sightline.maps import Rule, boxes, largest, resize, threshold
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.registry import chosen
from sightline.types import Images

POn: TypeAlias = Literal["crop", "image"]


def saliency_metric(
    *,
    p_on: POn = "crop",
    rule: Rule = "mean",
    alpha: float = 1.0,
    least: float = 0.05,
    scored: Scored = "label",
) -> Measure:
    """Measure SM = log max(`least`, |B| / (h w)) - log p, lower is better: a small box that keeps the class.

    B is the tightest box around the largest 4-connected region of {S >= alpha mean S} (or another `rule` of
    `maps.threshold`), S the map in [0, 1] at the image's resolution; of equal regions the first in row-major order. An
    empty region, which alpha > 1 or `energy` may leave, gives the whole image, and so does a constant map under `value`
    or `mean`. p is the probability of the scored class on the content of B, resized (bilinear) to the image's size;
    with p_on="image" on the image itself, as B.7 is printed.

    Natural logarithms, in float64; at least log `least` (-3.0), without an upper bound. p is a softmax, so the number
    is finite however small p is.

    *Differs:* Dabkowski and Gal threshold their own mask and box all of it; Opti-CAM's box is the default.

    Raises:
        LookupError: an unknown `p_on` or rule.
        ValueError: alpha out of the rule's range, `least` outside (0, 1], or an unknown scored class.
    """
    chosen(p_on, dict.fromkeys(get_args(POn)), "input of the probability")
    if not 0 < least <= 1:
        raise ValueError(f"expected least in (0, 1], a share of the image, got {least}")
    threshold(torch.zeros(1, 1, 1, 1), alpha, rule)
    check_scored(scored)

    def score(case: Case) -> Tensor:
        height, width = case.x.shape[2:]
        B = case.once(("largest box", rule, alpha), lambda: largest_boxes(case, rule, alpha))
        x0, y0, x1, y1 = B.double().unbind(1)
        share = (x1 - x0) * (y1 - y0) / (height * width)
        logits = case.logits if p_on == "image" else case.classifier(crops(case.x, B))
        return share.clamp(min=least).log() - log_probability(logits.double(), case.y)

    return Measure(score, higher_is_better=False, scored=scored)


def largest_boxes(case: Case, rule: Rule, alpha: float) -> Float[Tensor, "b 4"]:
    """Return the tightest box around the largest region that a threshold leaves of each map."""
    kept = threshold(case.saliency.double(), alpha, rule)
    return boxes(torch.stack([largest(one[0])[None] for one in kept]), (case.x.shape[2], case.x.shape[3]))


def crops(x: Images, found: Float[Tensor, "b 4"]) -> Images:
    """Return what each box of whole pixels shows, resized to the images' size."""
    size = (x.shape[2], x.shape[3])
    places = found.long().tolist()
    parts = [resize(one[None, :, y0:y1, x0:x1], size) for one, (x0, y0, x1, y1) in zip(x, places, strict=True)]
    return torch.cat(parts)
