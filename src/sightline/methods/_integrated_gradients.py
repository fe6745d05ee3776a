"""Integrated gradients. Sundararajan, Taly and Yan, Axiomatic attribution for deep networks, ICML 2017."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, check_images, check_labels, derivative, logit
from sightline.erase import Eraser, resolve
from sightline.hooks import differentiable, frozen
from sightline.types import Images, Labels, Saliency, Score


def integrated_gradients(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    steps: int = 50,
    erase: Eraser = "black",
    score: Score = logit,
    chunk: int = 16,
) -> Saliency:
    """Return each pixel's share in the rise of the score on the straight path from a baseline to the image.

    S = sum_ch (x - x') 1/m sum_{j=1..m} dy_c / dx (x' + j/m (x - x')) (eq 3), m = `steps`, x' the filling of `erase`,
    black as in the paper; (b, 1, h, w), signed, at the input's resolution. Complete: sum_hw S approaches y_c(x) -
    y_c(x') as m grows (proposition 1), at once for a linear network. m forwards and backwards, `chunk` images (at least
    the batch) at a time.

    Raises:
        ValueError: fewer than one step or image at a time.
        UnsuitedError: no gradient came back.
    """
    check_path(steps, chunk)
    origin = baseline(classifier, x, erase)
    alphas = [j / steps for j in range(1, steps + 1)]
    total = torch.zeros_like(origin)
    for gradients in path_gradients(classifier, x, y, origin, alphas, score, chunk):
        total += gradients.sum(0)
    return ((x.detach() - origin) * total / steps).sum(1, keepdim=True)


def check_path(steps: int, chunk: int) -> None:
    """Check the settings of a path.

    Raises:
        ValueError: fewer than one step or image at a time.
    """
    if steps < 1 or chunk < 1:
        raise ValueError(f"expected steps >= 1 and chunk >= 1 images at a time, got steps={steps}, chunk={chunk}")


def baseline(classifier: Classifier, x: Images, erase: Eraser) -> Images:
    """Return the image of which nothing is kept."""
    check_images(x, classifier.channels)
    return resolve(erase, classifier.mean)(x.detach(), torch.zeros_like(x[:, :1]))


def path_gradients(
    classifier: Classifier,
    x: Images,
    y: Labels | None,
    origin: Images,
    alphas: Sequence[float],
    score: Score,
    chunk: int,
) -> Iterator[Float[Tensor, "n b ch h w"]]:
    """Yield the gradients at (1 - alpha) origin + alpha x, several points at a time.

    The last alpha is 1: that point is the image itself, comes first and decides the label, so none is run twice.
    """
    gradient, y = gradient_and_labels(classifier, x, y, score)
    yield gradient[None]
    several = max(1, chunk // len(x))
    for start in range(0, len(alphas) - 1, several):
        a = x.new_tensor(alphas[start : min(start + several, len(alphas) - 1)]).view(-1, 1, 1, 1, 1)
        points = (1 - a) * origin + a * x.detach()
        yield classifier.gradient(points.flatten(0, 1), y.repeat(len(a)), score).view(points.shape)


def gradient_and_labels(classifier: Classifier, x: Images, y: Labels | None, score: Score) -> tuple[Images, Labels]:
    """Return the gradient of the score with respect to the images, and their checked labels, of one forward pass."""
    with differentiable(), frozen(classifier.model):
        leaf = x.detach().clone().requires_grad_()
        logits = classifier(leaf)
        y = check_labels(logits, y)
        return derivative(score(logits, y), leaf, "the image"), y
