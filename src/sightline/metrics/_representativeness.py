"""Representativeness. Fong and Vedaldi, Interpretable explanations by meaningful perturbation, ICCV 2017."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import probability
from sightline.erase import Eraser, filler, mix
from sightline.maps import blur, scale, unit
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself, mean
from sightline.metrics._minimality import ends, normalized
from sightline.types import Score


def representativeness(
    *,
    steps: int = 20,
    smooth: float = 10.0,
    erase: Eraser = "blur",
    score: Score = probability,
    scored: Scored = "label",
    chunk: int = 64,
) -> Measure:
    """Measure the score left while more and more of a map's region is deleted, its peaks first; lower is better.

    The mean of p'(alpha) over alpha = 0, 1/n, ..., (n - 1)/n with n = `steps`; see `deletion_curve`. Each p' is
    clamped to [0, 1], or else one image that has almost nothing to lose outweighs all others. The paper's question is
    asked by several of these side by side, with erase = blur, mean and noise: a region that represents the object
    suppresses the score whatever takes its place.

    *Differs:* the paper shows the curve alone and does not clamp.

    Raises:
        ValueError: fewer than one threshold, a negative smoothing, a chunk below one, or an unknown scored class.
    """
    if steps < 1 or smooth < 0 or chunk < 1:
        raise ValueError(
            f"expected steps >= 1, smooth >= 0 and chunk >= 1, got steps={steps}, smooth={smooth}, chunk={chunk}"
        )
    check_scored(scored)

    def curve(case: Case) -> Tensor:
        left = deletion_curve(case, steps=steps, smooth=smooth, erase=erase, score=score, chunk=chunk)
        return left.clamp(0, 1)

    return Measure(curve, False, scored, width=steps, finish=mean, curve=itself)


def deletion_curve(
    case: Case,
    *,
    steps: int = 20,
    smooth: float = 10.0,
    erase: Eraser = "blur",
    score: Score = probability,
    chunk: int = 64,
) -> Float[Tensor, "b n"]:
    """Return p'(alpha) = (p - p_erased) / (p_orig - p_erased) for alpha = 0, 1/n, ..., (n - 1)/n.

    In the paper's polarity the mask is m = 1 - s, where s is the map, blurred with a Gaussian of `smooth` pixels of a
    224 x 224 image (scaled by sqrt(h w) / 224 to others) and scaled to [0, 1]. Pixels with m < alpha are deleted, so
    none at alpha = 0, then the most salient, in the end all but the least. p' is 1 where p_orig <= p_erased.
    """
    x, n = case.x, steps
    m = 1 - unit(blur(case.saliency, smooth * scale((x.shape[2], x.shape[3]))))
    pairs = torch.arange(len(x) * n, device=x.device)
    filling = filler(x, erase, case.classifier.mean)

    def seen(some: Tensor) -> Tensor:
        i, alpha = some // n, (some % n).to(m.dtype) / n
        kept = (m[i] >= alpha.view(-1, 1, 1, 1)).to(x.dtype)
        return score(case.classifier(mix(x[i], kept, filling(i))).double(), case.y[i])

    p = torch.cat([seen(some) for some in torch.split(pairs, chunk)]).view(len(x), n)
    return normalized(p, *ends(case, erase, score))
