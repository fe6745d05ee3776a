"""Measures. What a metric is to the evaluation: a score of one explained batch, a direction, and how to sum up."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Absent, Classifier, Method, probability
from sightline.data import Batch
from sightline.erase import Eraser, mix, resolve
from sightline.hooks import differentiable
from sightline.types import Images, Labels, Logits, Saliency, Values

Scored: TypeAlias = Literal["label", "predicted"]
State: TypeAlias = Literal["mean", "per_image", "pool"]


@dataclass(frozen=True, eq=False)
class Case:
    """One explained batch: `y` is the class that is scored, `saliency` the map in [0, 1] at the input's resolution.

    `raw` is the map as the method gave it, zero everywhere in place of one that is not finite.
    """

    classifier: Classifier
    x: Images
    y: Labels
    saliency: Saliency
    raw: Saliency
    method: Method
    batch: Batch
    logits: Logits
    memory: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])
    """What several metrics of this case need is computed once."""
    explained: Labels | None = None
    """The class whose map it is; None means the scored one."""

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` gives, made at the first call with this key."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def explain(self, x: Images) -> Saliency:
        """Return the raw maps of other images for the explained class, zero in place of one that is not finite."""
        y = self.y if self.explained is None else self.explained
        with differentiable():
            raw = self.method(self.classifier, x, y).detach()
        return finite(raw)

    def predicted(self) -> Labels:
        """Return the classifier's own class of each image.

        Raises:
            UnsuitedError: there is no classifier.
        """
        if isinstance(self.classifier.model, Absent):
            self.classifier(self.x)
        return self.logits.argsort(dim=1, descending=True, stable=True)[:, 0]

    def boxes(self, i: int, metric: str) -> Float[Tensor, "n 4"]:
        """Return the boxes of the i-th image's scored class, in float64; `metric` asks for them.

        Raises:
            ValueError: the image has neither boxes nor a mask.
        """
        found = self.batch.samples[i].boxes_of(int(self.y[i]))
        if found is None:
            raise ValueError(f"{metric} needs boxes or a mask, and {self.batch.samples[i].id!r} has neither")
        return found.double()

    def probability(self) -> Values:
        """Return p, the scored class's probability on the image, in float64."""
        return probability(self.logits.double(), self.y)

    def masked_probability(self, erase: Eraser, exponent: float) -> Values:
        """Return o, the scored class's probability on the image seen through the map to the power `exponent`."""

        def see() -> Tensor:
            seen = mix(self.x, self.saliency**exponent, resolve(erase, self.classifier.mean))
            return probability(self.classifier(seen).double(), self.y)

        return self.once(("masked", erase, exponent), see)


def finite(raw: Saliency) -> Saliency:
    """Return the maps, zero everywhere in place of one that is not finite."""
    return torch.where(raw.isfinite().flatten(1).all(1).view(-1, 1, 1, 1), raw, torch.zeros_like(raw))


def itself(values: Tensor) -> Tensor:
    """Return the values as they are."""
    return values


def mean(curve: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Return the mean of each curve."""
    return curve.mean(-1)


@dataclass(frozen=True)
class Measure:
    """A metric with its settings.

    `score` gives each image `width` numbers in float64 (None: as many as it gives, always the same); an image whose
    numbers are NaN does not count. `finish` turns the mean numbers over the images into what is reported.

    `state`: "mean" keeps the mean alone, for what says nothing of one image; "per_image" keeps one float64 an image as
    well, `finish` of its numbers, for intervals and for the best and worst cases; "pool" keeps all numbers of all
    images, and `finish` gets them as (n, width).

    `higher_is_better` is None where a number is neither good nor bad. `curve` turns the mean numbers into a curve,
    drawn over `axis` (evenly from 0 to 1 where that is empty).
    """

    score: Callable[[Case], Float[Tensor, "b ..."]]
    higher_is_better: bool | None
    scored: Scored = "label"
    state: State = "per_image"
    width: int | None = 1
    finish: Callable[[Tensor], Tensor] = itself
    curve: Callable[[Tensor], Tensor] | None = None
    axis: tuple[float, ...] = ()

    def __call__(self, case: Case) -> Float[Tensor, "b width"]:
        """Return (b, width) numbers of one batch."""
        with torch.no_grad():
            numbers = self.score(case).double()
        return numbers.reshape(len(case.x), -1 if self.width is None else self.width)


def check_scored(scored: str) -> None:
    """Check the choice of the class that a metric scores.

    Raises:
        ValueError: neither `label` nor `predicted`.
    """
    if scored not in ("label", "predicted"):
        raise ValueError(f"expected scored='label' or scored='predicted', got {scored!r}")
