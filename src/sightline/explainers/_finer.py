"""Finer maps. A network's last maps enlarged by smaller steps, the weights as they were.

As Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021, do to ResNet, VGG and Inception
(after Zhou et al., CVPR 2016): nothing is dilated.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sightline.classifier import Classifier
from sightline.hooks import first, submodule

STRIDED = nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d
"""What may halve a map."""


@dataclass(frozen=True)
class Step:
    """A module that halved the map during the probe, and the height and width that it gave."""

    name: str
    after: tuple[int, int]


def finer(classifier: Classifier, stages: int) -> Classifier:
    """Return a copy of the classifier whose layer gives a map of 2^stages times the height and width.

    Of the last `stages` halvings before the layer every convolution (main path and projection) and every overlapping
    pooling gets stride 1; a pooling whose windows do not overlap goes. ResNet-50 at 224: 14x14 with one stage, 28x28
    with two. Which modules halve, one probe says. Without padding a convolution loses a cell or two at the border.

    Raises:
        ValueError: fewer halvings than stages, a network that cannot run without them, or whose map grew otherwise.
    """
    if stages < 0:
        raise ValueError(f"expected finer >= 0 halvings to leave out, got {stages}")
    result = replace(classifier, model=copy.deepcopy(classifier.model))
    cells, found = halvings(result)
    sizes = sorted({step.after for step in found}, key=lambda size: size[0] * size[1])
    if stages > len(sizes):
        told = ", ".join(f"{i}x{j}" for i, j in reversed(sizes)) or "none"
        raise ValueError(
            f"{type(classifier.model).__name__} has {len(sizes)} halvings before layer {classifier.layer!r} (strided "
            f"convolutions or poolings; to {told}); expected finer=0..{len(sizes)}, got {stages}"
        )
    for step in found:
        if step.after in sizes[:stages]:
            keep_size(result.model, step.name)
    check_grown(result, cells, stages)
    return result


def halvings(classifier: Classifier) -> tuple[tuple[int, int], Sequence[Step]]:
    """Return the size of the layer's map, and the halvings down to it that ran before the layer was done."""
    ran: list[Step] = []
    before: list[Step] = []

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        taken, given = first(inputs), first(output)
        if taken is not None and given is not None and given.shape[-1] < taken.shape[-1]:
            ran.append(Step(name, size_of(given)))

    def done(*_: object) -> None:
        before[:] = ran

    with ExitStack() as stack:
        for name, module in classifier.model.named_modules():
            if isinstance(module, STRIDED) and pair(module.stride) == (2, 2):
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
        stack.callback(submodule(classifier.model, classifier.layer).register_forward_hook(done).remove)
        cells = size_of(classifier.features(blank(classifier)))
    return cells, [step for step in before if step.after[0] >= cells[0] and step.after[1] >= cells[1]]


def blank(classifier: Classifier) -> Tensor:
    """Return two gray images of the classifier's own size."""
    return torch.full((2, classifier.channels, *classifier.size), 0.5, device=classifier.device)


def size_of(features: Tensor) -> tuple[int, int]:
    """Return height and width."""
    return features.shape[-2], features.shape[-1]


def keep_size(model: nn.Module, name: str) -> None:
    """Set a module's stride to 1; replace a pooling whose windows do not overlap by the identity."""
    module = submodule(model, name)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and pair(module.kernel_size) == pair(module.stride):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    elif isinstance(module, STRIDED):
        module.stride = (1, 1)


def pair(value: object) -> tuple[object, ...]:
    """Return a length for both directions."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def check_grown(classifier: Classifier, cells: tuple[int, int], stages: int) -> None:
    """Check that the layer's map has become 2^stages times as large, to within a cell a stage.

    Raises:
        ValueError: it has not, or the network cannot run any more.
    """
    name = f"{type(classifier.model).__name__} with its last {stages} halvings left out"
    try:
        grown = size_of(classifier.features(blank(classifier)))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{name} cannot run: {error}; its map cannot be made finer, use a larger size") from error
    factor = 2**stages
    if any(abs(new - factor * old) >= factor for new, old in zip(grown, cells, strict=True)):
        raise ValueError(
            f"{name} gives a map of {grown[0]}x{grown[1]} after {cells[0]}x{cells[1]}, expected {factor} times the "
            "side: something else than strided convolutions and poolings makes its maps smaller; use a larger size"
        )
