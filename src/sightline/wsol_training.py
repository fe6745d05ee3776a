"""Regularizers of weakly supervised localization. What a classifier's training step hides, mixes or drops.

HaS: Kumar Singh, Lee, Hide-and-Seek, ICCV 2017. CutMix: Yun et al., ICCV 2019. ADL: Choe, Shim, Attention-based dropout
layer for weakly supervised object localization, CVPR 2019. Compared by Choe et al., Evaluating weakly supervised object
localization methods right, CVPR 2020, whose settings are the defaults.

Images are normalized, so 0 is the mean color. All draws come from torch's default generator on the CPU, what holds for
all images of a step before what is drawn image by image, and an image's own draw goes by its place in the whole step.
So several processes draw what one would, but for the partners of CutMix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from sightline.classifier import Classifier, UnsuitedError
from sightline.hooks import edit
from sightline.kinds import configured
from sightline.runs import Choice
from sightline.types import Features, Images, Labels

Targets: TypeAlias = Sequence[tuple[float, Labels]]
"""Labels of a batch with the share that each of them has; the loss is the sum of share * cross entropy."""


class Part(NamedTuple):
    """Which images of a step a process has: those at the places `rank`, `rank` + `world`, `rank` + 2 `world`, ...."""

    rank: int = 0
    world: int = 1


WHOLE = Part()
"""All images: there is one process."""


@runtime_checkable
class Regularizer(Protocol):
    """What a training step's forward pass runs inside of: from images and labels to what is seen and learned."""

    def __call__(
        self, classifier: Classifier, x: Images, y: Labels, *, part: Part = WHOLE
    ) -> AbstractContextManager[tuple[Images, Targets]]:
        """Return a context that yields them, for a process that has this part of the step's images."""
        ...


def hide(x: Images, *, grid: int = 4, drop: float = 0.5, part: Part = WHOLE) -> Images:
    """Return the images with each cell of a `grid` x `grid` raster hidden, set to 0, with probability `drop` (HaS).

    The raster of the step's n-th image is the n-th draw, whichever process has it. Cells differ by a pixel where the
    sides do not divide.
    """
    b, _, h, w = x.shape
    kept = torch.rand(b * part.world, 1, grid, grid)[part.rank :: part.world] >= drop
    rows, columns = (torch.arange(side) * grid // side for side in (h, w))
    return x * kept[:, :, rows][..., columns].to(x.device)


def cutmix(x: Images, y: Labels, *, alpha: float = 1.0) -> tuple[Images, Labels, float]:
    """Return images with a box of their partners' pixels, the partners' labels, and the share of the own label.

    lambda ~ Beta(alpha, alpha); the box has its center anywhere and sides sqrt(1 - lambda) of the image's, clipped at
    its borders; the share is what the clipped box leaves. One box a batch; the partners are a permutation of the batch.
    The loss is share * CE(logits, y) + (1 - share) * CE(logits, other).

    Under several processes all have the same box, but no process has another one's images: the partners of an image are
    those beside it in its own process, so the training is not that of one process, and depends on how many there are.
    """
    h, w = x.shape[2:]
    side = (1 - float(torch.distributions.Beta(alpha, alpha).sample())) ** 0.5
    (top, bottom), (left, right) = (interval(length, side * length) for length in (h, w))
    partner = torch.randperm(len(x)).to(x.device)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return mixed, y[partner.to(y.device)], 1 - (bottom - top) * (right - left) / (h * w)


@contextmanager
def attention_dropout(
    model: nn.Module, layers: Sequence[str], *, threshold: float = 0.9, drop: float = 0.75
) -> Iterator[None]:
    """Multiply the layers' outputs (b, c, i, j) by a drop mask or by an importance map while inside (ADL).

    Attention M = mean_c A; the mask is 1 where M < threshold * max M of the image, so the most discriminative place is
    hidden; the importance map is sigmoid(M). The mask is taken with probability `drop`, drawn once for each layer when
    the context is entered.

    Raises:
        LookupError: no such layer.
        UnsuitedError: a layer whose output is no (b, c, i, j), when it runs.
    """
    masked: list[bool] = (torch.rand(len(layers)) < drop).tolist()
    with ExitStack() as stack:
        for layer, mask in zip(layers, masked, strict=True):
            attend = partial(attended, layer=layer, threshold=threshold if mask else None)
            stack.enter_context(edit(model, layer, attend))
        yield


def attended(A: Tensor, *, layer: str, threshold: float | None) -> Features:
    """Return the features times their drop mask, or without a threshold times their importance map.

    Raises:
        UnsuitedError: not (b, c, i, j).
    """
    if A.ndim != 4:
        raise UnsuitedError(
            f"attention dropout needs maps (b, c, i, j), and layer {layer!r} gives shape {tuple(A.shape)}; name "
            "convolutional layers: adl?layers=layer3+layer4"
        )
    M = A.mean(1, keepdim=True)
    return A * (M.sigmoid() if threshold is None else M.lt(threshold * M.amax((2, 3), keepdim=True)))


def weighted(targets: Targets, value: Callable[[Labels], Tensor]) -> Tensor:
    """Return the sum of share * value(labels)."""
    return torch.stack([share * value(y) for share, y in targets]).sum()


def interval(length: int, side: float) -> tuple[int, int]:
    """Return a random interval of this side around a center anywhere in [0, length), clipped to [0, length]."""
    center = float(torch.rand(())) * length
    return max(0, round(center - side / 2)), min(length, round(center + side / 2))


@dataclass(frozen=True)
class Plain:
    """No regularizer."""

    @contextmanager
    def __call__(
        self, classifier: Classifier, x: Images, y: Labels, *, part: Part = WHOLE
    ) -> Iterator[tuple[Images, Targets]]:
        """Yield images and labels as they are."""
        yield x, ((1.0, y),)


@dataclass(frozen=True)
class HideAndSeek:
    """HaS, see `hide`. Four cells a side are the paper's patches of 56 pixels at 224; 14, 7 and 5 its 16, 32 and 44.

    *Differs:* the benchmark's code counts a patch in pixels (4 by default); here patches scale with the image.

    Raises:
        ValueError: no cell, or a probability outside [0, 1).
    """

    grid: int = 4
    drop: float = 0.5

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                f"has: expected grid >= 1 cells a side, each hidden with 0 <= drop < 1, got grid={self.grid}, "
                f"drop={self.drop}; the paper's: has?grid=4&drop=0.5"
            )

    @contextmanager
    def __call__(
        self, classifier: Classifier, x: Images, y: Labels, *, part: Part = WHOLE
    ) -> Iterator[tuple[Images, Targets]]:
        """Yield images with hidden cells and their labels."""
        yield hide(x, grid=self.grid, drop=self.drop, part=part), ((1.0, y),)


@dataclass(frozen=True)
class CutMix:
    """CutMix, see `cutmix`, in a share `probability` of the steps; partners are of the same process.

    Raises:
        ValueError: alpha not positive, or no probability.
    """

    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf") or not 0 <= self.probability <= 1:
            raise ValueError(
                f"cutmix: expected alpha > 0 and a probability in [0, 1], got alpha={self.alpha}, "
                f"probability={self.probability}; the paper's: cutmix?alpha=1&probability=1"
            )

    @contextmanager
    def __call__(
        self, classifier: Classifier, x: Images, y: Labels, *, part: Part = WHOLE
    ) -> Iterator[tuple[Images, Targets]]:
        """Yield mixed images, and own and partners' labels with their shares."""
        if float(torch.rand(())) >= self.probability:
            yield x, ((1.0, y),)
        else:
            mixed, other, share = cutmix(x, y, alpha=self.alpha)
            yield mixed, ((share, y), (1 - share, other))


@dataclass(frozen=True)
class AttentionDropout:
    """ADL, see `attention_dropout`, at `layers` joined by "+"; by default at the layer that is explained.

    Raises:
        ValueError: a threshold or a probability outside [0, 1].
    """

    layers: str = ""
    threshold: float = 0.9
    drop: float = 0.75

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.drop <= 1):
            raise ValueError(
                f"adl: expected threshold and drop in [0, 1], got threshold={self.threshold}, drop={self.drop}; "
                "the paper's: adl?threshold=0.9&drop=0.75"
            )

    @contextmanager
    def __call__(
        self, classifier: Classifier, x: Images, y: Labels, *, part: Part = WHOLE
    ) -> Iterator[tuple[Images, Targets]]:
        """Yield images and labels as they are, with attention dropout in the network."""
        layers = (self.layers or classifier.layer).split("+")
        with attention_dropout(classifier.model, layers, threshold=self.threshold, drop=self.drop):
            yield x, ((1.0, y),)


REGULARIZERS: Mapping[str, Callable[..., Regularizer]] = {
    "none": Plain,
    "has": HideAndSeek,
    "cutmix": CutMix,
    "adl": AttentionDropout,
}
"""Name -> what makes it of its settings."""


def regularizer(text: str) -> Regularizer:
    """Return the regularizer of a configuration: "none", "cutmix", "has?grid=7&drop=0.3", ....

    Raises:
        LookupError: an unknown name or setting, with near ones.
        TypeError, ValueError: a setting of a wrong kind, or out of range.
    """
    choice = Choice.parse(text)
    return configured(REGULARIZERS, choice.name, choice.settings, "regularizer")()
