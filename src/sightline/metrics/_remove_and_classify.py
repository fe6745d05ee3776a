"""Remove and classify. Kim et al., Keep CALM and improve visual feature attribution, ICCV 2021, section 5.3."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sightline.erase import Eraser, blur, filler, mix
from sightline.metrics._insertion import rank
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.types import Erase

BLUR: Erase = partial(blur, sigma=15.0, radius=15)
"""A Gaussian of 31 x 31 pixels with reflected borders, as in the official code."""


def remove_and_classify(
    *,
    shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    erase: Eraser = BLUR,
    relative: bool = True,
    scored: Scored = "label",
    seed: int = 0,
    chunk: int = 64,
) -> Measure:
    """Measure R_k = A_k / A_k^r, the accuracy without the k most salient pixels over that without k random ones.

    A_k is the share of images that are still classified as the scored class when a share k of `shares` of the pixels,
    the most salient first (equal ones in row-major order), shows `erase`: round(k h w) pixels. A_k^r is the same with
    the first pixels of one permutation drawn with `seed`, the same for every image of a size. The curve is R_k, the
    number its mean over the shares; >= 0, without unit, about 1 for a random map, lower is better. R_k is NaN where
    A_k^r = 0, and the mean leaves that share out: A_k^r does not depend on the method, so methods stay comparable on
    the same images. NaN where no share is left.

    relative=False gives A_k, and its mean: in [0, 1], and the random images are not scored. R_k says nothing of one
    image, so there are no numbers of single images.

    *Differs:* the paper does not say how its random pixels are drawn. Its script erases with zero in normalized space
    (erase="mean").

    Raises:
        ValueError: no share, one outside (0, 1], a chunk below one, or an unknown scored class.
    """
    check_shares(shares, chunk)
    check_scored(scored)

    def score(case: Case) -> Tensor:
        salient = accurate(case, rank(case.saliency), shares, erase, chunk)
        if not relative:
            return salient
        return torch.cat([salient, accurate(case, drawn(case, seed), shares, erase, chunk)], 1)

    curve = ratio if relative else as_given
    width, axis = len(shares) * (2 if relative else 1), tuple(map(float, shares))

    def finish(numbers: Tensor) -> Tensor:
        return curve(numbers).nanmean(-1)

    return Measure(score, False, scored, "mean", width, finish, curve, axis)


def ratio(numbers: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
    """Return R = A / A^r of the numbers (A, A^r), NaN where A^r = 0."""
    A, A_r = numbers.chunk(2, -1)
    return torch.where(A_r > 0, A / torch.where(A_r > 0, A_r, 1), torch.nan)


def as_given(numbers: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """Return A as it is."""
    return numbers


def drawn(case: Case, seed: int) -> Int[Tensor, "b n"]:
    """Return each pixel's place in a random order, the same for every image."""
    count = case.x.shape[2] * case.x.shape[3]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.to(case.x.device).expand(len(case.x), -1)


def accurate(
    case: Case, places: Int[Tensor, "b n"], shares: Sequence[float], erase: Eraser, chunk: int
) -> Float[Tensor, "b m"]:
    """Return 1 where an image is still of its class without the pixels of the first places, for each share."""
    x, n = case.x, len(shares)
    pixels = torch.tensor([round(share * places.shape[1]) for share in shares], device=x.device)
    pairs = torch.arange(len(x) * n, device=x.device)
    filling = filler(x, erase, case.classifier.mean)

    def right(some: Tensor) -> Bool[Tensor, " c"]:
        i = some // n
        kept = (places[i] >= pixels[some % n, None]).to(x.dtype).view(-1, 1, *x.shape[2:])
        return case.classifier(mix(x[i], kept, filling(i))).argmax(1) == case.y[i]

    return torch.cat([right(some) for some in torch.split(pairs, chunk)]).double().view(len(x), n)


def check_shares(shares: Sequence[float], chunk: int) -> None:
    """Check the shares of pixels that are removed, and the chunk.

    Raises:
        ValueError: no share, one outside (0, 1], or a chunk below one.
    """
    if not shares or not all(0 < share <= 1 for share in shares) or chunk < 1:
        raise ValueError(
            f"expected shares in (0, 1], at least one, and chunk >= 1, got shares={tuple(shares)}, chunk={chunk}"
        )
