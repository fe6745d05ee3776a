"""Layers. Which layer of a network to explain, and how its output lies on the image: found by one probe, never guessed.

A convolution gives (b, c, i, j), some networks put the channels last, and a transformer gives tokens, of which the
first few are no patches. A grid function turns each into (b, c, i, j).
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sightline.hooks import differentiable, first, submodule
from sightline.types import Features, Images

ToGrid: TypeAlias = Callable[[Tensor, Images], Features]

PREFIX = 16
"""Most tokens before the patches (class, distillation, registers) that a network may have."""

PASSIVE = re.compile(r"dropout|softmax|flatten|pool(ing)?(\dd)?(same)?$")
"""What the type of a module that makes no features is called."""


def channels_first(output: Tensor, x: Images) -> Features:
    """Return (b, c, i, j) as it is."""
    return output


def channels_last(output: Tensor, x: Images) -> Features:
    """Turn (b, i, j, c) into (b, c, i, j)."""
    return output.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Tokens:
    """Turn (b, prefix + i j, c) into (b, c, i, j); i and j come from the image's size, never from the token count.

    `padded` counts a patch that the image fills in part.
    """

    prefix: int
    patch: tuple[int, int]
    padded: bool = False

    def __call__(self, output: Tensor, x: Images) -> Features:
        patches = output[:, self.prefix :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], *self.cells(x))

    def cells(self, x: Images) -> tuple[int, int]:
        """Return how many rows and columns of patches there are."""
        sides = zip(x.shape[2:], self.patch, strict=True)
        i, j = (-(-side // patch) if self.padded else side // patch for side, patch in sides)
        return i, j


@dataclass(frozen=True)
class Unpatched:
    """Turn (b, prefix + i j, c) into (b, c, i, j) where no convolution says how large a patch is.

    Of all i j that give the count, those in which i / j is nearest to the image's h / w.
    """

    prefix: int

    def __call__(self, output: Tensor, x: Images) -> Features:
        patches = output[:, self.prefix :].transpose(1, 2)
        n, (h, w) = patches.shape[2], x.shape[2:]
        i = min((i for i in range(1, n + 1) if n % i == 0), key=lambda i: abs(math.log(i * i * w / (n * h))))
        return patches.reshape(*patches.shape[:2], i, n // i)


@dataclass(frozen=True, eq=False)
class Seen:
    """One module's output during the probe."""

    name: str
    module: nn.Module
    output: Tensor
    bare: bool = True
    """The output is a tensor, not a tuple or mapping whose other tensors would go past a change of this one."""


@dataclass(frozen=True)
class Layer:
    """A layer and its grid."""

    name: str
    to_grid: ToGrid


@dataclass(frozen=True, eq=False)
class Probe:
    """One forward pass with everything that ran, in the order in which it finished."""

    x: Images
    logits: Tensor
    reads: Tensor
    """What the last linear layer reads (the logits where there is none): alive even below an all-zero head."""
    seen: tuple[Seen, ...]

    def gradient(self, output: Tensor) -> Tensor | None:
        """Return the gradient of a fixed mixture of what is read with respect to a layer's output."""
        if not (output.requires_grad and self.reads.requires_grad):
            return None
        weights = torch.linspace(1, 2, self.reads[0].numel()).to(self.reads).view(self.reads[0].shape)
        (found,) = torch.autograd.grad((self.reads * weights).sum(), output, retain_graph=True, allow_unused=True)
        return found


def probe(model: nn.Module, forward: Callable[[Images], Tensor], x: Images) -> Probe:
    """Run the network once on `x` and keep what every module gave."""
    seen: list[Seen] = []
    read: list[tuple[Tensor, Tensor]] = []

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = first(output)
        if tensor is not None:
            seen.append(Seen(name, module, tensor, isinstance(output, Tensor)))
        if isinstance(module, nn.Linear) and tensor is not None:
            read.append((inputs[0], tensor))

    with differentiable(), ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(partial(keep, name)).remove)
        logits = forward(x.clone().requires_grad_())
    heads = [inputs for inputs, output in read[-1:] if output.shape == logits.shape]
    return Probe(x, logits, (heads or [logits])[0], tuple(seen))


def infer(model: nn.Module, found: Probe) -> Layer:
    """Return the last layer whose output lies on the image and reaches the logits.

    The last one on the grid: a map of more than one cell that no pooling made, or the normalized tokens of a
    transformer. A layer whose cells get no gradient (the last block of a transformer that reads its class token alone)
    is passed over.

    Raises:
        ValueError: no layer of the network lies on the image.
    """
    candidates = list(usable(model, found))
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer whose output lies on the image (a map of more than one cell, or "
            "patch tokens); pass layer= and build a Classifier with its to_grid= by hand"
        )
    live = next((one for one in candidates if not dead(one, found)), candidates[0])
    return Layer(outermost(live[0], found), live[1])


def inspect(model: nn.Module, found: Probe, name: str) -> Layer:
    """Return the layer called `name` with its grid.

    Raises:
        LookupError: no such layer.
        ValueError: a layer that did not run, is pooled, has one cell or no spatial grid, or gets no gradient; the
            message names a better one.
    """
    submodule(model, name)
    ran = [one for one in found.seen if one.name == name]
    better = f"; use {infer(model, found).name!r}"
    if not ran:
        raise ValueError(f"layer {name!r} did not run in the forward pass{better}")
    seen = ran[-1]
    to_grid = grid_of(seen, found, strides(found))
    shape = tuple(seen.output.shape)
    if to_grid is None:
        raise ValueError(f"layer {name!r} gives shape {shape}, which is no map of more than one cell{better}")
    if to_grid(seen.output, found.x)[0, 0].numel() < 2:
        raise ValueError(f"layer {name!r} gives one cell, shape {shape}: it lies behind the pooling{better}")
    if dead((seen, to_grid), found):
        raise ValueError(f"layer {name!r} gets no gradient: its cells do not reach the logits{better}")
    return Layer(name, to_grid)


def usable(model: nn.Module, found: Probe) -> Iterator[tuple[Seen, ToGrid]]:
    """Yield the layers that may be explained, the last one first."""
    makers = {id(one.output): one for one in reversed(found.seen)}
    pooled = {key for key, one in makers.items() if passive(one.module)}
    normalizing = any(normalizes(one) for one in found.seen)
    steps = strides(found)
    for one in reversed(found.seen):
        unnormalized = normalizing and one.output.ndim == 3 and not normalizes(one)
        if id(one.output) in pooled or unnormalized:
            continue
        to_grid = grid_of(one, found, steps)
        if to_grid is not None and to_grid(one.output, found.x)[0, 0].numel() > 1:
            yield one, to_grid


def normalizes(seen: Seen) -> bool:
    """Tell whether this is a norm of tokens, and nothing more."""
    leaf = next(seen.module.children(), None) is None
    return seen.output.ndim == 3 and leaf and "norm" in type(seen.module).__name__.lower()


def passive(module: nn.Module) -> bool:
    """Tell whether a module only pools, drops or reshapes."""
    return bool(PASSIVE.search(type(module).__name__.lower()))


def grid_of(seen: Seen, found: Probe, steps: list[tuple[int, int]]) -> ToGrid | None:
    """Return how the output lies on the image; None when it does not."""
    shape = tuple(seen.output.shape)
    if shape[0] != len(found.x):
        return None
    if len(shape) == 3:
        return tokens(shape[1], found.x, steps) or unpatched(shape[1], found)
    if len(shape) != 4:
        return None
    front, back = alike(shape[2], shape[3], found.x), alike(shape[1], shape[2], found.x)
    if back and (not front or tuple(getattr(seen.module, "normalized_shape", ())) == shape[3:]):
        return channels_last
    return channels_first if front else None


def alike(i: int, j: int, x: Images) -> bool:
    """Tell whether i x j cells have the shape of the image, to within one cell, and are no more than its pixels."""
    h, w = x.shape[2:]
    return i <= h and j <= w and abs(i * w - j * h) < max(h, w)


def tokens(count: int, x: Images, steps: list[tuple[int, int]]) -> Tokens | None:
    """Find the patch with which `count` tokens cover the image, after at most `PREFIX` others: as few as possible."""
    sizes = [(down * times, across * times) for down, across in steps for times in (1, 2, 4, 8, 16)]
    grids = [Tokens(0, size, padded) for size in sizes for padded in (False, True)]
    found = [replace(grid, prefix=count - math.prod(grid.cells(x))) for grid in grids]
    fitting = [grid for grid in found if 0 <= grid.prefix <= PREFIX and grid.prefix < count]
    return min(fitting, key=lambda grid: grid.prefix, default=None)


def unpatched(count: int, found: Probe) -> Unpatched | None:
    """Find how `count` tokens cover the image by the maps of convolutions, and by those halved, rounded up."""
    convolutions = [one.output.shape for one in found.seen if isinstance(one.module, nn.Conv2d)]
    shapes = {(i, j) for b, _, i, j in convolutions if b == len(found.x) and alike(i, j, found.x)}
    cells = {-(-i // times) * -(-j // times) for i, j in shapes for times in (1, 2, 4, 8, 16)}
    prefixes = [count - n for n in cells if 0 <= count - n <= PREFIX and n > 1]
    return Unpatched(min(prefixes)) if prefixes else None


def strides(found: Probe) -> list[tuple[int, int]]:
    """Return the strides of the convolutions that cut the image into patches."""
    cutting = [one.module for one in found.seen if isinstance(one.module, nn.Conv2d | nn.Unfold)]
    cuts = [(pair(module.stride), pair(module.kernel_size)) for module in cutting]
    return list(dict.fromkeys(stride for stride, kernel in cuts if stride == kernel and stride[0] > 1))


def pair(sides: int | tuple[int, ...]) -> tuple[int, int]:
    """Return a height and a width."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def dead(candidate: tuple[Seen, ToGrid], found: Probe) -> bool:
    """Tell whether no cell of the grid reaches the logits."""
    seen, to_grid = candidate
    gradient = found.gradient(seen.output)
    return gradient is None or not bool(to_grid(gradient, found.x).any())


def outermost(seen: Seen, found: Probe) -> str:
    """Return the shortest name whose module gave this very output: `layer4` rather than `layer4.2.relu`.

    Not one that gives other tensors beside it, where another does not.
    """
    same = [one for one in reversed(found.seen) if one.output is seen.output]

    def order(one: Seen) -> tuple[bool, int, bool]:
        return not one.bare, one.name.count("."), isinstance(one.module, nn.Identity) or passive(one.module)

    return min(same, key=order).name
