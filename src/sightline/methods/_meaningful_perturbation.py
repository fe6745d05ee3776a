"""Meaningful perturbation. Fong and Vedaldi, Interpretable explanations of black boxes by meaningful perturbation, ICCV
2017, with the supplement ("supp.").
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from sightline.classifier import Classifier, check_labels, probability
from sightline.erase import Eraser
from sightline.hooks import cut, differentiable, edit, frozen
from sightline.maps import blur, resize
from sightline.methods._mask import Game, Search, Start, Variation, settled
from sightline.methods._pyramid import Blend, between, levels_of
from sightline.registry import chosen
from sightline.types import Images, Labels, Logits, Saliency, Score, Values

BlurGrad: TypeAlias = Literal["exact", "straight_through"]
Upsample: TypeAlias = Literal["nearest", "bilinear"]

LOCALIZATION: Mapping[str, Any] = {"classes": 5, "l1": 1e-3, "beta": 2.0}
"""The paper's "top-5" setting for weak localization (supp. 6.2): `meaningful_perturbation(classifier, x, **these)`."""

LAYERS: Mapping[str, Mapping[str, tuple[int, float, float]]] = {
    "alexnet": {
        "features.2": (27, 1e-4, 1e-2),
        "features.5": (13, 5e-3, 1e-2),
        "features.7": (13, 5e-3, 1e-2),
        "features.9": (13, 5e-3, 1e-2),
        "features.12": (6, 1e-2, 1e-3),
    },
    "vgg16": {
        "features.4": (112, 5e-5, 1e-2),
        "features.9": (56, 1e-4, 1e-2),
        "features.16": (28, 1e-4, 1e-2),
        "features.23": (14, 5e-3, 1e-2),
        "features.30": (7, 1e-2, 1e-3),
    },
}
"""Network, layer -> cells a side, l1, tv (supp. 6.4), by torchvision's names of pool1, pool2, relu3, relu4 and pool5 of
AlexNet and of pool1 to pool5 of VGG-16; the printed 13 x 13 of pool4 is 14 x 14."""


def meaningful_perturbation(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    game: Game = "deletion",
    score: Score = probability,
    classes: int = 1,
    erase: Eraser = "blur",
    blend: Blend = "mix",
    cells: int = 28,
    upsample: Upsample = "nearest",
    smooth: float = 5.0,
    blur_grad: BlurGrad = "exact",
    jitter: int = 4,
    l1: float = 1e-4,
    tv: float = 1e-2,
    beta: float = 3.0,
    tv_norm: Variation = "isotropic",
    start: Start = "circle",
    steps: int = 300,
    lr: float = 0.1,
    seed: int = 0,
    chunk: int = 64,
) -> Saliency:
    """Return the smallest smooth mask whose perturbation destroys the score (or whose rest preserves it).

    deletion      min_m  l1 |1 - m|_1 + tv sum_u |grad m(u)|^beta + E_t[f(x_t; M)]     (eq 6)      S = 1 - M
    preservation  min_m  l1 |m|_1     + tv sum_u |grad m(u)|^beta - E_t[f(x_t; M)]     (supp. 1)   S = M

    f(x; M) = sum_{c in C} f_c(M x + (1 - M) erase(x)), M(v) = sum_u g(v / s - u) m(u): the mask of `cells` x `cells`
    (at most one a pixel), 1 where the image is kept, enlarged by `upsample` and smoothed by a Gaussian of `smooth`
    pixels. x_t is a crop, at an offset drawn from 0 .. jitter - 1 on each axis at each step, of the image enlarged by
    `jitter` pixels; image and filling move, the mask stays. Adam for `steps`, clipped to [0, 1] after each. L1 and
    total variation are sums over the mask; `tv_norm`: (dx^2 + dy^2)^(beta/2), or |dx|^beta + |dy|^beta.

    `score` is f_c and C = {y}. With `classes` = k > 1, C holds the k classes that the clean image scores highest (supp.
    2), and y is checked and otherwise ignored; `LOCALIZATION` is the paper's setting for five. `erase` is the filling
    (blur by 10 pixels; the paper also has "mean" and "noise"), made once. `blend` = "pyramid" blurs each pixel by a
    width proportional to 1 - M instead, at most 20 pixels, between eight levels. `blur_grad` = "straight_through"
    leaves the smoothing out of the gradient, as the official code does.

    `start`: "circle", the smallest centered disc of radius 0, 5, .., 175 that suppresses (preserves) 99 % of the score,
    its edge softened by 10 pixels; "random"; or m = "half", "zeros", "ones". Noise and offsets come from `seed` and are
    the same for every image.

    (b, 1, h, w), in [0, 1]. An image whose mask is not finite gets NaN, one whose mask is constant a constant map, each
    with a warning. Costs 1 + 36 + `steps` forwards (36 for the circle, `chunk` masked images at a time) and `steps`
    backwards. *Differs:* the disc's lengths scale with the image's diagonal (the paper's images have 224 x 224 pixels).

    Raises:
        ValueError: hyper-parameters out of range, as many classes as the network has, an erase that depends on the
            mask (inpainting), or one other than "blur" in a pyramid.
        LookupError: an unknown choice.
    """
    search = Search(game, steps, lr, l1, tv, beta, tv_norm, start, seed, chunk)
    check_mask(cells, smooth, jitter)
    check_classes(classes)
    grad, mode = chosen(blur_grad, BLUR_GRADS, "blur_grad"), chosen(upsample, UPSAMPLES, "upsample")
    levels = levels_of(blend, erase, classifier.mean)
    with differentiable(), frozen(classifier.model):
        with torch.no_grad():
            logits = classifier(x)
        C, (h, w) = explained(logits, y, classes), (x.shape[2], x.shape[3])
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        still, large = levels(x), levels(resize(x, (h + jitter, w + jitter)))
        generator = torch.Generator().manual_seed(seed)

        def f(stack: Tensor, M: Saliency, i: Tensor) -> Values:
            return total(score, classifier(between(stack, M)), C[i])

        def moving(m: Saliency, i: Tensor) -> Values:
            v, u = torch.randint(max(jitter, 1), (2,), generator=generator).tolist()
            return f(large[i, ..., v : v + h, u : u + w], grad(resize(m, (h, w), mode), smooth), i)

        m = search.begin(lambda M, i: f(still[i], M, i), x.new_zeros(len(x), 1, min(cells, h), min(cells, w)), (h, w))
        a = search.turn(search.descend(moving, m, "the mask"))
    return settled(blur(resize(a, (h, w), mode), smooth), a, "meaningful perturbation")


def layer_perturbation(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    game: Game = "deletion",
    score: Score = probability,
    classes: int = 1,
    l1: float | None = None,
    tv: float | None = None,
    beta: float = 3.0,
    tv_norm: Variation = "isotropic",
    start: Start = "circle",
    steps: int = 300,
    lr: float = 0.1,
    seed: int = 0,
    chunk: int = 64,
) -> Saliency:
    """Return the smallest mask on a layer's cells that destroys the score (or preserves it).

    Meaningful perturbation (eq 6, supp. 1 and 2) with f(x; m) = sum_{c in C} f_c of the network whose layer gives m A
    in place of A: spatial drop-out, with one mask for all channels (supp. 6.4). No enlargement, smoothing or jitter;
    what is not on the grid (class tokens) is kept, and of a layer that runs twice the last output is masked. l1 and tv
    are by default the paper's for a layer of about this size (`LAYERS`): the smaller the map, the larger l1 and the
    smaller tv. The rest is as in `meaningful_perturbation`.

    (b, 1, i, j), in [0, 1], at the layer's resolution: 1 - m (deletion) or m (preservation). Costs 1 + 36 + `steps`
    forwards and `steps` backwards from the layer on. *Differs:* the supplement does not say from which mask it starts
    on a layer; the circle here is that of the image, scaled to the layer's grid.

    Raises:
        ValueError: hyper-parameters out of range, as many classes as the network has, or a layer that did not run.
        LookupError: an unknown choice.
    """
    search = Search(game, steps, lr, l1 or 0.0, tv or 0.0, beta, tv_norm, start, seed, chunk)
    check_classes(classes)
    with differentiable(), frozen(classifier.model):
        with torch.no_grad(), cut(classifier.model, classifier.layer) as calls:
            logits = classifier(x)
        C, x = explained(logits, y, classes), x.detach().to(torch.promote_types(x.dtype, torch.float32))
        output = classifier.reached(calls[-1] if calls else None)
        places = classifier.places(output, x)

        def f(m: Saliency, i: Tensor) -> Values:
            return total(score, masked_logits(classifier, x[i], m, places, len(calls)), C[i])

        size = places.shape[1], places.shape[2]
        usual = usual_penalties(size)
        search = replace(search, l1=usual[0] if l1 is None else l1, tv=usual[1] if tv is None else tv)
        m = search.begin(f, x.new_zeros(len(x), 1, *size), size)
        a = search.turn(search.descend(f, m, f"layer {classifier.layer!r}"))
    return settled(a, a, "layer perturbation")


def explained(logits: Logits, y: Labels | None, classes: int) -> Int[Tensor, "b n"]:
    """Return the classes whose scores are summed: the label, or those with the highest scores.

    Raises:
        ValueError: a wrong label, or as many classes as there are: all probabilities sum to one under every mask.
    """
    y = check_labels(logits, y)
    if classes == 1:
        return y[:, None]
    if classes >= logits.shape[1]:
        raise ValueError(
            f"expected classes below the network's {logits.shape[1]}, got {classes}; their sum never moves"
        )
    return logits.argsort(dim=1, descending=True, stable=True)[:, :classes]


def total(score: Score, logits: Logits, C: Int[Tensor, "b n"]) -> Values:
    """Return sum_{c in C} f_c."""
    return torch.stack([score(logits, c) for c in C.unbind(1)]).sum(0)


def check_mask(cells: int, smooth: float, jitter: int) -> None:
    """Check the geometry of the mask.

    Raises:
        ValueError: fewer than two cells a side, a negative smoothing or jitter.
    """
    if cells < 2 or not smooth >= 0 or jitter < 0:
        given = f"cells={cells}, smooth={smooth}, jitter={jitter}"
        raise ValueError(f"expected cells >= 2, smooth >= 0 and jitter >= 0 pixels, got {given}")


def check_classes(classes: int) -> None:
    """Check how many classes are summed.

    Raises:
        ValueError: fewer than one.
    """
    if classes < 1:
        raise ValueError(f"expected classes >= 1 whose scores are summed, got {classes}")


def straight_through(m: Saliency, sigma: float) -> Saliency:
    """Smooth, with the gradient of no smoothing."""
    return m + (blur(m, sigma) - m).detach()


BLUR_GRADS: Mapping[str, Callable[[Saliency, float], Saliency]] = {
    "exact": blur,
    "straight_through": straight_through,
}

UPSAMPLES: Mapping[str, Upsample] = {"nearest": "nearest", "bilinear": "bilinear"}


def masked_logits(classifier: Classifier, x: Images, m: Saliency, places: Int[Tensor, "c i j"], calls: int) -> Logits:
    """Return the logits when every cell of the layer's last output, of `calls` of them, is multiplied by its mask."""
    left = calls

    def put(output: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        return output if left else output * weights(output, m, places)

    with edit(classifier.model, classifier.layer, put):
        return classifier(x)


def weights(output: Tensor, m: Saliency, places: Int[Tensor, "c i j"]) -> Tensor:
    """Return a factor for every entry of a layer's output: the mask on the grid, one elsewhere."""
    spread = m.to(output.dtype).expand(-1, len(places), -1, -1).flatten(1)
    ones = torch.ones_like(output).flatten(1)
    return ones.scatter(1, places.flatten().expand(len(m), -1), spread).view_as(output)


def usual_penalties(size: tuple[int, int]) -> tuple[float, float]:
    """Return the paper's l1 and tv for the layer whose side is nearest, by ratio, to that of `size`."""
    rows = [row for layers in LAYERS.values() for row in layers.values()]
    side = math.sqrt(size[0] * size[1])
    return min(rows, key=lambda row: abs(math.log(row[0] / side)))[1:]
