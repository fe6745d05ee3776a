"""SmoothGrad and its moments.

Smilkov, Thorat, Kim, Viégas and Wattenberg, SmoothGrad: removing noise by adding noise, ICML workshop 2017. VarGrad:
Adebayo, Gilmer, Goodfellow and Kim, Local explanation methods for deep neural networks lack sensitivity to parameter
values, ICLR workshop 2018. SmoothGrad-Squared: Hooker, Erhan, Kindermans and Kim, A benchmark for interpretability
methods in deep neural networks, NeurIPS 2019.
"""

from functools import partial

from sightline.classifier import Classifier, logit
from sightline.methods._gradient import gradient
from sightline.methods._smooth import Range, smooth
from sightline.types import Images, Labels, Saliency, Score


def smooth_grad(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
    score: Score = logit,
    relative_to: Range = "input",
    chunk: int = 16,
) -> Saliency:
    """Return the mean gradient map of noisy copies of the image.

    S = 1/n sum_i M(x + e_i), M = max_ch |dy_c / dx_ch|, e_i ~ N(0, noise^2 r^2); (b, 1, h, w), non-negative, at the
    input's resolution. r is 1, the range of all inputs; by `relative_to` each image's own (`image`) or, in normalized
    space, CALM's (`normalized`, there with `noise` = 0.25); see `smooth`. Copies are not clamped. One forward, and a
    forward and a backward a copy, `chunk` images (at least the batch) at a time.

    *Differs:* Smilkov et al. average signed gradients and take absolute values only to draw; here, as in Maruf et al.
    2023 and CALM, the mean is that of the maps.

    Raises:
        ValueError: fewer than one sample or image at a time, a noise below zero, or a network without gradients.
        LookupError: an unknown `relative_to`.
    """
    method = partial(gradient, score=score)
    several = smooth(method, samples=samples, noise=noise, seed=seed, relative_to=relative_to, chunk=chunk)
    return several(classifier, x, y)


def var_grad(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
    score: Score = logit,
    relative_to: Range = "input",
    chunk: int = 16,
) -> Saliency:
    """Return the variance of the gradient maps of noisy copies of the image.

    S = 1/n sum_i (M_i - mean M)^2, M_i = max_ch |dy_c / dx_ch|(x + e_i); (b, 1, h, w), non-negative, at the input's
    resolution; settings, costs and errors as `smooth_grad`.

    *Differs:* Adebayo et al. take the variance of each color's signed gradient; here, as in CALM, that of the maps.
    """
    method = partial(gradient, score=score)
    several = smooth(
        method, samples=samples, noise=noise, seed=seed, moment="variance", relative_to=relative_to, chunk=chunk
    )
    return several(classifier, x, y)


def smooth_grad_squared(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
    score: Score = logit,
    relative_to: Range = "input",
    chunk: int = 16,
) -> Saliency:
    """Return the mean square of the gradient maps of noisy copies of the image.

    S = 1/n sum_i M_i^2, M_i = max_ch |dy_c / dx_ch|(x + e_i); (b, 1, h, w), non-negative, at the input's resolution;
    settings, costs and errors as `smooth_grad`.

    *Differs:* Hooker et al. square each color's gradient and keep the colors; here the map is squared.
    """
    method = partial(gradient, score=score)
    several = smooth(
        method, samples=samples, noise=noise, seed=seed, moment="square", relative_to=relative_to, chunk=chunk
    )
    return several(classifier, x, y)
