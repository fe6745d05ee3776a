"""Minimality. Fong and Vedaldi, Interpretable explanations by meaningful perturbation, ICCV 2017: the deletion game."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, probability
from sightline.erase import Eraser, filler, mix, resolve
from sightline.maps import boxes, threshold
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.types import Images, Labels, Score, Values


def minimality(
    *,
    level: float = 0.9,
    steps: int = 100,
    erase: Eraser = "blur",
    score: Score = probability,
    scored: Scored = "label",
    chunk: int = 64,
) -> Measure:
    """Measure the smallest box around a map's peaks whose erasing suppresses the score; lower is better.

    For alpha = 0, 1/n, ..., (n - 1)/n with n = `steps`: the tightest box around the pixels with
    h - min >= alpha (max - min) is erased as a whole. With p the score of that image, p_orig of the image itself and
    p_blur of the wholly erased one, p' = (p - p_blur) / (p_orig - p_blur); the box counts if 1 - p' >= `level` (the
    paper's levels are .8, .9, .95, .99). The number is its area as a share of the image, in (0, 1].

    The box of alpha = 0 is the whole image and always counts, so 1 means that nothing less will do. It is 1 too where
    p_orig <= p_blur: the score has nothing to lose. Equal boxes are scored once, and several levels share the work.

    *Differs:* the paper does not say what p' is where erasing everything raises the score.

    Raises:
        ValueError: a level outside (0, 1], fewer than one threshold, a chunk below one, or an unknown scored class.
    """
    if not 0 < level <= 1 or steps < 1 or chunk < 1:
        raise ValueError(
            f"expected level in (0, 1], steps >= 1 and chunk >= 1, got level={level}, steps={steps}, chunk={chunk}"
        )
    check_scored(scored)

    def area(case: Case) -> Tensor:
        played = case.once(("minimality", steps, erase, score, chunk), lambda: game(case, steps, erase, score, chunk))
        areas, left = played.unbind(2)
        return torch.where(1 - left >= level, areas, 1.0).amin(1)

    return Measure(area, higher_is_better=False, scored=scored)


def game(case: Case, steps: int, erase: Eraser, score: Score, chunk: int) -> Float[Tensor, "b n 2"]:
    """Return the area of the box of each alpha, as a share of the image, and p' with the box erased."""
    height, width = case.x.shape[2:]
    cuts = [threshold(case.saliency, step / steps) for step in range(steps)]
    found = torch.stack([boxes(cut, (height, width)) for cut in cuts], 1)
    p = without(case.classifier, case.x, case.y, found, erase=erase, score=score, chunk=chunk)
    start, end = ends(case, erase, score)
    x0, y0, x1, y1 = found.double().unbind(2)
    return torch.stack([(x1 - x0) * (y1 - y0) / (height * width), normalized(p, start, end)], 2)


def without(
    classifier: Classifier,
    x: Images,
    y: Labels,
    found: Float[Tensor, "b n 4"],
    *,
    erase: Eraser,
    score: Score = probability,
    chunk: int = 64,
) -> Float[Tensor, "b n"]:
    """Return the score of each image with each of its boxes erased; equal boxes are scored once."""
    image = torch.arange(len(x), device=x.device).repeat_interleave(found.shape[1])
    pairs = torch.cat([image[:, None], found.reshape(-1, 4).long()], 1)
    distinct, place = torch.unique(pairs, dim=0, return_inverse=True)
    filling = filler(x, erase, classifier.mean)

    def seen(some: Tensor) -> Tensor:
        i, mask = some[:, 0], outside(some[:, 1:], (x.shape[2], x.shape[3])).to(x.dtype)
        return score(classifier(mix(x[i], mask, filling(i))).double(), y[i])

    return torch.cat([seen(some) for some in torch.split(distinct, chunk)])[place].view(found.shape[:2])


def outside(found: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (n, 1, h, w) of the pixels outside half-open boxes x0 y0 x1 y1."""
    x0, y0, x1, y1 = found[:, :, None].unbind(1)
    rows, columns = (torch.arange(n, device=found.device) for n in size)
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]
    return ~inside[:, None]


def ends(case: Case, erase: Eraser, score: Score) -> tuple[Values, Values]:
    """Return the score of each image, and of the wholly erased image, in float64."""

    def erased() -> Tensor:
        nothing = mix(case.x, torch.zeros_like(case.saliency), resolve(erase, case.classifier.mean))
        return score(case.classifier(nothing).double(), case.y)

    return score(case.logits.double(), case.y), case.once(("erased", erase, score), erased)


def normalized(p: Float[Tensor, "b n"], start: Values, end: Values) -> Float[Tensor, "b n"]:
    """Return (p - end) / (start - end): 1 at the image's score, 0 at the erased one's; 1 where start <= end."""
    fall = (start - end)[:, None]
    return torch.where(fall > 0, (p - end[:, None]) / torch.where(fall > 0, fall, 1), 1)
