"""Insertion and deletion. Petsiuk, Das and Saenko, RISE, BMVC 2018."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, probability
from sightline.erase import Eraser, resolve
from sightline.memory import at_once
from sightline.metrics._measure import Case, Measure, Scored, check_scored, itself
from sightline.types import Images, Labels, Saliency, Score

Ties: TypeAlias = Literal["row_major", "random"]


def insertion(
    *,
    steps: int = 224,
    erase: Eraser = "rise",
    ties: Ties = "row_major",
    score: Score = probability,
    scored: Scored = "predicted",
    seed: int = 0,
    chunk: int | None = None,
) -> Measure:
    """Measure the area under the score while pixels are put in, the most salient first; higher is better.

    Step i shows the i h w / steps most salient pixels on the substrate `erase`, step 0 none and the last one all; the
    area is the normalized trapezoid (sum - first / 2 - last / 2) / steps, in [0, 1] for a probability. RISE's
    conventions by default: 224 steps (224 pixels each at 224 x 224), a blurred substrate, the predicted class.

    `ties`: equal pixels go in row-major order, or in a random one drawn with `seed`. `chunk` images at a time (None: as
    many as the device likes).

    *Differs:* the substrate's 11 x 11 kernel is a truncated Gaussian; RISE's script folds the Gaussian's tails back
    into it.

    Raises:
        ValueError: fewer than one step, a chunk below one, or an unknown scored class.
    """
    return game(steps, erase, ties, score, scored, seed, chunk, into=True)


def deletion(
    *,
    steps: int = 224,
    erase: Eraser = "mean",
    ties: Ties = "row_major",
    score: Score = probability,
    scored: Scored = "predicted",
    seed: int = 0,
    chunk: int | None = None,
) -> Measure:
    """Measure the area under the score while pixels are taken out, the most salient first; lower is better.

    As `insertion`, from the whole image to the substrate `erase`: the mean color, which is zero in normalized space.
    """
    return game(steps, erase, ties, score, scored, seed, chunk, into=False)


def game(
    steps: int, erase: Eraser, ties: Ties, score: Score, scored: Scored, seed: int, chunk: int | None, *, into: bool
) -> Measure:
    """Return the measure of either game."""
    if steps < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"expected steps >= 1 and chunk >= 1, got steps={steps}, chunk={chunk}")
    check_scored(scored)

    def curve(case: Case) -> Tensor:
        substrate = resolve(erase, case.classifier.mean)(case.x, case.saliency)
        start, end = (substrate, case.x) if into else (case.x, substrate)
        places = rank(case.saliency, ties, seed)
        only = range(steps) if into else range(1, steps + 1)
        rest = revealed(case.classifier, start, end, case.y, places, steps=steps, score=score, chunk=chunk, only=only)
        image = score(case.logits.double(), case.y)[:, None]
        return torch.cat([rest, image] if into else [image, rest], 1)

    return Measure(curve, into, scored, width=steps + 1, finish=area, curve=itself)


def rank(saliency: Saliency, ties: Ties = "row_major", seed: int = 0) -> Int[Tensor, "b n"]:
    """Return each pixel's place in decreasing saliency, 0 the most salient; `ties` orders equal pixels.

    Raises:
        ValueError: an unknown tie rule.
    """
    values = saliency.flatten(1)
    count = values.shape[1]
    if ties not in ("row_major", "random"):
        raise ValueError(f"expected ties='row_major' or ties='random', got {ties!r}")
    shuffle = torch.arange(count)
    if ties == "random":
        shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shuffle = shuffle.to(values.device)
    order = shuffle[values[:, shuffle].sort(dim=1, descending=True, stable=True).indices]
    return torch.empty_like(order).scatter_(1, order, torch.arange(count, device=values.device).expand_as(order))


def revealed(
    classifier: Classifier,
    start: Images,
    end: Images,
    y: Labels,
    places: Int[Tensor, "b n"],
    *,
    steps: int,
    score: Score = probability,
    chunk: int | None = None,
    only: range | None = None,
) -> Float[Tensor, "b _steps"]:
    """Return the score while `end` replaces `start`, pixel by pixel in the order of `places`; step 0 is `start`.

    Of the steps 0 .. `steps`, `only` these are scored; all by default. `chunk` images at a time (None: as many as the
    device likes).
    """
    count, height, width = places.shape[1], start.shape[2], start.shape[3]
    wanted = torch.tensor(only or range(steps + 1), device=start.device)
    pairs = torch.arange(len(start) * len(wanted), device=start.device)

    def seen(some: Tensor) -> Tensor:
        image, step = some // len(wanted), wanted[some % len(wanted)]
        shown = places[image] < (step * count // steps)[:, None]
        seen = torch.where(shown.view(-1, 1, height, width), end[image], start[image])
        return score(classifier(seen).double(), y[image])

    parts = torch.split(pairs, chunk or at_once(height, width, start.device.type))
    return torch.cat([seen(some) for some in parts]).view(len(start), len(wanted))


def area(curve: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Return the normalized trapezoid (sum - first / 2 - last / 2) / (n - 1)."""
    return (curve.sum(-1) - (curve[..., 0] + curve[..., -1]) / 2) / (curve.shape[-1] - 1)
