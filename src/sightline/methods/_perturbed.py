"""Perturbed copies. What all averages over changed images share: their maps, the mean of these, and the record."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from inspect import Parameter, signature
from itertools import islice
from types import FunctionType
from typing import TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import SCORES, Classifier, Method
from sightline.hooks import seen
from sightline.methods import METHODS, Entry
from sightline.registry import find
from sightline.types import Images, Saliency, Score, Values

Chosen: TypeAlias = Method | str
"""A method, or the name of one."""

Weight: TypeAlias = Score | str | None
"""What a copy's map is weighted by: a score, the name of one, or None for 1."""


def complete(method: Chosen) -> Method:
    """Return the method with its defaults bound like its settings, so that a record of it is complete.

    Raises:
        LookupError: no method of that name.
    """
    entry = find(method, METHODS, "methods") if isinstance(method, str) else method
    function = entry.method if isinstance(entry, Entry) else entry
    named = [p for p in signature(function).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    settings = {p.name: p.default for p in named if p.default is not p.empty}
    return partial(function, **settings) if settings else function


def called(name: str) -> Callable[[Callable[..., Saliency]], Callable[..., Saliency]]:
    """Name what a combinator makes as the combinator is called: records show what was written."""

    def rename(function: Callable[..., Saliency]) -> Callable[..., Saliency]:
        cast(FunctionType, function).__name__ = name
        return function

    return rename


def weighting(weight: Weight) -> Score | None:
    """Return the score that is meant.

    Raises:
        LookupError: no score of that name.
    """
    return find(weight, SCORES, "scores") if isinstance(weight, str) else weight


def check_counts(samples: int, chunk: int) -> None:
    """Check how many copies there are, and how many at a time.

    Raises:
        ValueError: fewer than one.
    """
    if samples < 1 or chunk < 1:
        raise ValueError(f"expected samples >= 1 and chunk >= 1, got samples={samples}, chunk={chunk}")


def maps_of(
    method: Callable[[Classifier, Images, Int[Tensor, "b *n"]], Float[Tensor, "b _n _i _j"]],
    classifier: Classifier,
    y: Int[Tensor, "b *n"],
    copies: Iterable[Images],
    chunk: int,
    weight: Score | None = None,
) -> Iterator[Float[Tensor, "b _n _i _j"]]:
    """Yield the (weighted) maps of each copy of the batch in order, explained together up to `chunk` images.

    `y` is the class of each image, or several, which the method then explains together.
    """
    left = iter(copies)
    while group := list(islice(left, max(1, chunk // len(y)))):
        x, labels = torch.cat(group), torch.cat([y] * len(group))
        maps, w = weighed(method, classifier, x, labels, weight)
        yield from torch.split(maps if weight is None else maps * w.to(maps.dtype).view(-1, 1, 1, 1), len(y))


def weighed(
    method: Callable[[Classifier, Images, Int[Tensor, "b *n"]], Float[Tensor, "b _n _i _j"]],
    classifier: Classifier,
    x: Images,
    y: Int[Tensor, "b *n"],
    weight: Score | None,
) -> tuple[Float[Tensor, "b _n _i _j"], Values]:
    """Return the maps of images and their weights, by the logits that the method has seen where it has seen them.

    Raises:
        ValueError: a weight below zero.
    """
    if weight is None:
        return method(classifier, x, y), x.new_ones(len(x))
    with seen(classifier.model, classifier.normalize(x), lambda output: classifier.read(output, len(x))) as logits:
        maps = method(classifier, x, y)
    with torch.no_grad():
        w = weight(logits[0] if logits else classifier(x), y)
    if bool((w < 0).any()):
        raise ValueError(f"expected weights >= 0, got {float(w.min()):.4g}; use 'sigmoid', 'probability' or None")
    return maps, w


def average(maps: Iterable[Saliency]) -> Saliency:
    """Return the mean, updated map by map: equal maps have exactly themselves as mean."""
    left = iter(maps)
    mean = next(left)
    for n, S in enumerate(left, 2):
        mean = mean + (S - mean) / n
    return mean
