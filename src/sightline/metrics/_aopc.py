"""Area over the perturbation curve (AOPC).

Samek et al., Evaluating the visualization of what a deep neural network has learned, TNNLS 2017; Opti-CAM's settings
(section 5.3.3).
"""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sightline.classifier import probability
from sightline.erase import Eraser, filler, mix
from sightline.maps import scale
from sightline.metrics._insertion import rank
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself
from sightline.types import Saliency, Score

Order: TypeAlias = Literal["most", "least"]
Reduce: TypeAlias = Literal["steps", "steps_and_image"]


def aopc(
    *,
    patch: int = 14,
    steps: int = 10,
    erase: Eraser = "black",
    order: Order = "most",
    score: Score = probability,
    scored: Scored = "predicted",
    reduce: Reduce = "steps",
    chunk: int = 64,
) -> Measure:
    """Measure AOPC = 1/L sum_{k=1..L} (y_0 - y_k), in the score's unit, higher is better.

    y_k is the score of the image without its k most salient patches, L = `steps`; the curve is y_0 - y_k. With
    order="least" the least salient patches go first, and lower is better. A patch is a square of a grid that starts in
    the upper left corner; the map is summed over it, and equal sums go in row-major order. For a probability the
    number is in [-1, 1], and 0 for a network that ignores the patches.

    `patch` is in pixels of a 224 x 224 image and scales by sqrt(h w) / 224 to others. Where the patches do not fill
    the image, those at the right and lower border are cut off, and sum over fewer pixels. Erasers that look at what is
    kept see all patches of the step removed at once.

    reduce="steps_and_image" divides by L + 1, as Samek et al. do: the whole image counts as a step without a drop.

    *Differs:* Samek et al. erase with uniform noise (erase="noise"), 9 x 9 pixels a patch and 100 steps, and let the
    patches lie where the map's order puts them; patch 14, 10 steps and black are Opti-CAM's.

    Raises:
        ValueError: a patch below one pixel, fewer than one step, more steps than patches, a chunk below one, an unknown
            order, reduction or scored class.
    """
    if patch < 1 or steps < 1 or chunk < 1:
        raise ValueError(
            f"expected patch >= 1, steps >= 1 and chunk >= 1, got patch={patch}, steps={steps}, chunk={chunk}"
        )
    check_order(order)
    if reduce not in ("steps", "steps_and_image"):
        raise ValueError(f"expected reduce='steps' or reduce='steps_and_image', got {reduce!r}")
    check_scored(scored)

    def drops(case: Case) -> Tensor:
        places = ordered(case.saliency, patch, steps, order)
        return score(case.logits.double(), case.y)[:, None] - erased(case, places, steps, erase, score, chunk)

    def finish(curve: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        return curve.sum(-1) / (steps if reduce == "steps" else steps + 1)

    axis = tuple(float(k) for k in range(1, steps + 1))
    return Measure(drops, order == "most", scored, width=steps, finish=finish, curve=itself, axis=axis)


def ordered(saliency: Saliency, patch: int, steps: int, order: Order) -> Int[Tensor, "b 1 h w"]:
    """Return for each pixel its patch's place in the order of the sums, 0 the first to go."""
    h, w = saliency.shape[2:]
    side = max(1, round(patch * scale((h, w))))
    down, across = -(-h // side), -(-w // side)
    if down * across < steps:
        raise ValueError(
            f"an image of {h} x {w} has {down * across} patches of {side} x {side}, fewer than steps={steps}; "
            f"take fewer steps or a patch below {patch}"
        )
    whole = F.pad(saliency.double(), (0, across * side - w, 0, down * side - h))
    sums = whole.view(-1, 1, down, side, across, side).sum((3, 5))
    places = rank(sums if order == "most" else -sums).view_as(sums)
    return places.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]


def erased(
    case: Case, places: Int[Tensor, "b 1 h w"], steps: int, erase: Eraser, score: Score, chunk: int
) -> Float[Tensor, "b _steps"]:
    """Return the score of each image without the patches of the first k places, k = 1 .. steps."""
    x = case.x
    pairs = torch.arange(len(x) * steps, device=x.device)
    filling = filler(x, erase, case.classifier.mean)

    def seen(some: Tensor) -> Tensor:
        i, k = some // steps, some % steps + 1
        kept = (places[i] >= k.view(-1, 1, 1, 1)).to(x.dtype)
        return score(case.classifier(mix(x[i], kept, filling(i))).double(), case.y[i])

    return torch.cat([seen(some) for some in torch.split(pairs, chunk)]).view(len(x), steps)


def check_order(order: str) -> None:
    """Check which end of a map goes first.

    Raises:
        ValueError: neither `most` nor `least`.
    """
    if order not in ("most", "least"):
        raise ValueError(f"expected order='most' or order='least', got {order!r}")
