"""Extremal perturbation. Fong, Patrick and Vedaldi, Understanding deep networks via extremal perturbations and smooth
masks, ICCV 2019. Settings that the paper leaves open are those of its authors' code (TorchRay).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sightline.classifier import Classifier, derivative, logit
from sightline.erase import Eraser
from sightline.hooks import differentiable, frozen
from sightline.maps import blur, scale
from sightline.methods._pyramid import Blend, between, levels_of
from sightline.registry import chosen
from sightline.types import Images, Labels, Saliency, Score, Values

Game: TypeAlias = Literal["preservation", "deletion", "hybrid"]
Through: TypeAlias = Callable[[Saliency], Values]
"""The score of the images through a mask each."""
Kernel: TypeAlias = Float[Tensor, "k s s"]
"""Weights of k cells, the nearest ones by rows, at each pixel of a cell of s x s."""

POINTING: Mapping[str, Mapping[str, Any]] = {
    "voc": {"areas": (0.025, 0.05, 0.1, 0.2), "smooth": 0.09},
    "coco": {"areas": (0.018, 0.025, 0.05, 0.1), "smooth": 0.09},
}
"""The paper's settings for the pointing game: `extremal_perturbation(classifier, x, y, **POINTING["voc"])`."""

TEMPERATURE = 1 / 20
"""T of the smooth maximum."""

TIE = 0.02
"""Mask values that differ by no more are equal in rank: about twice what the grid of cells makes of a constant m."""


def extremal_perturbation(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    game: Game = "preservation",
    areas: Sequence[float] = (0.1,),
    score: Score = logit,
    erase: Eraser = "blur",
    blend: Blend = "pyramid",
    step: int = 7,
    sigma: float = 21.0,
    weight: float = 300.0,
    growth: float = 1.0035,
    flip: bool = True,
    steps: int = 800,
    lr: float = 0.01,
    momentum: float = 0.9,
    smooth: float = 0.0,
    chunk: int = 16,
) -> Saliency:
    """Return the smooth mask of a given area that preserves the score most; of several areas, the sum of their masks.

    M_a = argmax_M F(M) - l_t |sort(M) - r_a|^2 (eq 4), r_a = 0 .. 0 1 .. 1 with a share `a` of ones, and with f(M) the
    score of the image through M:

        preservation  F = f(M)        deletion  F = -f(1 - M)        hybrid  F = f(M) - f(1 - M)

    M(u) = smax_v k(u - v) m(v) (eq 7), smax z = sum_v z_v softmax(z / T)_v with T = 1/20, over the cells of m around u,
    one every `step` pixels and at most 1 + ceil(sigma / step) away on either axis; k(d) = exp(-2 max(0, d / sigma -
    1/2)^2). Both lengths are given for 224 x 224 pixels and scale by sqrt(h w) / 224, `step` to whole pixels. m starts
    at one and is clipped to [0, 1] after each of `steps` steps of gradient ascent, whose `momentum` is that of an
    average (dampening = momentum); l_t = `weight` `growth`^t, and |.|^2 is a mean over the pixels. Every other step,
    the first included, the network sees the image mirrored (`flip`).

    The image is seen through M in a pyramid of eight blurs of 0 to 20 pixels; `blend` = "mix" shows M x + (1 - M)
    erase(x) instead. `smooth` blurs the sum by a Gaussian of that share of the shorter side, darkening the borders
    (`POINTING`: .09).

    (b, 1, h, w), in [0, number of areas]. Costs 1 forward, and `steps` forwards and backwards an area (twice as many
    forwards in the hybrid game), `chunk` masks at a time. *Differs:* the paper's code makes one image's mask; here all
    images and areas ascend together, each on its own. Pixels of equal rank, within .02, share the ones of r_a; the
    code's sort leaves them to order and rounding, by which a weak score ends at the border; here it may leave the mask
    flat, at `a` everywhere, with a warning. Areas are shares of the image, where the code counts a margin of `sigma`
    pixels around. Cells lie around the middle of the image, not from its corner. Blurs reflect at the border.

    Raises:
        ValueError: hyper-parameters out of range, an erase that depends on the mask (inpainting), or one other than
            "blur" in a pyramid.
        LookupError: an unknown choice.
    """
    check_settings(areas, (step, steps, chunk), (sigma, weight, growth, lr), (momentum, smooth))
    reward, levels = chosen(game, GAMES, "game"), levels_of(blend, erase, classifier.mean)
    with differentiable(), frozen(classifier.model):
        y, (h, w) = classifier.labels(x, y), (x.shape[2], x.shape[3])
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        s = max(1, round(step * scale((h, w))))
        stacks, k = levels(x), kernel(s, sigma * scale((h, w))).to(x)

        def optimum(pairs: Tensor) -> Saliency:
            i, a = pairs // len(areas), x.new_tensor(areas)[pairs % len(areas)]
            stack, labels = stacks[i], y[i]

            def uphill(M: Saliency, t: int) -> Saliency:
                def f(mask: Saliency) -> Values:
                    seen = between(stack, mask)
                    return score(classifier(seen.flip(3) if flip and t % 2 == 0 else seen), labels)

                away = 2 * (M - template(M, a)).detach() / (h * w)
                return derivative(reward(f, M), M, "the mask") - weight * growth**t * away

            m = x.new_ones(len(i), 1, math.ceil(h / s), math.ceil(w / s))
            return ascend(uphill, m, lambda m: smooth_maximum(m, k, (h, w)), steps, lr, momentum)

        pairs = torch.split(torch.arange(len(x) * len(areas), device=x.device), chunk)
        masks = torch.cat([optimum(some) for some in pairs]).view(len(x), len(areas), h, w)
    warn_of_flat(masks, areas)
    return blur(masks.sum(1, keepdim=True), smooth * min(h, w), padding="zeros")


GAMES: Mapping[str, Callable[[Through, Saliency], Values]] = {
    "preservation": lambda f, M: f(M),
    "deletion": lambda f, M: -f(1 - M),
    "hybrid": lambda f, M: f(M) - f(1 - M),
}


def kernel(step: int, sigma: float) -> Kernel:
    """Return k(u - v) of each pixel u of a cell and the centers v of the cells around it."""
    r = 1 + math.ceil(sigma / step)
    v = step * torch.arange(-r, r + 1, dtype=torch.float64) + (step - 1) / 2
    squares = (torch.arange(step) - v[:, None]).square()
    d = (squares[:, None, :, None] + squares[None, :, None, :]).sqrt().flatten(0, 1)
    return torch.exp(-2 * (d / sigma - 0.5).clamp(min=0).square())


def smooth_maximum(m: Float[Tensor, "b 1 i j"], k: Kernel, size: tuple[int, int]) -> Saliency:
    """Return M(u) = smax_v k(u - v) m(v), zero cells around; the cells lie centered on the image of `size`."""
    (cells, s, _), (b, _, i, j) = k.shape, m.shape
    side = math.isqrt(cells)
    z = F.unfold(m, side, padding=side // 2).view(b, cells, i, 1, j, 1) * k.view(cells, 1, s, 1, s)
    M = (z * (z / TEMPERATURE).softmax(1)).sum(1).view(b, 1, i * s, j * s)
    top, left = (i * s - size[0]) // 2, (j * s - size[1]) // 2
    return M[:, :, top : top + size[0], left : left + size[1]]


def template(M: Saliency, areas: Values) -> Saliency:
    """Return r_a in the order of the mask's own values: one at its highest pixels, a share `areas` of all, else zero.

    |M - template(M)|^2 = |sort(M) - r_a|^2. Pixels as high as the last of them share alike the ones that are left.
    """
    values = M.detach().flatten(1)
    ones = (areas[:, None] * values.shape[1]).round().clamp(min=1)
    last = values.sort(1, descending=True).values.gather(1, ones.long() - 1)
    above, tied = values > last + TIE, (values - last).abs() <= TIE
    share = (ones - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return torch.where(tied, share, above.to(values.dtype)).view_as(M)


def ascend(
    uphill: Callable[[Saliency, int], Saliency],
    m: Tensor,
    smooth_maximum: Callable[[Tensor], Saliency],
    steps: int,
    lr: float,
    momentum: float,
) -> Saliency:
    """Return the mask M(m) that gradient ascent over m in [0, 1] reaches; `uphill` is the gradient at M."""
    leaf = m.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr, momentum=momentum, dampening=momentum, maximize=True)
    for t in range(steps):
        M = smooth_maximum(leaf)
        (leaf.grad,) = torch.autograd.grad(M, leaf, uphill(M, t))
        optimizer.step()
        with torch.no_grad():
            leaf.clamp_(0, 1)
    return smooth_maximum(leaf.detach())


def warn_of_flat(masks: Float[Tensor, "b a h w"], areas: Sequence[float]) -> None:
    """Warn of masks whose pixels are all of equal rank: they have no area."""
    flat = masks.amax((2, 3)) - masks.amin((2, 3)) <= TIE
    for i, a in flat.nonzero().tolist():
        message = (
            f"extremal perturbation: the mask of area {areas[a]} of image {i} of {len(masks)} ended flat; the score is "
            "weak against the penalty: try a smaller weight, more steps, or another score"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def check_settings(
    areas: Sequence[float], counts: tuple[int, ...], positive: tuple[float, ...], rest: tuple[float, float]
) -> None:
    """Check the hyper-parameters.

    Raises:
        ValueError: out of range.
    """
    if not areas or not all(0 < area < 1 for area in areas):
        raise ValueError(f"expected at least one area between 0 and 1, a share of the image, got {tuple(areas)}")
    if min(counts) < 1:
        raise ValueError("expected step, steps, chunk >= 1, got step={}, steps={}, chunk={}".format(*counts))
    if not all(number > 0 for number in positive):
        given = "sigma={}, weight={}, growth={}, lr={}".format(*positive)
        raise ValueError(f"expected sigma, weight, growth, lr > 0, got {given}")
    if not 0 <= rest[0] < 1 or not rest[1] >= 0:
        raise ValueError("expected momentum in [0, 1) and smooth >= 0, got momentum={}, smooth={}".format(*rest))
