"""FullGrad. Srinivas and Fleuret, Full-gradient representation for neural network visualization, NeurIPS 2019."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.classifier import Classifier, UnsuitedError, logit
from sightline.hooks import substituted
from sightline.maps import resize, unit
from sightline.methods._rectified import on_gradient
from sightline.registry import chosen
from sightline.types import Features, Images, Labels, Saliency, Score, Values

Rescale: TypeAlias = Literal["channel", "layer", "none"]
Forward: TypeAlias = Callable[..., Tensor]

CURVED: tuple[Forward, ...] = (
    *(F.relu6, F.hardtanh, F.hardtanh_, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.hardswish, F.hardsigmoid, torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.group_norm),
)
"""Functions g whose tangent does not go through zero: their bias is what it leaves, g(z) - g'(z) z."""


def full_grad(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    score: Score = logit,
    rescale: Rescale = "layer",
) -> Saliency:
    """Return the shares of the image and of every bias in the score, laid over each other.

    S = sum_ch psi(dy/dz z)_ch + sum_l sum_k psi(dy/db_l b_l)_k, psi = up(rescale(|.|)), z the normalized image,
    l the layers on the grid: convolutions, batch norms (bias beta - gamma mu / sigma), and smooth or bounded
    activations with what their tangent leaves; up bilinear. (b, 1, h, w), non-negative, at the input's resolution. One
    forward, one backward. See `full_gradient` for the shares themselves, which sum to the score.

    `rescale` sets the minimum to 0 and the maximum to 1 over all channels of a `layer` (the official code), in each
    `channel` (the formula as it is printed, and pytorch-grad-cam: then the size of a bias no longer counts), or not
    (`none`).

    *Differs:* linear layers behind the pooling have no place on the image; they count in `full_gradient` alone, as in
    the paper's own maps.

    Raises:
        UnsuitedError: a linear layer or layer norm works on tokens or channels-last maps, or no gradient came back.
        LookupError: an unknown `rescale`.
    """
    psi = chosen(rescale, RESCALES, "rescale")
    parts = full_gradient(classifier, x, y, score)
    S = psi(parts.image.abs()).sum(1, keepdim=True)
    for share in parts.maps:
        S = S + resize(psi(share.abs()).sum(1, keepdim=True), (x.shape[2], x.shape[3])).to(S.dtype)
    return S


@dataclass(frozen=True, eq=False)
class FullGradient:
    """The shares in the score: those of the image's pixels, of the biases on the grid, and of those behind it."""

    image: Images
    maps: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]

    def total(self) -> Values:
        """Return the sum of all shares of each image."""
        parts = [part.flatten(1).sum(1) for part in (self.image, *self.maps, *self.rest)]
        return torch.stack(parts).sum(0)


def full_gradient(classifier: Classifier, x: Images, y: Labels | None = None, score: Score = logit) -> FullGradient:
    """Return the full gradient: dy/dz z, and dy/db b of every bias, in normalized space.

    y(x) = <dy/dz, z> + sum_l <dy/db_l, b_l> (proposition 1) exactly, for logits of networks of convolutions, linear
    layers, batch and group norms, ReLUs and other activations, pooling, sums and concatenations. Products of features
    (squeeze and excitation) and biases that are added by hand are not accounted for.

    Raises:
        UnsuitedError: as `full_grad`.
    """
    found: list[Tensor] = []
    with substituted(recorders(found)):
        gradient = classifier.gradient(x, y, score)
    z = x.detach() - x.new_tensor(classifier.mean).view(1, -1, 1, 1)
    maps, rest = (tuple(share for share in found if (share.ndim == 4) is grid) for grid in (True, False))
    return FullGradient(gradient * z, maps, rest)


def recorders(found: list[Tensor]) -> Mapping[Forward, Forward]:
    """Return the functions that run torch's and put dy/db b into `found` on the way back."""

    def record(func: Forward, of: Callable[..., Tensor | None], /, *args: Any, **kwargs: Any) -> Tensor:
        args = (kwargs.pop("input"), *args) if "input" in kwargs else args
        b = of(*args, **kwargs)
        output = func(*args, **kwargs)
        if b is not None and output.requires_grad:
            on_gradient(output, lambda gradient: found.append(gradient * b))
        return output

    biases: Mapping[Forward, Callable[..., Tensor | None]] = {
        torch.conv2d: of_convolution,
        F.linear: of_linear,
        F.batch_norm: of_batch_norm,
        F.layer_norm: of_layer_norm,
        **{func: partial(of_curved, func) for func in CURVED},
    }
    return {func: partial(record, func, bias) for func, bias in biases.items()}


def of_convolution(a: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor | None:
    """Return a convolution's bias."""
    return None if bias is None else bias.detach().view(-1, 1, 1)


def of_linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return a linear layer's bias.

    Raises:
        UnsuitedError: it works on more than one vector an image.
    """
    if a.ndim > 2:
        raise unsuited("a linear layer")
    return None if bias is None else bias.detach()


def of_layer_norm(*_: Any, **__: Any) -> Tensor | None:
    """Refuse: a layer norm's map is channels-last or tokens.

    Raises:
        UnsuitedError: always.
    """
    raise unsuited("a layer norm")


def of_batch_norm(
    a: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return a batch norm's bias beta - gamma mu / sqrt(var + eps).

    Raises:
        UnsuitedError: it takes its statistics from the batch.
    """
    if training or running_mean is None or running_var is None:
        raise unsuited("a batch norm without running statistics")
    b = -running_mean * (running_var + eps).rsqrt() * (1 if weight is None else weight.detach())
    b = b if bias is None else b + bias.detach()
    return b.view(-1, *[1] * (a.ndim - 2))


def of_curved(func: Forward, z: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the function's tangent at z leaves at zero: g(z) - g'(z) z."""
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}

    values: tuple[Tensor, ...] = torch.func.jvp(
        lambda t: func(t.clone(), *args, **kwargs), (z.detach(),), (z.detach(),)
    )
    return values[0] - values[1]


def unsuited(what: str) -> UnsuitedError:
    """Return the error for a network whose biases do not lie on the image."""
    return UnsuitedError(
        f"full_grad lays convolutional biases over the image, and here {what} has biases that it cannot place; use "
        "input_x_gradient, integrated_gradients or grad_cam"
    )


def over_layer(shares: Features) -> Features:
    """Scale all channels of each image together to [0, 1]."""
    return unit(shares.flatten(1, 2)[:, None]).view(shares.shape)


def as_is(shares: Features) -> Features:
    """Return the shares."""
    return shares


RESCALES: Mapping[str, Callable[[Features], Features]] = {"channel": unit, "layer": over_layer, "none": as_is}
