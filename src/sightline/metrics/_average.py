"""Average drop, average increase, average gain.

Chattopadhay et al., Grad-CAM++, WACV 2018 (drop and increase); Zhang et al., Opti-CAM, CVIU 2024, section 5.1 (gain).
p is the probability of the scored class on the image, o on the image seen through the map; all in float64.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sightline.erase import Eraser
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.types import Values

Compare: TypeAlias = Callable[[Values, Values], Values]


def drop(p: Values, o: Values) -> Values:
    """Return 100 [p - o]_+ / p, each in [0, 100]; 0 where p = 0: what is not there cannot drop."""
    return 100 * torch.where(p > 0, (p - o).clamp(min=0) / torch.where(p > 0, p, 1), 0)


def increase(p: Values, o: Values) -> Values:
    """Return 100 where o > p and 0 elsewhere."""
    return 100 * (o > p).to(p.dtype)


def gain(p: Values, o: Values) -> Values:
    """Return 100 [o - p]_+ / (1 - p), each in [0, 100]; 0 where p = 1: there is nothing left to gain."""
    return 100 * torch.where(p < 1, (o - p).clamp(min=0) / torch.where(p < 1, 1 - p, 1), 0)


def average_drop(*, erase: Eraser = "black", exponent: float = 1.0, scored: Scored = "label") -> Measure:
    """Measure AD = mean 100 [p - o]_+ / p, in percent, lower is better (Opti-CAM, eq 14).

    `exponent` is the power to which the map is raised before masking (the selectivity study). The hidden part shows
    `erase`; black in [0, 1] as in the official code.
    """
    return compared(drop, erase, exponent, scored, higher_is_better=False)


def average_increase(*, erase: Eraser = "black", exponent: float = 1.0, scored: Scored = "label") -> Measure:
    """Measure AI = mean 100 1[p < o], in percent, higher is better (Opti-CAM, eq 15); see `average_drop`."""
    return compared(increase, erase, exponent, scored, higher_is_better=True)


def average_gain(*, erase: Eraser = "black", exponent: float = 1.0, scored: Scored = "label") -> Measure:
    """Measure AG = mean 100 [o - p]_+ / (1 - p), in percent, higher is better (Opti-CAM, eq 13); see `average_drop`."""
    return compared(gain, erase, exponent, scored, higher_is_better=True)


def compared(compare: Compare, erase: Eraser, exponent: float, scored: Scored, *, higher_is_better: bool) -> Measure:
    """Return the measure that compares p with o.

    Raises:
        ValueError: an exponent not above zero, or an unknown scored class.
    """
    if exponent <= 0:
        raise ValueError(f"expected exponent > 0, got {exponent}")
    check_scored(scored)

    def score(case: Case) -> Tensor:
        return compare(case.probability(), case.masked_probability(erase, exponent))

    return Measure(score, higher_is_better, scored)
