"""Infidelity. Yeh, Hsieh, Suggala, Inouye and Ravikumar, On the (in)fidelity and sensitivity of explanations, NeurIPS
2019.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import logit
from sightline.erase import Eraser, filler, mix, resolve
from sightline.maps import resize
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.registry import chosen
from sightline.types import Images, Score, Values

Perturbation: TypeAlias = Literal["noisy_baseline", "gaussian", "square"]

Perturbed: TypeAlias = tuple[Images, Tensor]
"""The images x - I, and I (or its indicator), by which the map is weighted."""


def infidelity(
    *,
    perturbation: Perturbation = "noisy_baseline",
    samples: int = 1000,
    noise: float = 0.2,
    sides: tuple[float, float] = (1 / 28, 10 / 28),
    multiplied: bool = False,
    erase: Eraser = "black",
    score: Score = logit,
    normalize: bool = True,
    scored: Scored = "label",
    seed: int = 0,
    chunk: int = 64,
) -> Measure:
    """Measure INFD = E_I (beta I.Phi - (f(x) - f(x - I)))^2, at least 0, lower is better.

    In squares of the score's unit. Phi is the raw map, brought to the input's resolution (bilinear). It has one
    channel, so I.Phi adds I over the colors: only what the colors share can be told exactly. The expectation is over
    `samples` draws, the same for every image:

        noisy_baseline   I = x - clip(x0 + noise e, 0, 1), e standard normal, x0 the filling `erase`
        gaussian         I = noise e; x - I is not clamped
        square           I = x - x0 on one square, 0 elsewhere; every square whose side lies between the two `sides`
                         (shares of the image's shorter side, rounded, at least a pixel) is equally likely

    The first with .2 around black, and squares of 1 to 10 of 28 pixels, are those of the paper's code.

    `normalize`: beta = E[I.Phi df] / E[(I.Phi)^2], the scale that suits the image's map best, as in the paper's code:
    then INFD <= E[df^2], which is the value of a map that is zero everywhere, and no scale (or sign) of the map
    matters. False: beta = 1. `multiplied`: the map has the image in it already (input x gradient, integrated
    gradients), so I.Phi is the map's sum over the square, which is the paper's choice for squares.

    The map is that of the scored class, and so is f, by default a logit. `chunk` images at once, or one batch if that
    is more.

    Raises:
        LookupError: an unknown perturbation.
        ValueError: no sample, noise not above zero, sides that are no range in (0, 1], a chunk below one, an unknown
            scored class, or `multiplied` with anything but squares.
    """
    if samples < 1 or noise <= 0 or chunk < 1:
        raise ValueError(
            f"expected samples >= 1, noise > 0 and chunk >= 1, got samples={samples}, noise={noise}, chunk={chunk}"
        )
    if len(sides) != 2 or not 0 < sides[0] <= sides[1] <= 1:
        raise ValueError(f"expected two sides, 0 < smallest <= largest <= 1, as shares of the image, got {sides}")
    if multiplied and perturbation != "square":
        raise ValueError(f"multiplied=True needs perturbation='square', whose I is there or not, got {perturbation!r}")
    check_scored(scored)
    ways: dict[str, Callable[[Case], Iterator[Perturbed]]] = {
        "noisy_baseline": partial(noisy_baseline, samples=samples, noise=noise, erase=erase, seed=seed),
        "gaussian": partial(gaussian, samples=samples, noise=noise, seed=seed),
        "square": partial(square, samples=samples, sides=sides, multiplied=multiplied, erase=erase, seed=seed),
    }
    perturb = chosen(perturbation, ways, "perturbation")

    def error(case: Case) -> Tensor:
        told, fell = effects(case, perturb(case), score, chunk)
        return (scale(told, fell)[:, None] * told - fell if normalize else told - fell).square().mean(1)

    return Measure(error, higher_is_better=False, scored=scored)


def effects(
    case: Case, perturbations: Iterator[Perturbed], score: Score, chunk: int
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Return I.Phi and f(x) - f(x - I) of each image and draw."""
    size = (case.x.shape[2], case.x.shape[3])
    phi, start = resize(case.raw.double(), size), score(case.logits.double(), case.y)
    told: list[Tensor] = []
    fell: list[Tensor] = []
    while some := list(islice(perturbations, max(1, chunk // len(case.x)))):
        seen = torch.cat([images for images, _ in some])
        values = score(case.classifier(seen).double(), case.y.repeat(len(some))).view(len(some), -1)
        fell.append(start - values)
        told.extend((weight.double() * phi).sum((1, 2, 3)) for _, weight in some)
    return torch.stack(told, 1), torch.cat(fell).T


def scale(told: Float[Tensor, "b n"], fell: Float[Tensor, "b n"]) -> Values:
    """Return beta, with which the first is nearest to the second; 0 where the first is zero everywhere."""
    size = told.square().mean(1)
    return (told * fell).mean(1) / torch.where(size > 0, size, 1)


def noisy_baseline(case: Case, *, samples: int, noise: float, erase: Eraser, seed: int) -> Iterator[Perturbed]:
    """Yield x with noise around the filling in its place."""
    filling = resolve(erase, case.classifier.mean)(case.x, torch.zeros_like(case.x[:, :1]))
    for e in normal(case.x, samples, seed):
        seen = (filling + noise * e).clamp(0, 1)
        yield seen, case.x - seen


def gaussian(case: Case, *, samples: int, noise: float, seed: int) -> Iterator[Perturbed]:
    """Yield x with noise taken away."""
    for e in normal(case.x, samples, seed):
        taken = noise * e.expand_as(case.x)
        yield case.x - taken, taken


def normal(x: Images, samples: int, seed: int) -> Iterator[Float[Tensor, "ch h w"]]:
    """Yield standard normal noise of an image's shape."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        yield torch.randn(x.shape[1:], generator=generator, dtype=torch.float64).to(x)


def square(
    case: Case, *, samples: int, sides: tuple[float, float], multiplied: bool, erase: Eraser, seed: int
) -> Iterator[Perturbed]:
    """Yield x with a square erased; I is the square's indicator if the map is multiplied with the image already."""
    h, w = case.x.shape[2:]
    fill = filler(case.x, erase, case.classifier.mean)(torch.arange(len(case.x), device=case.x.device))
    for top, left, side in squares((h, w), sides, samples, seed):
        kept = torch.ones_like(case.x[:, :1])
        kept[:, :, top : top + side, left : left + side] = 0
        seen = mix(case.x, kept, fill)
        yield seen, 1 - kept if multiplied else case.x - seen


def squares(size: tuple[int, int], sides: tuple[float, float], samples: int, seed: int) -> list[tuple[int, int, int]]:
    """Return top, left and side of random squares inside an image, each of all possible ones equally likely."""
    h, w = size
    low, high = (max(1, round(share * min(size))) for share in sides)
    lengths = torch.arange(low, high + 1)
    counts = (h - lengths + 1) * (w - lengths + 1)
    ends = counts.cumsum(0)
    index = torch.randint(int(ends[-1]), (samples,), generator=torch.Generator().manual_seed(seed))
    which = torch.searchsorted(ends, index, right=True)
    place, columns = index - (ends - counts)[which], w - lengths[which] + 1
    found = torch.stack([place // columns, place % columns, lengths[which]], 1)
    return [(top, left, side) for top, left, side in found.tolist()]
