"""Measures. What a metric is to the evaluation: a score of one explained batch, a direction, and how to sum up."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method, probability
from sightline.data import Batch
from sightline.erase import Eraser, mix, resolve
from sightline.types import Images, Labels, Logits, Saliency, Values

Scored: TypeAlias = Literal["label", "predicted"]
State: TypeAlias = Literal["mean", "per_image"]


@dataclass(frozen=True, eq=False)
class Case:
    """One explained batch: `y` is the class that is scored, `saliency` the map in [0, 1] at the input's resolution."""

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

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` gives, made at the first call with this key."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def probability(self) -> Values:
        """Return p, the scored class's probability on the image, in float64."""
        return probability(self.logits.double(), self.y)

    def masked_probability(self, erase: Eraser, exponent: float) -> Values:
        """Return o, the scored class's probability on the image seen through the map to the power `exponent`."""

        def see() -> Tensor:
            seen = mix(self.x, self.saliency**exponent, resolve(erase, self.classifier.mean))
            return probability(self.classifier(seen).double(), self.y)

        return self.once(("masked", erase, exponent), see)


def itself(values: Tensor) -> Tensor:
    """Return the values as they are."""
    return values


@dataclass(frozen=True)
class Measure:
    """A metric with its settings.

    `score` gives each image one number, or `width` of them (a curve), in float64; `finish` turns the mean over the
    images, or one image's numbers, into what is reported, and is linear. `state`: keep the mean alone, or one float64
    an image as well, for intervals and for the best and worst cases.
    """

    score: Callable[[Case], Float[Tensor, "b ..."]]
    higher_is_better: bool
    scored: Scored = "label"
    state: State = "per_image"
    width: int = 1
    finish: Callable[[Tensor], Tensor] = itself

    def __call__(self, case: Case) -> Float[Tensor, "b width"]:
        """Return (b, width) numbers of one batch."""
        with torch.no_grad():
            return self.score(case).double().reshape(len(case.x), self.width)


def check_scored(scored: str) -> None:
    """Check the choice of the class that a metric scores.

    Raises:
        ValueError: neither `label` nor `predicted`.
    """
    if scored not in ("label", "predicted"):
        raise ValueError(f"expected scored='label' or scored='predicted', got {scored!r}")
