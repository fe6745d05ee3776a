"""Selectivity. Zhang et al., Opti-CAM, CVIU 2024, appendix F.1."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sightline.erase import Eraser
from sightline.metrics._average import Compare, drop, gain, increase
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself, mean
from sightline.registry import chosen

Of: TypeAlias = Literal["average_drop", "average_increase", "average_gain"]

OF: Mapping[str, tuple[Compare, bool]] = {
    "average_drop": (drop, False),
    "average_increase": (increase, True),
    "average_gain": (gain, True),
}
"""How p and o are compared, and whether higher is better."""


def selectivity(
    *,
    of: Of = "average_drop",
    exponents: Sequence[float] = (0.01, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
    erase: Eraser = "black",
    scored: Scored = "label",
) -> Measure:
    """Measure a masking metric, in percent, with the map raised to each of several powers before masking.

    o(alpha) is the scored class's probability on S^alpha x + (1 - S^alpha) `erase`, S the map in [0, 1]; the curve is
    `of` (AD, AI or AG) over alpha, and its direction is that of `of`. A small alpha shows nearly all of the image, a
    large one only the map's peaks; the order of the pixels stays. The value at alpha = 1 is the plain metric.

    *Differs:* the paper shows the curve alone; the number is its mean over the exponents, each counted once however
    far apart they are.

    Raises:
        LookupError: no such metric.
        ValueError: no exponent, one not above zero, or an unknown scored class.
    """
    compare, higher_is_better = chosen(of, OF, "metric")
    if not exponents or min(exponents) <= 0:
        raise ValueError(f"expected exponents > 0, at least one, got {tuple(exponents)}")
    check_scored(scored)

    def curve(case: Case) -> Tensor:
        p = case.probability()
        return torch.stack([compare(p, case.masked_probability(erase, alpha)) for alpha in exponents], 1)

    axis = tuple(map(float, exponents))
    return Measure(curve, higher_is_better, scored, width=len(axis), finish=mean, curve=itself, axis=axis)
