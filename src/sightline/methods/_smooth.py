"""Smooth. Smilkov, Thorat, Kim, Viégas and Wattenberg, SmoothGrad: removing noise by adding noise, 2017."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.methods._perturbed import Chosen, average, called, check_counts, complete, maps_of
from sightline.registry import chosen
from sightline.types import Images, Labels, Saliency

Moment: TypeAlias = Literal["mean", "variance", "square"]
Range: TypeAlias = Literal["input", "image", "normalized"]


def smooth(
    method: Chosen,
    *,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
    moment: Moment = "mean",
    relative_to: Range = "input",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over noisy copies of the image.

    With M_i = M(x + e_i) the maps of n copies under Gaussian noise e_i of standard deviation `noise` r:

        mean  1/n sum_i M_i        square  1/n sum_i M_i^2        variance  1/n sum_i (M_i - mean)^2

    r, by `relative_to`: `input` 1, the range of all inputs; `image` each image's own max - min, as in SmoothGrad's
    code; `normalized` the same of the normalized image, with the noise added there: as in CALM's code with
    `noise` = 0.25. Copies are not clamped to [0, 1]. The method's grid; no noise gives the method's own map. The class
    is that of the clean image. Costs 1 forward and a map a copy, `chunk` images (at least the batch) at a time.

    Raises:
        ValueError: fewer than one sample or image at a time, or a noise below zero (when called).
        LookupError: an unknown choice (when called) or method.
    """
    return partial(
        smoothed,
        method=complete(method),
        samples=samples,
        noise=noise,
        seed=seed,
        moment=moment,
        relative_to=relative_to,
        chunk=chunk,
    )


@called("smooth")
def smoothed(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    noise: float,
    seed: int,
    moment: Moment,
    relative_to: Range,
    chunk: int,
) -> Saliency:
    """Return the moment of the maps of noisy copies, (b, 1, i, j) on the method's grid."""
    check_counts(samples, chunk)
    if not noise >= 0:
        raise ValueError(f"expected noise >= 0, a standard deviation, got {noise}")
    combine, spread = chosen(moment, MOMENTS, "moment"), chosen(relative_to, RANGES, "range")
    y, x = classifier.labels(x, y), x.detach()
    sigma, generator = noise * spread(classifier, x), torch.Generator().manual_seed(seed)
    copies = (x + sigma * gaussian(x, generator) for _ in range(samples))
    return combine(maps_of(method, classifier, y, copies, chunk))


def gaussian(x: Images, generator: torch.Generator) -> Float[Tensor, "ch h w"]:
    """Return standard normal noise, the same for every image of a batch."""
    return torch.randn(x.shape[1:], generator=generator, dtype=torch.float32).to(x)


def variance(maps: Iterable[Saliency]) -> Saliency:
    """Return the population variance, updated map by map: never below zero."""
    left = iter(maps)
    mean, n = next(left), 1
    total = torch.zeros_like(mean)
    for n, S in enumerate(left, 2):
        delta = S - mean
        mean, total = mean + delta / n, total + delta**2 * (n - 1) / n
    return total / n


MOMENTS: Mapping[str, Callable[[Iterable[Saliency]], Saliency]] = {
    "mean": average,
    "variance": variance,
    "square": lambda maps: average(S**2 for S in maps),
}


def extent(x: Images) -> Float[Tensor, "b 1 1 1"]:
    """Return each image's largest value minus its smallest."""
    return x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)


RANGES: Mapping[str, Callable[[Classifier, Images], Tensor]] = {
    "input": lambda classifier, x: x.new_ones(1, 1, 1, 1),
    "image": lambda classifier, x: extent(x),
    "normalized": lambda classifier, x: (
        extent(classifier.normalize(x)).to(x) * x.new_tensor(classifier.std).view(-1, 1, 1)
    ),
}
