"""Binary mask. Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions, 2023 (arXiv 2308.11052)."""

from functools import partial

import torch

from sightline.classifier import Classifier, Method
from sightline.erase import Eraser, mix, resolve
from sightline.methods._perturbed import Chosen, average, called, check_counts, complete, maps_of
from sightline.types import Images, Labels, Saliency


def binary_mask(
    method: Chosen,
    *,
    samples: int = 50,
    keep: float = 0.9,
    seed: int = 0,
    erase: Eraser = "black",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over copies of the image that miss random pixels.

    S = 1/n sum_i M(x * m_i), m_i ~ Bernoulli(keep) for each pixel, all colors together (eq 15); `erase` in place of
    what is missing. Each map explains the masked image, as printed: it is not multiplied by m_i again. The method's
    grid; `keep` = 1 gives the method's own map. The class is that of the clean image. Costs 1 forward and a map a copy,
    `chunk` images (at least the batch) at a time.

    Raises:
        ValueError: fewer than one sample or image at a time, or `keep` outside [0, 1] (when called).
        LookupError: an unknown eraser (when called) or method.
    """
    return partial(masked, method=complete(method), samples=samples, keep=keep, seed=seed, erase=erase, chunk=chunk)


@called("binary_mask")
def masked(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    keep: float,
    seed: int,
    erase: Eraser,
    chunk: int,
) -> Saliency:
    """Return the mean map of the masked copies, (b, 1, i, j) on the method's grid."""
    check_counts(samples, chunk)
    if not 0 <= keep <= 1:
        raise ValueError(f"expected keep in [0, 1], the probability of a pixel to stay, got {keep}")
    filling, generator = resolve(erase, classifier.mean), torch.Generator().manual_seed(seed)
    y, x = classifier.labels(x, y), x.detach()
    copies = (mix(x, kept(x, keep, generator), filling) for _ in range(samples))
    return average(maps_of(method, classifier, y, copies, chunk))


def kept(x: Images, keep: float, generator: torch.Generator) -> Saliency:
    """Return a mask that is 1 with probability `keep` at each pixel, the same for every image of a batch."""
    u = torch.rand((1, 1, *x.shape[2:]), generator=generator, dtype=torch.float32)
    return (u < keep).to(x).expand(len(x), -1, -1, -1)
