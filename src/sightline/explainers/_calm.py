"""CALM, the network. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021.

Where the cue lies is a hidden variable z, one cell of the last map: p(y, z | x) = p(y | x, z) p(z | x) = g_yz h_z.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sightline.classifier import Classifier, UnsuitedError
from sightline.explainers._finer import blank
from sightline.explainers._finer import finer as with_finer_maps
from sightline.hooks import hooked, submodule
from sightline.layers import ToGrid, channels_first
from sightline.registry import chosen
from sightline.runs import Choice
from sightline.training import generator
from sightline.types import Features, Images, Logits

EPS = 1e-8
"""What `relu` adds to every activation of the attention (the published code's guard of its logarithm)."""


class Calm(nn.Module):
    """A trunk and two 1x1 convolutions on the output of one of its layers: `classes` (K maps), `attention` (one map).

    The new layers are Xavier uniform with zero bias, drawn from `seed`. The trunk runs whole, but what follows its
    layer sees zeros and passes no gradient. `detach` lets no gradient through the normalizer of h, as the published
    code does; then the attention is only ever pushed up.

    Args:
        trunk: any network, without its head.
        layer: the name of its layer that the two convolutions read.
        channels: the channels of that layer on its grid.
        classes: K.
        to_grid: from the layer's output to (b, c, i, j).
        activation: what makes h non-negative: `softplus` (the paper's text) or `relu`, ReLU + 1e-8 (its appendix).
        detach: whether the normalizer of h is a constant.
        seed: of the new weights.

    Raises:
        LookupError: no such layer or activation.
    """

    def __init__(
        self,
        trunk: nn.Module,
        layer: str,
        *,
        channels: int,
        classes: int,
        to_grid: ToGrid = channels_first,
        activation: str = "softplus",
        detach: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        submodule(trunk, layer)
        chosen(activation, ACTIVATIONS, "activation")
        self.layer, self.to_grid, self.activation, self.detach = layer, to_grid, activation, detach
        self.trunk = trunk
        randomness = generator("calm", seed)
        self.classes, self.attention = (branch(trunk, channels, width, randomness) for width in (classes, 1))

    def features(self, x: Images) -> Features:
        """Return the layer's output on its grid, with its gradient."""
        found: list[Tensor] = []

        def take(output: Tensor) -> Tensor:
            found.append(output)
            return torch.zeros_like(output)

        with hooked(self.trunk.get_submodule(self.layer), take):
            self.trunk(x)
        return self.to_grid(found[-1], x)

    def joint(self, x: Images) -> Float[Tensor, "b k i j"]:
        """Return log p(y, z | x) = log g_yz + log h_z of normalized images.

        g = softmax over the classes of `classes`; h = s / sum_z s, s the activation of `attention`. At least in 32
        bits.
        """
        A = self.features(x)
        f, a = (in_32_bits(convolve(A)) for convolve in (self.classes, self.attention))
        log_s = ACTIVATIONS[self.activation](a)
        log_sum = log_s.logsumexp((2, 3), keepdim=True)
        joint: Tensor = f.log_softmax(1) + log_s - (log_sum.detach() if self.detach else log_sum)
        return joint

    def forward(self, x: Images) -> Logits:
        """Return log p(y | x) = log sum_z p(y, z | x): logits whose softmax is p."""
        return self.joint(x).logsumexp((2, 3))


def in_32_bits(a: Tensor) -> Tensor:
    """Return a tensor in 32 bits, or in as many as it has where these are more."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


def log_softplus(a: Tensor) -> Tensor:
    """Return log log(1 + e^a), for every a: far below zero it is a - e^a / 2, and its gradient 1."""
    low, high = a.clamp(max=-16.0), a.clamp(min=-16.0)
    return torch.where(a < -16.0, low - low.exp() / 2, (-F.logsigmoid(-high)).log())


def log_relu(a: Tensor) -> Tensor:
    """Return log(max(a, 0) + eps): where everything is dead, h is uniform."""
    return (a.relu() + EPS).log()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"softplus": log_softplus, "relu": log_relu}
"""Name -> the logarithm of the activation."""


def branch(trunk: nn.Module, channels: int, width: int, randomness: torch.Generator) -> nn.Conv2d:
    """Return a 1x1 convolution, Xavier uniform with zero bias, where the trunk is and in its precision."""
    like = next((one for one in trunk.parameters() if one.is_floating_point()), torch.empty(0))
    made = nn.Conv2d(channels, width, 1, device="meta").to_empty(device="cpu")
    nn.init.xavier_uniform_(made.weight, generator=randomness)
    made.bias = nn.Parameter(torch.zeros(width))
    return made.to(like)


def calm(
    backbone: str | Mapping[str, Any] = "mini_resnet",
    *,
    finer: int = 0,
    activation: str = "softplus",
    detach: bool = False,
    size: int | None = None,
    seed: int = 0,
) -> Classifier:
    """Return a CALM network over a network of the catalogue: its weights, size, normalization and classes stay.

    Args:
        backbone: what `models.load` reads, or a table with a `name` and its settings.
        finer: how many halvings of the backbone are left out; two give the paper's 28x28 cells of ResNet-50.
        activation: see `Calm`.
        detach: see `Calm`.
        size: the side of the images; by default the backbone's.
        seed: of the new weights; the backbone has its own.

    Raises:
        LookupError, ValueError: as `models.load` and `surgery`.
    """
    from sightline.models import load

    choice = Choice.of(backbone)
    loaded = load(choice if size is None else Choice(choice.name, {**choice.settings, "size": size}))
    return surgery(loaded, finer=finer, activation=activation, detach=detach, seed=seed)


def surgery(
    classifier: Classifier, *, finer: int = 0, activation: str = "softplus", detach: bool = False, seed: int = 0
) -> Classifier:
    """Return a CALM network made of a copy of a classifier: what follows the layer goes, the two branches come.

    It is explained at the same layer, now `trunk.<layer>`; normalization, size and classes stay. See `calm`.

    Raises:
        LookupError: an unknown activation.
        ValueError: maps that cannot be made so much finer.
        UnsuitedError: it is a CALM network already, or cannot run without what follows the layer.
    """
    if isinstance(classifier.model, Calm):
        raise UnsuitedError("this is a CALM network already; give the classifier that it was made of")
    taken = with_finer_maps(classifier, finer)
    A, logits = taken.features_and_logits(blank(taken))
    skip_behind(taken)
    model = Calm(
        taken.model,
        taken.layer,
        channels=A.shape[1],
        classes=logits.shape[1],
        to_grid=taken.to_grid,
        activation=activation,
        detach=detach,
        seed=seed,
    )
    result = replace(taken, model=model.eval(), layer=f"trunk.{taken.layer}")
    try:
        result(blank(result))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnsuitedError(
            f"{type(classifier.model).__name__} cannot run without what follows {classifier.layer!r} ({error}); take "
            "its last map with .at(layer), or a network that ends in global average pooling"
        ) from error
    return result


def skip_behind(classifier: Classifier) -> None:
    """Replace by the identity, in place, all modules that begin to run only when the layer is done: head, pooling."""
    running: list[str] = []
    early: set[str] = set()

    def begin(name: str, *_: object) -> None:
        running.append(name)

    def done(*_: object) -> None:
        early.update(running)

    with ExitStack() as stack:
        for name, module in classifier.model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(partial(begin, name)).remove)
        stack.callback(submodule(classifier.model, classifier.layer).register_forward_hook(done).remove)
        classifier(blank(classifier))
    late = set(running) - early
    for name in late:
        parent, _, last = name.rpartition(".")
        if parent not in late:
            setattr(classifier.model.get_submodule(parent), last, nn.Identity())
