"""Max-sensitivity. Yeh, Hsieh, Suggala, Inouye and Ravikumar, On the (in)fidelity and sensitivity of explanations,
NeurIPS 2019.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sightline.maps import unit
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself
from sightline.registry import chosen
from sightline.types import Saliency, Values

Reading: TypeAlias = Literal["raw", "unit"]

READINGS: Mapping[str, Callable[[Saliency], Saliency]] = {"raw": itself, "unit": unit}


def max_sensitivity(
    *,
    samples: int = 10,
    radius: float = 0.2,
    of: Reading = "raw",
    relative: bool = True,
    clamp: bool = False,
    scored: Scored = "predicted",
    seed: int = 0,
) -> Measure:
    """Measure the largest change of the map under small noise, at least 0, lower is better.

    MS = max_d ||Phi(x + d) - Phi(x)||_F / ||Phi(x)||_F over `samples` draws of d, uniform in [-radius, radius] at each
    pixel and channel, in units of images in [0, 1]; the same draws for every image. Ten of them and a radius of .2, as
    Opti-CAM reports it. The class is that of the clean image all along. A lower bound of the maximum over the ball:
    more draws never lower it.

    `of`: Phi is the map as the method gives it, or that map scaled to [0, 1], whose number no scale and no offset of
    the map can change. `relative` = False leaves the denominator out: the paper's definition, in units of the map; its
    code divides. `clamp`: x + d is brought back to [0, 1]; the paper does not.

    A map of norm 0 has 0 if no noise moves it, else 1: the change of a map that vanishes. A map that is not finite
    counts as zero everywhere. The cost is `samples` maps an image.

    Raises:
        LookupError: an unknown reading of the map.
        ValueError: no sample, a radius not above zero, or an unknown scored class.
    """
    if samples < 1 or radius <= 0:
        raise ValueError(f"expected samples >= 1 and radius > 0, got samples={samples}, radius={radius}")
    read = chosen(of, READINGS, "reading of the map")
    check_scored(scored)

    def score(case: Case) -> Tensor:
        clean, generator = read(case.raw.double()), torch.Generator().manual_seed(seed)
        worst = torch.zeros(len(case.x), dtype=torch.float64, device=case.x.device)
        for _ in range(samples):
            d = radius * (2 * torch.rand(case.x.shape[1:], generator=generator, dtype=torch.float64) - 1)
            seen = case.x + d.to(case.x)
            noisy = case.explain(seen.clamp(0, 1) if clamp else seen)
            worst = torch.maximum(worst, norm(read(noisy.double()) - clean))
        return quotient(worst, norm(clean)) if relative else worst

    return Measure(score, higher_is_better=False, scored=scored)


def norm(maps: Saliency) -> Values:
    """Return each map's Frobenius norm."""
    return maps.flatten(1).square().sum(1).sqrt()


def quotient(change: Values, size: Values) -> Values:
    """Return change / size; where the size is 0, 0 without a change and 1 with one."""
    return torch.where(size > 0, change / torch.where(size > 0, size, 1), (change > 0).to(change.dtype))
