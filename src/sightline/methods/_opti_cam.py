"""Opti-CAM. Zhang et al., Opti-CAM: optimizing saliency maps for interpretability, CVIU 2024."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sightline.classifier import Classifier, check_labels, derivative, logit
from sightline.erase import Eraser, mix, resolve
from sightline.hooks import differentiable, frozen
from sightline.maps import resize, unit
from sightline.registry import chosen
from sightline.types import Features, Images, Labels, Saliency, Score, Values

Objective: TypeAlias = Literal["mask", "diff", "io_mask", "io_diff"]
Normalization: TypeAlias = Literal["range", "max", "sigmoid"]
Start: TypeAlias = Literal["constant", "grad_cam"]
Rate: TypeAlias = float | Literal["falling"]

START = 0.5
"""The official code's first u; softmax makes any constant the same."""


def opti_cam(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    objective: Objective = "mask",
    normalization: Normalization = "range",
    score: Score = logit,
    steps: int = 100,
    lr: Rate = 0.1,
    tolerance: float = 1e-10,
    start: Start = "constant",
    keep_best: bool = False,
    erase: Eraser = "black",
) -> Saliency:
    """Return the convex combination of the features through which the image scores highest.

    S(u) = sum_k softmax(u)_k A^k (eq 8); u* = argmax_u F(u) (eq 9); F(u) = g_c(f(x * n(up S(u)))) (eq 10), by Adam with
    the paper's `lr` and at most its `steps`. The gradient flows through softmax, upsampling and the minimum and maximum
    of n. With p, o, q the scores of the image, of the masked image and of the image under the complement 1 - n:

        mask     F = o                      diff     F = -|p - o|
        io_mask  F = o - q                  io_diff  F = -|p - o| + |p - q|

    n: `range` (A - min) / (max - min), `max` A / max A, `sigmoid` 1 / (1 + exp(-A)). `score` is the selector g: logit,
    log_probability or probability. `start`: u constant (any constant is the same), or Grad-CAM's weights scaled to unit
    variance. An image whose F changes by less than `tolerance` is finished and leaves the batch; `keep_best` returns
    the best u seen instead of the last. Masking is in [0, 1] with `erase` in place of what is hidden, black as in the
    official code. (b, 1, i, j), raw, at the layer's resolution; shown after up and n.

    *Differs:* lr="falling" is Adam with short memory, beta (.3, .5), at .35 for half of the `steps` and then linearly
    to zero: with steps=40 the average gain is within a point of the paper setting's, on average over networks
    (benchmarks/opti_cam_steps.md).

    Costs a forward and a backward of the whole network a step (two forwards for the io objectives).

    Raises:
        ValueError: fewer than one step, a learning rate not above zero, or features that cancel out at the start (the
            channels of an untrained layer norm sum to zero).
        LookupError: an unknown choice.
    """
    rate, betas = chosen(lr, RATES, "lr") if isinstance(lr, str) else (lambda _: lr, PAPER_BETAS)
    if steps < 1 or rate(0.0) <= 0:
        raise ValueError(f"expected steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    n, F = chosen(normalization, NORMALIZATIONS, "normalization"), chosen(objective, OBJECTIVES, "objective")
    filling = resolve(erase, classifier.mean)
    with differentiable(), frozen(classifier.model):
        A, logits = classifier.features_and_logits(x)
        A, y = A.to(torch.promote_types(A.dtype, torch.float32)), check_labels(logits, y)
        p = score(logits, y)

        def value(u: Tensor, i: Tensor) -> Values:
            m = n(resize(combine(u, A[i]), (x.shape[2], x.shape[3]))).to(x.dtype)

            def through(mask: Saliency) -> Values:
                return score(classifier(mix(x[i], mask, filling)), y[i])

            return F(p[i], through(m), lambda: through(1 - m))

        u = initial(classifier, x, y, A, start, score)
        check_start(combine(u, A), A, classifier.layer)
        u = climb(value, u, steps=steps, rate=rate, betas=betas, tolerance=tolerance, keep_best=keep_best)
        return combine(u, A)


def combine(u: Tensor, A: Features) -> Saliency:
    """Return sum_k softmax(u)_k A^k."""
    return torch.einsum("bk,bkij->bij", u.softmax(1), A)[:, None]


def initial(classifier: Classifier, x: Images, y: Labels, A: Features, start: Start, score: Score) -> Tensor:
    """Return the first u, (b, c)."""
    if chosen(start, {"constant": False, "grad_cam": True}, "start"):
        w = classifier.features_and_gradient(x, y, score)[1].mean((2, 3)).to(A.dtype)
        spread = w.std(1, correction=0, keepdim=True)
        return w / torch.where(spread > 0, spread, 1)
    return torch.full(A.shape[:2], START, dtype=A.dtype, device=A.device)


def check_start(S: Saliency, A: Features, layer: str) -> None:
    """Check that the first map is more than rounding.

    Raises:
        ValueError: the channels vary over the image and their combination does not.
    """
    varies, sums = (maps.amax((2, 3)) - maps.amin((2, 3)) for maps in (A, S))
    if bool((sums.amax(1) < 100 * torch.finfo(A.dtype).eps * varies.amax(1)).any()):
        raise ValueError(
            f"the channels of layer {layer!r} cancel out at the start (with equal weights, those of an untrained layer "
            "norm sum to zero); pass start='grad_cam', or choose another layer"
        )


def climb(
    value: Callable[[Tensor, Tensor], Values],
    u: Tensor,
    *,
    steps: int,
    rate: Callable[[float], float],
    betas: tuple[float, float],
    tolerance: float,
    keep_best: bool,
) -> Tensor:
    """Return the u that Adam reaches when it maximizes each image's own value; `rate` reads the share of steps done."""
    rows = [row.clone() for row in u.detach()]
    optimizer = torch.optim.Adam(rows, lr=rate(0.0), betas=betas, maximize=True)
    last, best, highest = torch.full_like(u[:, 0], torch.inf), u.detach().clone(), torch.full_like(u[:, 0], -torch.inf)
    active = torch.arange(len(u), device=u.device)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = rate(t / steps)
        moving = [rows[i] for i in active.tolist()]
        leaf = torch.stack(moving).requires_grad_()
        values = value(leaf, active)
        gradients, F = derivative(values, leaf, "the mask"), values.detach().to(u.dtype)
        better = active[highest[active] < F]
        highest[active], best[better] = torch.maximum(F, highest[active]), torch.stack(rows)[better]
        unfinished = (F - last[active]).abs() >= tolerance
        last[active] = F
        optimizer.zero_grad()
        for row, gradient, go in zip(moving, gradients, unfinished.tolist(), strict=True):
            row.grad = gradient if go else None
        optimizer.step()
        active = active[unfinished]
        if len(active) == 0:
            break
    return best if keep_best else torch.stack(rows)


def max_normalized(A: Saliency) -> Saliency:
    """Return A / max A, and A itself where the maximum is zero."""
    high = A.amax((2, 3), keepdim=True)
    return A / torch.where(high == 0, torch.ones_like(high), high)


def falling(done: float) -> float:
    """Return the rate after a share of the steps: .35 for half of them, then linearly to zero."""
    return 0.35 * min(1.0, 2 * (1 - done))


PAPER_BETAS = (0.9, 0.999)

RATES: Mapping[str, tuple[Callable[[float], float], tuple[float, float]]] = {"falling": (falling, (0.3, 0.5))}

NORMALIZATIONS: Mapping[str, Callable[[Saliency], Saliency]] = {
    "range": unit,
    "max": max_normalized,
    "sigmoid": torch.sigmoid,
}

OBJECTIVES: Mapping[str, Callable[[Values, Values, Callable[[], Values]], Values]] = {
    "mask": lambda p, o, q: o,
    "diff": lambda p, o, q: -(p - o).abs(),
    "io_mask": lambda p, o, q: o - q(),
    "io_diff": lambda p, o, q: -(p - o).abs() + (p - q()).abs(),
}
