"""Transformer attribution (TIBAV). Chefer, Gur and Wolf, Transformer interpretability beyond attention, CVPR 2021."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional as F

from sightline.classifier import Classifier, UnsuitedError, check_images, check_labels, logit
from sightline.hooks import differentiable, frozen
from sightline.methods._attention import SOFTMAXES, read, rolled_out
from sightline.types import Images, Labels, Logits, Saliency, Score

Rule: TypeAlias = Callable[..., tuple[Tensor | None, ...]]
"""From the relevance of a function's output, and its inputs, to the relevance of each input."""


def transformer_attribution(
    classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit
) -> Saliency:
    """Return what the class token gets of each patch through attention that is relevant for the label.

    S = C_class, the patch part of the class token's row of C = A'^B ... A'^2 A'^1 (the last block on the left, as in
    rollout), A' = I + mean_h ReLU(G * R_A), G = dy_c/dA (section 3.3), and R_A the relevance of the attention A, which
    starts as the label's one-hot (whatever the `score` of G) and flows back function by function (3.1, 3.2). With R
    the relevance of a function's output f, the rules are:

    - linear layer, product with a constant matrix, mean, sum, average pooling: of the terms x_j w_ji that make f_i,
      those at or above zero share R_i in proportion; biases get nothing;
    - sum or product of two activations (shortcuts, gates, Q K^T, A V): u gets R_u = u * (df/du)^T (R / f), v likewise,
      both scaled by |sum R_u| / (|sum R_u| + |sum R_v|) * sum R / sum R_u, so that together they have R's sum;
    - softmax, layer norm, RMS norm, activation functions, sum with and multiple by a constant: the input gets R;
    - what only moves numbers (reshape, slice, join): the relevance moves along.

    Every rule keeps the sum of each image's relevance, but for what reaches an output whose terms are all below zero,
    or a sum or product that is zero all over: that is absorbed. *Differs:* sums are per image, so that a map does not
    depend on its batch; nothing is added to denominators. Where f is nearly zero R / f is large: maps in float32 agree
    with float64 to a percent or so. Networks that read several tokens (class and distillation, or the mean of the
    patches): the mean of their rows of C - I. (b, 1, i, j), non-negative, on the grid of the patches. One forward, two
    backwards; a network that does not keep its images along the first dimension runs again, image by image.

    Raises:
        UnsuitedError: a network without attention of all tokens to all tokens, one that passes no gradient on, one with
            a function between attention and logits that has no rule, or one in half precision.
    """
    check_images(x, classifier.channels)
    images = Relevances(len(x))
    with differentiable(), frozen(classifier.model):
        seen = read(classifier, x.detach().clone().requires_grad_(), rules_of(images))
        y = check_labels(seen.logits, y)
        check_precision(seen.logits, type(classifier.model).__name__)
        check_rules(seen.logits, seen.matrices, type(classifier.model).__name__)
        if len(x) > 1 and (images.mixed or seen.matrices[0].shape[-1] == len(x)):
            maps = [transformer_attribution(classifier, x[i : i + 1], y[i : i + 1], score=score) for i in range(len(x))]
            return torch.cat(maps)
        G = seen.gradients(score(seen.logits, y))
        with images.flowing():
            R = seen.gradients(logit(seen.logits, y))
        return seen.on_grid(rolled_out((g * r).relu().mean(1) for g, r in zip(G, R, strict=True)), x)


@dataclass
class Relevances:
    """One forward pass: of how many images, whether they mix in a first dimension, and what now flows backward."""

    count: int
    mixed: bool = False
    flow: bool = False

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Let the backward pass carry relevance instead of gradients."""
        self.flow = True
        try:
            yield
        finally:
            self.flow = False

    def total(self, R: Tensor) -> Tensor:
        """Return the sum of each image's relevance, to be multiplied with R."""
        return R.sum() if self.count == 1 else R.flatten(1).sum(1).view(-1, *[1] * (R.ndim - 1))


class Relevance(torch.autograd.Function):
    """Hands an output on; backward, gradients go to where it comes from, relevance to the inputs by the rule."""

    @staticmethod
    def forward(ctx: Any, images: Relevances, rule: Rule, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return the output."""
        ctx.set_materialize_grads(False)
        ctx.images, ctx.rule = images, rule
        ctx.save_for_backward(*inputs)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *flow: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of the output, or the relevance of the inputs."""
        (R,) = flow
        inputs = ctx.saved_tensors
        if R is None or not ctx.images.flow:
            return None, None, R, *[None] * len(inputs)
        return None, None, None, *ctx.rule(R, *inputs)


def contributions(f: Callable[..., Tensor], R: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Return x * (df/dx)^T (R / f) for each input x, 0 / 0 = 0: the share of each in what it adds to f."""
    with torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = f(*leaves)
        ratio = torch.where(output == 0, 0, R / output).detach()
        slopes = torch.autograd.grad(output, leaves, ratio)
    return [tensor.detach() * slope for tensor, slope in zip(leaves, slopes, strict=True)]


def positive(f: Callable[..., Tensor], R: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
    """Share R among the terms of f(x, w), linear in each, that are at or above zero; w gets nothing."""

    def terms(above: Tensor, below: Tensor) -> Tensor:
        return f(above, w.clamp(min=0)) + f(below, w.clamp(max=0))

    above, below = contributions(terms, R, x.clamp(min=0), x.clamp(max=0))
    return above + below, None


def pooled(f: Callable[..., Tensor], R: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    """Share R among the terms of a mean or sum f(x) that are at or above zero."""
    return tuple(contributions(f, R, x.clamp(min=0)))


def split(images: Relevances, f: Callable[..., Tensor], R: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Share R between both inputs of f(u, v) by contribution, scaled to the sum of R."""
    shares = contributions(f, R, u, v)
    sums = [images.total(share) for share in shares]
    whole = sums[0].abs() + sums[1].abs()
    scale = images.total(R) / torch.where(whole == 0, 1, whole)
    return tuple(share * total.sign() * scale for share, total in zip(shares, sums, strict=True))


def through(R: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    """Give the input all of R."""
    return (R.sum_to_size(x.shape).to(x.dtype),)


ACTIVATIONS: tuple[Callable[..., Any], ...] = (
    *(F.gelu, F.relu, torch.relu, Tensor.relu, F.silu, F.elu, F.leaky_relu, F.mish, F.hardswish, F.softplus),
    *(torch.tanh, Tensor.tanh, F.tanh, torch.sigmoid, Tensor.sigmoid, F.sigmoid),
)
NORMS: tuple[Callable[..., Any], ...] = (F.layer_norm, torch.layer_norm, F.rms_norm)
POOLS: tuple[Callable[..., Any], ...] = (
    *(torch.mean, Tensor.mean, torch.sum, Tensor.sum, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
)
ELEMENTWISE: tuple[Callable[..., Any], ...] = (torch.add, Tensor.add, torch.sub, Tensor.sub, torch.mul, Tensor.mul)
MULTIPLES: tuple[Callable[..., Any], ...] = (torch.div, Tensor.div, torch.neg, Tensor.neg)
PRODUCTS: tuple[Callable[..., Any], ...] = (torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm, torch.einsum)
IN_PLACE: Mapping[Callable[..., Any], Callable[..., Any]] = {Tensor.add_: torch.add, Tensor.mul_: torch.mul}

MOVES = frozenset(
    (
        *("Relevance", "Alias", "AsStrided", "Clone", "CopyBackwards", "CopySlices", "ToCopy"),
        *("Cat", "Stack", "Split", "SplitWithSizes", "Unbind", "Select", "Slice", "Index", "IndexSelect", "Gather"),
        *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Expand", "Repeat"),
        *("T", "Transpose", "Permute", "Flip", "Roll"),
    )
)
"""Backward functions of autograd that only move numbers, to where they come from."""


Choice: TypeAlias = tuple[Rule, tuple[Tensor, ...]] | None
"""A rule and the inputs that it wants; None where no rule fits the call."""

Chooser: TypeAlias = Callable[[Relevances, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Choice]


def alive(argument: Any) -> bool:
    """Tell whether an argument depends on the images."""
    return isinstance(argument, Tensor) and argument.requires_grad


def one_input(images: Relevances, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Choose for softmax, norms and activations, and for a quotient by a constant."""
    return (through, (args[0],)) if args and alive(args[0]) and not any(map(alive, args[1:])) else None


def pool(images: Relevances, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Choose for means and sums."""
    return (partial(pooled, lambda x: f(x, *args[1:], **kwargs)), (args[0],)) if args and alive(args[0]) else None


def elementwise(images: Relevances, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Choose for sums and products number by number."""
    inputs = tuple(filter(alive, args))
    return two_inputs(images, partial(f, **kwargs), inputs) if len(inputs) == 2 else one_of(inputs)


def one_of(inputs: tuple[Tensor, ...]) -> Choice:
    """Choose for a sum with, or a multiple by, a constant."""
    return (through, inputs) if inputs else None


def two_inputs(images: Relevances, f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Choice:
    """Choose for a function of two activations, and note whether their images lie along the first dimension."""
    u, v = inputs
    images.mixed |= u.ndim != v.ndim or any(tensor.shape[:1] != (images.count,) for tensor in inputs)
    return partial(split, images, f), inputs


def product(images: Relevances, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Choose for a matrix product; an equation (einsum) may stand in front."""
    tensors = tuple(argument for argument in args if isinstance(argument, Tensor))
    g = partial(f, *(argument for argument in args if not isinstance(argument, Tensor)))
    if len(tensors) != 2 or kwargs:
        return None
    if all(map(alive, tensors)):
        return two_inputs(images, g, tensors)
    u, v = tensors
    return (partial(positive, g), (u, v)) if alive(u) else (partial(positive, lambda x, w: g(w, x)), (v, u))


def linear(images: Relevances, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Choose for a linear layer."""
    x, w = (*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs))[:2]
    return (partial(positive, f), (x, w)) if alive(x) and not alive(w) else None


CHOOSERS: Mapping[Callable[..., Any], Chooser] = {
    **dict.fromkeys((*ACTIVATIONS, *NORMS, *SOFTMAXES, *MULTIPLES), one_input),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(PRODUCTS, product),
    F.linear: linear,
}
"""Function -> what chooses its rule. A function that is not here, nor in `MOVES`, has none."""


def rules_of(images: Relevances) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what is called in place of torch's functions, so that relevance flows by the rules."""
    ruled = {f: partial(call, images, f, choose) for f, choose in CHOOSERS.items()}
    return ruled | {f: partial(in_place, ruled[g]) for f, g in IN_PLACE.items()}


def call(images: Relevances, f: Callable[..., Any], choose: Chooser, *args: Any, **kwargs: Any) -> Any:
    """Call f, and give its output a rule, if it depends on the images."""
    output = f(*args, **kwargs)
    choice = choose(images, f, args, kwargs) if alive(output) else None
    return output if choice is None else Relevance.apply(images, choice[0], output, *choice[1])  # type: ignore[no-untyped-call]


def in_place(f: Callable[..., Any], u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call f and write what it gives into u."""
    return u.copy_(f(u.clone(), *args, **kwargs))


def check_precision(logits: Logits, model: str) -> None:
    """Check that R / f has enough digits.

    Raises:
        UnsuitedError: 16 bits.
    """
    if logits.dtype.itemsize < 4:
        raise UnsuitedError(
            f"{model} computes in {logits.dtype}, too coarse to divide relevance by activations; call model.float(), "
            "or use generic_attention"
        )


def check_rules(logits: Tensor, matrices: tuple[Tensor, ...], model: str) -> None:
    """Check that every function between the attention and the logits has a rule.

    Raises:
        UnsuitedError: one has none.
    """
    way = on_the_way(logits.grad_fn, {get_gradient_edge(A).node for A in matrices if A.requires_grad})
    names = {node.name().split("::")[-1].rstrip("0123456789").removesuffix("Backward") for node in way}
    if unruled := sorted(names - MOVES):
        raise UnsuitedError(
            f"{model} uses {', '.join(unruled)} between its attention and its logits, through which there is no rule "
            "for relevance; use generic_attention or rollout"
        )


def on_the_way(root: Node | None, leaves: set[Node]) -> set[Node]:
    """Return the nodes of the graph through which relevance flows from the root to the leaves."""
    parents: dict[Node, list[Node]] = {} if root is None else {root: []}
    way: set[Node] = set()
    found = list(parents)
    while found:
        node = found.pop()
        bypassed = 1 if node.name() == "RelevanceBackward" else 0
        for child, _ in node.next_functions[bypassed:]:
            if child is not None:
                found += [] if child in parents else [child]
                parents.setdefault(child, []).append(node)
    found = [leaf for leaf in leaves if leaf in parents]
    while found:
        new = {*parents[found.pop()]} - way
        way |= new
        found += new
    return way
