"""Rectified gradients. What guided backpropagation and the deconvolutional network share: other rules at the ReLUs."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.classifier import Classifier, UnsuitedError
from sightline.hooks import substituted
from sightline.types import Images, Labels, Score

Forward: TypeAlias = Callable[..., Tensor]
"""A torch function."""

RELUS: tuple[Forward, ...] = (
    *(F.relu, F.relu6, F.hardtanh, F.hardtanh_),
    *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
)
"""What a network may call to rectify; hardtanh where it starts at zero, which is how nn.ReLU6 runs."""


def rectified_gradient(classifier: Classifier, x: Images, y: Labels | None, score: Score, through: Forward) -> Images:
    """Return the gradient of the score, of which only the positive part enters each ReLU from above.

    `through(relu, *args)` runs a ReLU and decides what the ReLU itself does to the gradient.

    Raises:
        UnsuitedError: the gradient met no ReLU.
    """
    met: list[Forward] = []

    def rectified(relu: Forward, /, *args: Any, **kwargs: Any) -> Tensor:
        if not rectifies(relu, *args, **kwargs):
            return relu(*args, **kwargs)
        a = through(relu, *args, **kwargs)
        if a.requires_grad:
            on_gradient(a, partial(positive, relu))
        return a

    def positive(relu: Forward, gradient: Tensor) -> Tensor:
        met.append(relu)
        return gradient.clamp(min=0)

    with substituted({relu: partial(rectified, relu) for relu in RELUS}):
        gradient = classifier.gradient(x, y, score)
    if not met:
        raise UnsuitedError(
            f"{type(classifier.model).__name__} calls no ReLU on the way from the image to the logits, so there is "
            "nothing to rectify; use gradient, smooth_grad or integrated_gradients"
        )
    return gradient


def rectifies(relu: Forward, *args: Any, **kwargs: Any) -> bool:
    """Tell whether this call sets what is negative to zero: each does, but hardtanh only from zero on."""
    if relu not in (F.hardtanh, F.hardtanh_):
        return True
    low: float = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    return low == 0


def on_gradient(tensor: Tensor, change: Callable[[Tensor], Tensor | None]) -> None:
    """Call `change` with the tensor's gradient on the way back; what it returns, unless None, replaces the gradient.

    The gradient is that of the tensor as it is now, whatever is done to it in place afterwards.
    """
    register: Callable[..., Any] = tensor.register_hook
    register(change)


def through_active(relu: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Run a ReLU that passes the gradient where its unit is active."""
    return relu(*args, **kwargs)


def through_all(relu: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Run a ReLU that passes the gradient everywhere; in place where the ReLU is, even if its result is dropped."""
    z: Tensor
    z, *rest = (kwargs.pop("input"), *args) if "input" in kwargs else args
    copy = z.detach().clone()
    a = relu(copy, *rest, **kwargs)
    step = a - z.detach()
    return z.add_(step) if a is copy else z + step
