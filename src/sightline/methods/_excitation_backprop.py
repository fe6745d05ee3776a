"""Excitation backprop.

Zhang, Bargal, Lin, Brandt, Shen and Sclaroff, Top-down neural attention by excitation backprop, ECCV 2016.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from sightline.classifier import Classifier, UnsuitedError, check_labels, derivative, logit
from sightline.hooks import cut, differentiable, frozen, hooked, submodule
from sightline.methods._rectified import RELUS, Forward, rectifies, through_all
from sightline.types import Images, Labels, Saliency, Values


def excitation_backprop(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return the probability that a walk from the class down the network's excitatory connections passes each cell.

    P(a_j) = sum_i P(a_i) a_j w+_ij / sum_j' a_j' w+_ij', w+ = max(w, 0), from P = 1 at the class's logit; S = sum_k
    P(A^k), (b, 1, i, j), non-negative, at the layer's resolution. S sums to 1 unless a unit on the way is active by its
    bias alone. One forward; the backward pass ends at the layer.

    Convolutions and linear layers split so, and a batch norm or an average pooling directly behind one is part of it;
    other average pooling is a unit of equal weights; a sum splits by the positive parts of what is added; maximum
    pooling goes to its winners; ReLU, dropout and reshaping pass.

    Raises:
        UnsuitedError: behind the layer the network calls a function for which there is no rule, or one reads negative
            features.
    """
    with walk(classifier, x, y) as down:
        return down.show(derivative(down.values, down.leaf, f"layer {classifier.layer!r}"))


def contrastive_excitation_backprop(
    classifier: Classifier, x: Images, y: Labels | None = None, /, *, contrast: str | None = None
) -> Saliency:
    """Return excitation backprop for the class minus that against it, where the first is more.

    S = ReLU(sum_k (P - P')(A^k)), P' the walk from the dual unit whose weights are the class's negated (section 3.3).
    Both walks meet at the layer `contrast`, whose maps are subtracted and sent on to the classifier's layer; by default
    that is what the last linear layer (or convolution) reads, pool5 in the paper's GoogLeNet. (b, 1, i, j),
    non-negative, at the layer's resolution. Rules as `excitation_backprop`. One forward, three backwards.

    Raises:
        LookupError: no layer called `contrast`.
        ValueError: `contrast` does not lie between the explained layer and the last linear layer.
        UnsuitedError: as `excitation_backprop`, or there is no linear layer behind the layer.
    """
    with walk(classifier, x, y, contrast) as down:
        point, dual = down.meeting()
        toward = arriving(down.values, point)
        dual.sign = -1
        against = arriving(down.values, point)
        if toward is None or against is None or (bool(toward.any()) and torch.equal(toward, against)):
            raise ValueError(
                f"the contrast layer {contrast!r} does not lie between layer {classifier.layer!r} and the last linear "
                "layer; name one that does, or None for what that linear layer reads"
            )
        (P,) = torch.autograd.grad(point, down.leaf, toward - against)
        return down.show(P).relu()


@dataclass
class Side:
    """Which of the two units of a class a walk starts from: +1 its own, -1 the dual one with negated weights."""

    sign: int = 1


@dataclass(frozen=True, eq=False)
class Unit:
    """Units that read `input` through weights; `spread(a, w)` is what they would give for inputs a and weights w."""

    input: Tensor
    weight: Tensor
    spread: Callable[[Tensor, Tensor], Tensor]
    side: Side

    def excitation(self, a: Tensor) -> Tensor:
        """Return sum_j a_j w+_ij."""
        return self.spread(a, (self.side.sign * self.weight).clamp(min=0))


@dataclass(frozen=True, eq=False)
class Descent:
    """A forward pass whose backward pass is the walk."""

    classifier: Classifier
    x: Images
    values: Values
    leaf: Tensor
    seen: "Walk"
    points: list[Tensor]

    def show(self, P: Tensor) -> Saliency:
        """Return the probabilities at the layer, summed over its channels."""
        return self.classifier.to_grid(P, self.x).sum(1, keepdim=True)

    def meeting(self) -> tuple[Tensor, Side]:
        """Return the tensor at which the two walks are compared, and the side of the last linear layer.

        Raises:
            UnsuitedError: there is no linear layer behind the layer.
        """
        if self.seen.last is None:
            derivative(self.values, self.leaf, f"layer {self.classifier.layer!r}")
            raise UnsuitedError(
                f"no linear layer or convolution lies behind layer {self.classifier.layer!r}, so there are no weights "
                "to negate; use an earlier layer, excitation_backprop or grad_cam"
            )
        return (self.points or [self.seen.last.input])[-1], self.seen.last.side


@contextmanager
def walk(classifier: Classifier, x: Images, y: Labels | None, contrast: str | None = None) -> Iterator[Descent]:
    """Run the network so that the gradient is the probability of the walk; the backward pass belongs inside."""
    points: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        points.append(output)
        return output.clone()

    with ExitStack() as stack:
        stack.enter_context(differentiable())
        stack.enter_context(frozen(classifier.model))
        leaves = stack.enter_context(cut(classifier.model, classifier.layer))
        if contrast is not None:
            stack.enter_context(hooked(submodule(classifier.model, contrast), keep))
        with Walk(type(classifier.model).__name__, classifier.layer) as seen:
            logits = classifier(x.detach().clone())
        values = logit(logits, check_labels(logits, y))
        leaf = classifier.reached(leaves[-1] if leaves else None)
        yield Descent(classifier, x, values, leaf, seen, points)


def arriving(values: Values, point: Tensor) -> Tensor | None:
    """Return the probabilities with which the walk from the values comes to a point; None if it does not."""
    if not point.requires_grad:
        return None
    return torch.autograd.grad(values.sum(), point, retain_graph=True, allow_unused=True)[0]


class Walk(TorchFunctionMode):
    """Replace the derivative of every function that a network calls by the rule of the walk; values stay."""

    def __init__(self, model: str, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.last: Unit | None = None
        self.units: dict[int, tuple[Tensor, int, Unit]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args = (kwargs.pop("input"), *args) if "input" in kwargs else args
        if func in RULES and torch.is_grad_enabled() and asks(args):
            rule = RULES[func]
            folds = rule in (batch_norm, average) and self.of(args[0]) is not None
            if rule in (affine, batch_norm, average) and not folds and bool((args[0] < 0).any()):
                raise self.unsuited(f"{name_of(func)} on negative features")
            return rule(self, func, *args, **kwargs)
        result = func(*args, **kwargs)
        if func not in PASSING and asks(result):
            raise self.unsuited(name_of(func))
        return result

    def unsuited(self, call: str) -> UnsuitedError:
        """Return the error for a network that calls what has no rule."""
        return UnsuitedError(
            "excitation backprop has rules for convolutions, linear layers, batch norm, ReLU, pooling, addition and "
            f"concatenation of features that are never negative, and behind layer {self.layer!r} {self.model} calls "
            f"{call}; explain a later layer, or use grad_cam, opti_cam or score_cam"
        )

    def put(self, unit: Unit, value: Tensor) -> Tensor:
        """Return the value of units, with the walk behind it, and remember where it came from."""
        output = excite(lambda _: value, unit.excitation, unit.input)
        self.units[id(output)] = output, output._version, unit
        return output

    def of(self, tensor: Tensor) -> Unit | None:
        """Return the units that gave this tensor, if nothing has changed it since."""
        found, version, unit = self.units.get(id(tensor), (None, 0, None))
        return unit if found is tensor and version == tensor._version else None


def name_of(func: Any) -> str:
    """Return how a torch function is called in Python."""
    return resolve_name(func) or str(getattr(func, "__name__", func))


def asks(items: Any) -> bool:
    """Tell whether a tensor among the items, lists included, requires a gradient."""
    if isinstance(items, Tensor):
        return items.requires_grad
    return isinstance(items, list | tuple) and any(map(asks, items))


class Excitation(torch.autograd.Function):
    """A function whose gradient is the walk: P(a_j) = a_j sum_i w+_ij P(a_i) / sum_j' a_j' w+_ij'."""

    @staticmethod
    def forward(ctx: Any, value: Forward, spread: Forward, *inputs: Tensor) -> Tensor:
        """Return `value(*inputs)`; the positive parts of the inputs are kept as they were before."""
        ctx.spread, ctx.a = spread, [one.relu() for one in inputs]
        result = value(*inputs)
        if any(result is one for one in inputs):
            ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, *P: Tensor) -> Any:
        """Return the probabilities of the inputs."""
        with torch.enable_grad():
            a = [one.detach().requires_grad_() for one in ctx.a]
            excitation = ctx.spread(*a)
            share = torch.where(excitation > 0, P[0] / excitation, 0).detach()
            w = torch.autograd.grad(excitation, a, share)
        return None, None, *(one.detach() * through for one, through in zip(a, w, strict=True))


def excite(value: Forward, spread: Forward, *inputs: Tensor) -> Tensor:
    """Return `value(*inputs)`, from which the walk goes down in the shares that the positive linear `spread` says."""
    apply: Forward = Excitation.apply
    output: Tensor = apply(value, spread, *inputs)
    return output


def affine(
    seen: Walk, func: Forward, a: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **settings: Any
) -> Tensor:
    """Run a convolution or a linear layer."""
    side = Side()
    seen.last = Unit(a, weight.detach(), lambda a, w: func(a, w, None, *rest, **settings), side)
    return seen.put(seen.last, func(a.detach(), weight, bias, *rest, **settings))


def batch_norm(
    seen: Walk,
    func: Forward,
    a: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Run a batch norm: part of the convolution before it, else a unit of one input each."""
    if training or running_mean is None or running_var is None:
        raise seen.unsuited("a batch norm without running statistics")
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight.detach())
    value = func(a.detach(), running_mean, running_var, weight, bias, training, momentum, eps)
    unit = seen.of(a)
    if unit is None:
        return seen.put(Unit(a, scale.view(-1, *[1] * (a.ndim - 2)), torch.mul, Side()), value)
    return seen.put(replace(unit, weight=unit.weight * scale.view(-1, *[1] * (unit.weight.ndim - 1))), value)


def average(seen: Walk, func: Forward, a: Tensor, *rest: Any, **settings: Any) -> Tensor:
    """Run an average pooling or a sum over places: part of the convolution right before it, else a unit of its own."""

    def pool(a: Tensor) -> Tensor:
        return func(a, *rest, **settings)

    unit = seen.of(a)
    if unit is None:
        return excite(pool, pool, a)
    inner = unit.spread
    return seen.put(replace(unit, spread=lambda a, w: pool(inner(a, w))), pool(a.detach()))


def add(seen: Walk, func: Forward, a: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """Run an addition: it splits in proportion to the positive parts; a constant summand takes no share."""
    if not (asks(a) and asks(other)):
        return func(a, other, alpha=alpha) if alpha != 1 else func(a, other)
    return excite(
        lambda a, b: func(a, b, alpha=alpha) if alpha != 1 else func(a, b),
        lambda a, b: a + max(alpha, 0) * b,
        *(a, other),
    )


def relu(seen: Walk, func: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Run a ReLU: the walk passes."""
    if not rectifies(func, *args, **kwargs):
        raise seen.unsuited("hardtanh with a negative floor")
    return through_all(func, *args, **kwargs)


RULES: Mapping[Any, Callable[..., Tensor]] = {
    torch.conv2d: affine,
    F.linear: affine,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, Tensor.mean, torch.sum, Tensor.sum), average),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__), add),
    **dict.fromkeys(RELUS, relu),
}
"""Torch function -> what runs in its place."""

PASSING: frozenset[Any] = frozenset(
    (
        *(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d, torch.dropout, F.pad),
        *(torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.flatten, torch.reshape),
        *(torch.permute, torch.transpose, torch.movedim, torch.squeeze, torch.unsqueeze, torch.clone),
        *(Tensor.chunk, Tensor.split, Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.permute, Tensor.transpose),
        *(Tensor.movedim, Tensor.squeeze, Tensor.unsqueeze, Tensor.clone, Tensor.contiguous, Tensor.__getitem__),
        *(Tensor.unbind, Tensor.to, Tensor.float, Tensor.double, Tensor.requires_grad_, F.channel_shuffle),
    )
)
"""Torch functions whose own derivative is the walk: they choose, copy or move, and weigh nothing."""
