"""LIME. Ribeiro, Singh and Guestrin, "Why should I trust you?" Explaining the predictions of any classifier, KDD 2016;
run by captum (Kokhlikyan et al. 2020).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from skimage.segmentation import quickshift
from torch import Tensor

from sightline.classifier import Classifier, probability
from sightline.erase import Eraser, resolve
from sightline.hooks import differentiable
from sightline.maps import scale
from sightline.methods._pyramid import mixed
from sightline.types import Images, Labels, Saliency, Score, Values


def lime(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 1000,
    score: Score = probability,
    erase: Eraser = "black",
    kernel_size: float = 4.0,
    max_dist: float = 200.0,
    ratio: float = 0.2,
    width: float = 0.25,
    alpha: float = 1.0,
    seed: int = 0,
    chunk: int = 64,
) -> Saliency:
    """Return the weight of each superpixel in a linear model of the score.

    w = argmin sum_z pi(z) (f(x_z) - w z - w_0)^2 + alpha |w|^2 (eq 2) over `samples` vectors z: with probability 1/2
    each, z_s is 1 (superpixel s is shown) or 0 (`erase` fills it). pi(z) = exp(-d^2 / (2 width^2)), with d = 1 -
    sqrt(mean z) the cosine distance to the whole image. S(u) = w_s(u). Superpixels are those of scikit-image's
    quickshift with `ratio`, and `kernel_size` and `max_dist` in pixels of an image of 224 x 224; they, pi and alpha
    have the settings of the authors' package. Each image draws its z from `seed`.

    (b, 1, h, w), signed, constant on superpixels; an image with a single one gets a constant map. Costs 1 + `samples`
    forwards, `chunk` masked images at a time. *Differs:* captum draws z and reads the scores in place of the authors'
    package, in single precision, and the whole image is no sample of its own. The paper fits K superpixels chosen by a
    Lasso; here all of them get a weight. Lengths scale with the image (the package's do not).

    Raises:
        ImportError: captum is not installed.
        ValueError: hyper-parameters out of range, or an erase that depends on the mask (inpainting).
    """
    attr = captum("lime")
    check_settings((samples, chunk), (kernel_size, max_dist, width, alpha), ratio)
    with differentiable(), torch.no_grad():
        y, x = classifier.labels(x, y), x.detach().clone()
        filled, S = mixed(x, filling=resolve(erase, classifier.mean))[:, 1], torch.empty_like(x[:, :1])
        for i in range(len(x)):

            def f(images: Images, label: Tensor = y[i]) -> Values:
                return score(classifier(images), label.expand(len(images)))

            s = superpixels(x[i], kernel_size, max_dist, ratio)
            surrogate = attr.Lime(f, Ridge(alpha), similarity_func=partial(nearness, width), perturb_func=drawn(seed))
            w = surrogate.attribute(
                x[i : i + 1],
                baselines=filled[i : i + 1],
                feature_mask=s[None, None],
                n_samples=samples,
                perturbations_per_eval=chunk,
                return_input_shape=False,
            )
            S[i, 0] = w.to(S)[s]
    return S


def captum(method: str) -> Any:
    """Return captum's module of methods.

    Raises:
        ImportError: captum is not installed.
    """
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError(f'{method} is run by captum: pip install "sightline[captum]"') from error
    return attr


def superpixels(
    image: Float[Tensor, "ch h w"], kernel_size: float, max_dist: float, ratio: float
) -> Int[Tensor, "h w"]:
    """Return the number of each pixel's quickshift superpixel, from 0; a gray image counts as a colored one."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
    shift, pixel = cast(Any, quickshift), scale((pixels.shape[0], pixels.shape[1]))
    found = shift(pixels, kernel_size=max(1.0, kernel_size * pixel), max_dist=max_dist * pixel, ratio=ratio, rng=0)
    return torch.from_numpy(found).long().to(image.device)


def drawn(seed: int) -> Callable[..., Int[Tensor, "1 s"]]:
    """Return what draws z for captum, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(image: Images, *, num_interp_features: int, **_: Any) -> Int[Tensor, "1 s"]:
        return torch.randint(2, (1, num_interp_features), generator=generator).to(image.device)

    return draw


def nearness(width: float, image: Images, masked: Images, z: Int[Tensor, "1 s"], **_: Any) -> float:
    """Return pi(z), for captum."""
    d = 1 - math.sqrt(float(z.double().mean()))
    return math.exp(-(d**2) / (2 * width**2))


class Ridge:
    """The linear model that captum fits."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.w = torch.empty(0)

    def fit(self, data: Any) -> None:
        """Fit to captum's loader of (z, f, pi); the loader itself, which would draw a random number, is not run."""
        z, f, pi = (part.double().cpu() for part in data.dataset.tensors)
        self.w = ridge(z, f, pi, self.alpha)

    def representation(self) -> Tensor:
        """Return w."""
        return self.w


def ridge(
    z: Float[Tensor, "n s"], f: Float[Tensor, " n"], pi: Float[Tensor, " n"], alpha: float
) -> Float[Tensor, " s"]:
    """Return w of argmin sum pi (f - w z - w_0)^2 + alpha |w|^2; w_0 leaves with the weighted mean of z."""
    Z = z - pi @ z / pi.sum()
    w: Tensor = torch.linalg.solve(Z.T @ (pi[:, None] * Z) + alpha * torch.eye(z.shape[1]).to(z), Z.T @ (pi * f))
    return w


def check_settings(counts: tuple[int, int], positive: tuple[float, ...], ratio: float) -> None:
    """Check the hyper-parameters.

    Raises:
        ValueError: out of range.
    """
    if min(counts) < 1:
        raise ValueError("expected samples and chunk >= 1, got samples={}, chunk={}".format(*counts))
    if not all(number > 0 for number in positive):
        given = "kernel_size={}, max_dist={}, width={}, alpha={}".format(*positive)
        raise ValueError(f"expected kernel_size, max_dist, width and alpha > 0, got {given}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"expected ratio in [0, 1], how much color counts against place, got {ratio}")
