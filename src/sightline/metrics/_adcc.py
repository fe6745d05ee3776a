"""ADCC and two of its parts, coherency and complexity.

Poppi, Cornia, Baraldi and Cucchiara, Revisiting the evaluation of class activation mapping for explainability, CVPR
workshops 2021.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.erase import Eraser, mix, resolve
from sightline.maps import resize
from sightline.metrics._average import drop
from sightline.metrics._measure import Case, Measure, Scored, check_scored
from sightline.registry import chosen
from sightline.types import Saliency, Values

Average: TypeAlias = Literal["image", "means"]


def adcc(*, erase: Eraser = "black", average: Average = "image", scored: Scored = "predicted") -> Measure:
    """Measure ADCC = 100 * 3 / (1 / Coh + 1 / (1 - Com) + 1 / (1 - AD)), in percent, higher is better.

    The harmonic mean of `coherency`, of what `complexity` leaves, and of the probability kept (`average_drop`'s
    complement), all of one class, the predicted one by default; 0 where one of the three is 0.

    `average`: "image", the mean over images of each image's number, as the paper's formula and code have it; "means",
    the number of the three means over the images, with which one hopeless image costs its share and no more; no number
    an image is kept then.

    Raises:
        LookupError: an unknown average.
        ValueError: an unknown scored class.
    """
    check_scored(scored)
    make = chosen(average, AVERAGES, "average")

    def parts(case: Case) -> Tensor:
        return torch.stack([coherence(case, erase), complexity_of(case), dropped(case, erase)], 1)

    return make(parts, scored)


def coherency(*, erase: Eraser = "black", scored: Scored = "predicted") -> Measure:
    """Measure 100 Coh = 100 (r + 1) / 2, in percent, higher is better; r = Pearson's of S(x) and S(x * S(x)).

    S is the map in [0, 1] at the input's resolution; the second is explained for the same class, on the image seen
    through the first (the hidden part shows `erase`). Scale and offset of either map do not matter.

    0, the lowest, where either map is constant and r does not exist: official code gives a map that is not a number 0,
    and its scaling makes one of every constant map. 50 where they are uncorrelated.

    Raises:
        ValueError: an unknown scored class.
    """
    check_scored(scored)
    return Measure(lambda case: 100 * coherence(case, erase), True, scored)


def complexity(*, scored: Scored = "predicted") -> Measure:
    """Measure 100 Com = 100 mean |S|, in percent, lower is better; S is the map in [0, 1] at the input's resolution.

    0 for a constant map, which is 0 everywhere once it is scaled.

    Raises:
        ValueError: an unknown scored class.
    """
    check_scored(scored)
    return Measure(lambda case: 100 * complexity_of(case), False, scored)


def coherence(case: Case, erase: Eraser) -> Values:
    """Return Coh of each image, in [0, 1]; 0 where a map is constant."""

    def again() -> Tensor:
        return case.explain(mix(case.x, case.saliency, resolve(erase, case.classifier.mean)))

    second = case.once(("explained through the map", erase), again)
    r = correlation(case.saliency.double(), resize(second.double(), (case.x.shape[2], case.x.shape[3])))
    return torch.where(varies(case.raw) & varies(second), (r + 1) / 2, 0)


def complexity_of(case: Case) -> Values:
    """Return Com of each image, in [0, 1]."""
    return case.saliency.double().abs().mean((1, 2, 3))


def dropped(case: Case, erase: Eraser) -> Values:
    """Return AD of each image, in [0, 1]."""
    return drop(case.probability(), case.masked_probability(erase, 1.0)) / 100


def varies(maps: Saliency) -> Tensor:
    """Tell which maps are not constant."""
    return maps.amax((1, 2, 3)) > maps.amin((1, 2, 3))


def correlation(a: Saliency, b: Saliency) -> Values:
    """Return Pearson's correlation of the pixels of each pair of maps, in [-1, 1]; 0 where it does not exist."""
    a, b = (maps - maps.mean((1, 2, 3), keepdim=True) for maps in (a, b))
    size = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    return torch.where(size > 0, (a * b).sum((1, 2, 3)) / torch.where(size > 0, size, 1), 0).clamp(-1, 1)


def harmonic(parts: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
    """Return ADCC, in percent, of (Coh, Com, AD); 0 where one of Coh, 1 - Com and 1 - AD is."""
    coh, com, ad = parts.unbind(-1)
    return 100 * 3 / (1 / coh + 1 / (1 - com) + 1 / (1 - ad))


def of_images(parts: Callable[[Case], Tensor], scored: Scored) -> Measure:
    """Return the measure that takes the harmonic mean image by image."""
    return Measure(lambda case: harmonic(parts(case)), True, scored)


def of_means(parts: Callable[[Case], Tensor], scored: Scored) -> Measure:
    """Return the measure that takes the harmonic mean of the mean parts."""
    return Measure(parts, True, scored, state="mean", width=3, finish=harmonic)


AVERAGES: Mapping[str, Callable[[Callable[[Case], Tensor], Scored], Measure]] = {"image": of_images, "means": of_means}
