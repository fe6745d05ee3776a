"""Remove and debias (ROAD).

Rong et al., A consistent and efficient evaluation strategy for attribution methods, ICML 2022.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sightline.erase import noisy_linear
from sightline.metrics._aopc import Order, check_order
from sightline.metrics._insertion import rank
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself, mean
from sightline.metrics._remove_and_classify import accurate, check_shares


def road(
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    order: Order = "most",
    noise: float = 0.01,
    scored: Scored = "label",
    seed: int = 0,
    chunk: int = 64,
) -> Measure:
    """Measure the accuracy left when the most salient pixels are replaced from their neighbors, in percent.

    A share k of `shares`, round(k h w) pixels, is removed and filled by `noisy_linear`, so that the shape of what is
    missing gives no class away. The curve is 100 times the share of images still classified as the scored class, the
    number its mean over the shares, in [0, 100]: lower is better. order="least" removes the least salient pixels first
    (the paper's LeRF), and higher is better. Equal pixels go in row-major order either way.

    The accuracy is against the label; scored="predicted" asks instead whether the prediction stays.

    Raises:
        ValueError: no share, one outside (0, 1], a negative noise, a chunk below one, an unknown order or scored class.
    """
    check_shares(shares, chunk)
    check_order(order)
    check_scored(scored)
    if noise < 0:
        raise ValueError(f"expected noise >= 0, got {noise}")

    def curve(case: Case) -> Tensor:
        places = rank(case.saliency if order == "most" else -case.saliency)
        return 100 * accurate(case, places, shares, partial(noisy_linear, noise=noise, seed=seed), chunk)

    axis = tuple(map(float, shares))
    return Measure(curve, order == "least", scored, width=len(axis), finish=mean, curve=itself, axis=axis)
