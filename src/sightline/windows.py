"""Windows. Which cells of a layer a pixel reaches, and which pixels a cell sees.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, section 3.3: the contribution window of a pixel is the activations of a layer
that influence it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.classifier import Classifier, UnsuitedError, look
from sightline.hooks import capture, differentiable, frozen
from sightline.layers import Layer, outermost, usable
from sightline.types import Features, Images

Pair: TypeAlias = tuple[int, int]
"""Height and width."""

Steps: TypeAlias = tuple[int, int, int, int]
"""Kernel, stride, dilation and padding along one axis."""

CONVOLUTION, POOLINGS = "ConvolutionBackward0", ("MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0")
"""What autograd calls the operations that have a window."""

POINTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        *("Add", "Sub", "Mul", "Div", "NativeBatchNorm", "Clone", "ToCopy"),
        *("Relu", "LeakyRelu", "PreluKernel", "Hardtanh", "Elu", "Gelu", "Silu", "Mish", "Softplus"),
        *("Hardswish", "Hardsigmoid", "Sigmoid", "Tanh"),
    )
)
"""Those that give every cell of the maps they read by itself."""

CHANNELS, PADDING = ("CatBackward0", "SliceBackward0", "SplitBackward0"), "ConstantPadNdBackward0"
"""Those that do so along the channels, and the one that moves cells."""


@dataclass(frozen=True)
class Window:
    """One layer's windows, as height and width.

    `cells` is how far the cells reach that depend on the pixel in the middle of the image, `pixels` how far the pixels
    reach on which the cell in the middle of the layer depends; what lies outside the image counts in neither. `share`
    is how many of the image's pixels these are, in percent: with holes (dilation) fewer than in the box. `formula` is
    the most that `pixels` can be, not cut off at the border, where the layer stands behind convolutions and poolings:
    `window`, over all paths where branches meet (residuals). It is None behind what sees all (attention, gates that
    know the whole image) and what moves cells (resizing, transposed convolutions, mirroring).
    """

    layer: str
    size: tuple[int, int]
    grid: tuple[int, int]
    cells: tuple[int, int]
    pixels: tuple[int, int]
    share: float
    formula: Pair | None = None

    @property
    def whole(self) -> bool:
        """Tell whether the cell sees every pixel of the image."""
        return self.share == 100


def window(layers: Sequence[tuple[int, ...]]) -> int:
    """Return the side, in pixels, of what a cell sees behind stacked convolutions or poolings.

    r = 1 + sum_l d_l (F_l - 1) prod_{m < l} s_m for (kernel F, stride s) or (kernel F, stride s, dilation d) from the
    image on. With stride 1 a pixel reaches a window of as many cells: 1 + l (F - 1) for l layers of F x F.

    Raises:
        ValueError: a layer of another form, or a number below one.
    """
    check(layers)
    return 1 + sum(
        dilation * (kernel - 1) * jump
        for (kernel, _, dilation), jump in zip(dilated(layers), jumps(layers), strict=False)
    )


def window_in_cells(layers: Sequence[tuple[int, ...]]) -> int:
    """Return the side, in cells, of what a pixel reaches behind stacked convolutions or poolings, at most.

    ceil(r / prod_l s_l), r as in `window`: cells lie prod_l s_l pixels apart, and a pixel reaches those in whose window
    it lies. Where the strides do not divide r, one fewer for some pixels.

    Raises:
        ValueError: as `window`.
    """
    return -(-window(layers) // jumps(layers)[-1])


def measured_windows(
    classifier: Classifier, *, layers: Sequence[str] | None = None, seed: int = 0, tries: int = 8
) -> tuple[Window, ...]:
    """Measure the windows of layers as the supports of exact gradients, for any network.

    `layers` are names; by default the layers that lie on the image and are not inside one another, and the explained
    one, from the image on. A copy of the network is asked, in float64 on the CPU, about `tries` images of noise: the
    cells for which dA / dx_p of the middle pixel p is not zero (one forward pass with its tangent), and the pixels for
    which the gradient of the middle cell, its channels mixed at random, is not zero (one backward pass). What is found
    in any of them counts, for a ReLU or a max pooling lets only some through: a lower bound, which more tries make
    tight. Its `formula` is read off one run of the network: that is an upper bound.

    Raises:
        ValueError: no try, or a layer that cannot be explained.
        LookupError: no such layer.
        UnsuitedError: a layer that no gradient reaches, or a network that torch cannot differentiate forwards.
    """
    if tries < 1:
        raise ValueError(f"expected at least one try, got {tries}")
    if layers is not None:
        chosen = [Layer(name, classifier.at(name).to_grid) for name in layers]
    else:
        chosen = candidates(classifier)
    exact = replace(classifier, model=copy.deepcopy(classifier.model).cpu().double())
    generator = torch.Generator().manual_seed(seed)
    shape = 1, classifier.channels, *classifier.size
    found: list[Supports] = []
    with differentiable(), frozen(exact.model), sdpa_kernel(SDPBackend.MATH):
        formulas = counted(exact, chosen, torch.full(shape, 0.5, dtype=torch.float64))
        for _ in range(tries):
            x, direction = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
            found.append(Supports(reached(exact, chosen, x, direction), seen(exact, chosen, x, generator)))
    return tuple(united(one, found, classifier.size, formulas[one.name]) for one in chosen)


@dataclass(frozen=True, eq=False)
class Supports:
    """By layer, the cells that the middle pixel of one image reaches, and the pixels that the middle cell sees."""

    cells: dict[str, Bool[Tensor, "_i _j"]]
    pixels: dict[str, Bool[Tensor, "_h _w"]]


def candidates(classifier: Classifier) -> list[Layer]:
    """Return the layers that lie on the image and are inside no other such layer, and the explained one."""
    with differentiable(), frozen(classifier.model):
        found = look(classifier)
        grids = {outermost(one, found): to_grid for one, to_grid in usable(classifier.model, found)}
    names = [one for one in reversed(grids) if not any(one.startswith(f"{other}.") for other in grids)]
    if classifier.layer not in names:
        names.append(classifier.layer)
        grids[classifier.layer] = classifier.to_grid
    return [Layer(name, grids[name]) for name in names]


def reached(
    classifier: Classifier, layers: Sequence[Layer], x: Images, direction: Images
) -> dict[str, Bool[Tensor, "_i _j"]]:
    """Return the cells whose derivative with respect to the middle pixel, in a direction of its color, is not zero.

    Raises:
        UnsuitedError: a layer without a tangent, or an operation without a forward derivative.
    """
    h, w = x.shape[2:]
    tangent = torch.zeros_like(x)
    tangent[..., h // 2, w // 2] = direction[..., h // 2, w // 2]
    with forward_ad.dual_level(), capture(classifier.model, [one.name for one in layers]) as found:
        try:
            classifier(forward_ad.make_dual(x, tangent))  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError) as error:
            raise UnsuitedError(
                f"{type(classifier.model).__name__} has an operation that torch cannot differentiate forwards: {error}"
            ) from error
        return {one.name: active(one, tangent_of(found[one.name]), x) for one in layers}


def tangent_of(output: Tensor) -> Tensor | None:
    """Return the tangent that an output carries."""
    found: Tensor | None = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
    return found


def active(layer: Layer, tangent: Tensor | None, x: Images) -> Bool[Tensor, "_i _j"]:
    """Return the cells at which a layer's tangent is not zero.

    Raises:
        UnsuitedError: there is none.
    """
    if tangent is None:
        raise UnsuitedError(f"layer {layer.name!r} does not depend on the image differentiably; choose another one")
    return (layer.to_grid(tangent, x)[0] != 0).any(0)


def seen(
    classifier: Classifier, layers: Sequence[Layer], x: Images, generator: torch.Generator
) -> dict[str, Bool[Tensor, "_h _w"]]:
    """Return the pixels on which the middle cell of each layer depends."""
    leaf = x.clone().requires_grad_()
    with capture(classifier.model, [one.name for one in layers]) as found:
        classifier(leaf)
    return {one.name: support(mixed(one.to_grid(found[one.name], x), generator), leaf) for one in layers}


def mixed(A: Features, generator: torch.Generator) -> Tensor:
    """Return the channels of the middle cell, mixed at random."""
    cell = A[0, :, A.shape[2] // 2, A.shape[3] // 2]
    return (cell * torch.rand(len(cell), generator=generator, dtype=cell.dtype)).sum()


def support(value: Tensor, x: Images) -> Bool[Tensor, "h w"]:
    """Return the pixels at which the gradient of a value is not zero."""
    (found,) = torch.autograd.grad(value, x, retain_graph=True)
    return (found[0] != 0).any(0)


def counted(classifier: Classifier, layers: Sequence[Layer], x: Images) -> dict[str, Pair | None]:
    """Return the sides of what a cell of each layer sees by the formula; None where there is none."""
    with capture(classifier.model, [one.name for one in layers]) as found:
        classifier(x.requires_grad_())
    return {one.name: sides(reaches(found[one.name])) for one in layers}


@dataclass(frozen=True)
class Reach:
    """What cells see along one axis: cell i the pixels from stride i + low to stride i + high, at most."""

    stride: int = 1
    low: int = 0
    high: int = 0

    def behind(self, kernel: int, stride: int, dilation: int, padding: int) -> "Reach":
        """Return what cells of a convolution or pooling of these see; its cell i begins at stride i - padding."""
        low, high = -padding, dilation * (kernel - 1) - padding
        return Reach(self.stride * stride, self.low + self.stride * low, self.high + self.stride * high)


Reaches: TypeAlias = tuple[Reach, Reach]
"""Down and across."""


def sides(reach: Reaches | None) -> Pair | None:
    """Return how many pixels a cell sees at most, height and width."""
    return None if reach is None else (reach[0].high - reach[0].low + 1, reach[1].high - reach[1].low + 1)


def reaches(output: Tensor) -> Reaches | None:
    """Return what the cells of an output see: `window`, over all paths from the image.

    Autograd's graph of a run, of which the image is the only leaf, tells what reads what. None unless all operations
    are convolutions, poolings, pointwise or among channels, of maps on one grid where several meet.
    """
    known: dict[Any, Reaches | None] = {}
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        read = [one for one, _ in waiting[-1].next_functions if one is not None]
        if left := [one for one in read if one not in known]:
            waiting += left
        else:
            node = waiting.pop()
            known[node] = passed(node, [known[one] for one in read]) if read else (Reach(), Reach())
    return known[output.grad_fn]


def passed(node: Any, read: Sequence[Reaches | None]) -> Reaches | None:
    """Return what the cells of an operation see, of what those see that it reads; None where that is not known."""
    met = joined(node, read)
    steps = None if met is None else form(node)
    return None if met is None or steps is None else (met[0].behind(*steps[0]), met[1].behind(*steps[1]))


def joined(node: Any, read: Sequence[Reaches | None]) -> Reaches | None:
    """Return what cells at one place of several maps see together; None of maps on different grids."""
    known = [one for one in read if one is not None]
    grids = {tuple(one._input_metadata[i].shape[2:]) for one, i in node.next_functions if one is not None}
    strides = {(down.stride, across.stride) for down, across in known}
    if len(known) < len(read) or len(grids) > 1 or len(strides) > 1:
        return None
    down, across = (
        Reach(axis[0].stride, min(one.low for one in axis), max(one.high for one in axis))
        for axis in zip(*known, strict=True)
    )
    return down, across


def form(node: Any) -> tuple[Steps, Steps] | None:
    """Return kernel, stride, dilation and padding of an operation, down and across; None where it is none of them."""
    kind: str = node.name()
    if kind in POINTWISE or (kind in CHANNELS and node._saved_dim == 1):
        return None if getattr(node, "_saved_training", False) else ((1, 1, 1, 0), (1, 1, 1, 0))
    if kind == PADDING:
        left, _, above, _ = (*node._saved_pad, 0, 0, 0, 0)[:4]
        return (1, 1, 1, above), (1, 1, 1, left)
    if kind == CONVOLUTION and not node._saved_transposed:
        kernel: Pair = tuple(node._saved_weight.shape[2:])
    elif kind in POOLINGS:
        kernel = tuple(node._saved_kernel_size)
    else:
        return None
    stride: Pair = tuple(node._saved_stride) or kernel
    dilation: Pair = (1, 1) if kind == "AvgPool2DBackward0" else tuple(node._saved_dilation)
    down, across = zip(kernel, stride, dilation, tuple(node._saved_padding), strict=True)
    return down, across


def united(layer: Layer, found: Sequence[Supports], size: Pair, formula: Pair | None) -> Window:
    """Return what any of the tries found of a layer."""
    cells = torch.stack([one.cells[layer.name] for one in found]).any(0)
    pixels = torch.stack([one.pixels[layer.name] for one in found]).any(0)
    grid = cells.shape[0], cells.shape[1]
    share = 100 * float(pixels.double().mean())
    return Window(layer.name, size, grid, extent(cells), extent(pixels), share, formula)


def extent(region: Bool[Tensor, "i j"]) -> tuple[int, int]:
    """Return height and width of the box around the true cells; zero where there are none."""
    lines = [region.any(axis).nonzero().flatten().tolist() for axis in (1, 0)]
    down, across = (line[-1] - line[0] + 1 if line else 0 for line in lines)
    return down, across


def jumps(layers: Sequence[tuple[int, ...]]) -> list[int]:
    """Return how many pixels lie between the cells before the first layer, behind it, behind the second one ..."""
    return list(accumulate((stride for _, stride, _ in dilated(layers)), lambda a, b: a * b, initial=1))


def dilated(layers: Sequence[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Return kernel, stride and dilation of each layer."""
    return [(one[0], one[1], one[2] if len(one) == 3 else 1) for one in layers]


def check(layers: Sequence[tuple[int, ...]]) -> None:
    """Check the numbers of stacked layers.

    Raises:
        ValueError: a layer of another form, or a number below one.
    """
    if wrong := [one for one in layers if len(one) not in (2, 3) or min(one) < 1]:
        raise ValueError(f"expected layers as (kernel, stride) or (kernel, stride, dilation) from 1 on, got {wrong[0]}")
