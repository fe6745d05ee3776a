"""Speed. The same classifier behind the same call, with cheaper operations underneath.

What makes a network slower than it must be: batch norms that a convolution could have done itself, weights that every
call puts into the order that the matrix routines like, and 32 bits where 16 would do.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sightline.attention import Attending
from sightline.classifier import Classifier, read_logits
from sightline.hooks import first, frozen

Precision: TypeAlias = Literal["exact", "bf16"]
Weights: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight and bias."""


def fast(classifier: Classifier, *, precision: Precision = "exact") -> Classifier:
    """Return a classifier that gives the same answers in less time; the network itself is copied, and not touched.

    - Batch norms are folded into the convolution before them: W' = W gamma / sigma, b' = beta + (b - mu) gamma / sigma,
      where one run shows that the norm reads the convolution's output and nothing else does.
    - On the CPU, weights are put into the order that oneDNN likes once instead of at every call, for the way forward
      and for the way back.
    - The copy is in evaluation mode, its weights are frozen and channels-last.
    - With precision="bf16" it runs under autocast to bfloat16, but for the last linear layer; logits and explained
      layers come out in float32. On the CPU, attention keeps its weights for the way back where tokens are few. Below
      that, weights are as they were.

    Whatever does not give the same numbers in that run stays as it is: to 100 eps of the largest, float32 or float64.
    In float64, whatever the precision asked for, and on other devices than the CPU, only the norms are folded.

    Names of layers stay, and so does what they mean. Who looks at a folded convolution (by a hook: `capture`, `cut`,
    `Classifier.at`), or calls other functions inside (`hooks.substituted`: guided backprop, FullGrad, excitation
    backprop, attention), gets the network as it was, in full precision. Weights may change: what was made of them is
    made again, but for a change through `.data`, which torch does not count. The classifier can be copied, pickled and
    moved.

    *Differs* from the plain classifier by the order of sums: logits and features by 1e-6 of the largest or so. Where a
    rounding error switches a ReLU or the winner of a maximum pooling, gradients of single pixels differ by more, as
    they do between two batch sizes. There is no second derivative. A network that takes other ways
    for other images than noise is folded for those that noise takes.

    Attention inside `nn.MultiheadAttention` stays torch's. Costs two copies of the weights, three with gradients, and
    a few forward passes of one image.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ("exact", "bf16"):
        raise ValueError(f"expected precision='exact' or precision='bf16', got {precision!r}")
    network: nn.Module = copy.deepcopy(classifier.model).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    copied = replace(classifier, model=network)
    new, attends = forwards(copied)
    for module, forward in new:
        vars(module)["forward"] = forward
    if precision == "bf16":
        vars(network)["forward"] = Lowered(network.forward, attends)
    return copied


def watched() -> bool:
    """Tell whether somebody else calls other functions in torch's place, or writes down what is called."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return True
    if not torch._C._is_torch_function_mode_enabled():
        return False
    modes: list[object] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(not isinstance(mode, Attending) for mode in modes)


def original(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module's class makes of x."""
    forward: Callable[..., Tensor] = type(module).forward
    return forward(module, x)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A network's forward under autocast to bfloat16; as it was while functions inside are replaced."""

    inner: Callable[..., Any]
    attends: bool

    def __call__(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        if watched():
            return self.inner(x, *args, **kwargs)
        attending = Attending() if self.attends else nullcontext()
        with torch.autocast(x.device.type, torch.bfloat16), attending:
            output = self.inner(x, *args, **kwargs)
        return output.to(x.dtype) if isinstance(output, Tensor) else output


@dataclass(eq=False)
class Prepared:
    """The forward of a convolution or linear layer, with the batch norm behind it, whose weights wait ready.

    In the precision of autocast where that is on, but for the layer that gives the logits (`last`).
    """

    module: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | None = None
    last: bool = False
    packs: bool = True
    ready: dict[Hashable, "Ready"] = field(default_factory=dict[Hashable, "Ready"])

    def __call__(self, x: Tensor) -> Tensor:
        if self.last:
            with torch.autocast(x.device.type, enabled=False):
                return self.run(x.to(self.module.weight.dtype))
        return self.run(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "ready": {}}

    def run(self, x: Tensor) -> Tensor:
        """Return the layer's output, or that of the norm behind it."""
        if self.seen():
            return original(self.module, x)
        device = x.device.type
        low = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        a = x.to(torch.get_autocast_dtype(device) if low else self.module.weight.dtype)
        if not self.packs or not packable(a):
            w, b = self.made("plain", a, lambda w: w)
            return self.kernel.plain(self.module, a, w, b)
        if torch.is_grad_enabled() and a.requires_grad:
            apply: Callable[..., Tensor] = Through.apply
            return apply(a, self)
        return self.forth(a)

    def seen(self) -> bool:
        """Tell whether somebody looks where a norm is folded, or calls other functions inside."""
        if self.norm is None:
            return watched()
        conv, norm = self.module, self.norm
        hooks = (
            *(conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks),
            *(norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks),
        )
        return norm.training or any(hooks) or watched()

    def forth(self, x: Tensor) -> Tensor:
        """Return the output, from packed weights."""
        w, b = self.made("forth", x, lambda w: self.kernel.pack(self.module, w, x))
        return self.kernel.packed(self.module, x, w, b)

    def back(self, g: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient of the input from that of the output, from packed weights.

        oneDNN is fifty times slower at strided grouped convolutions in bfloat16 than in float32.
        """
        m = self.module
        if isinstance(m, nn.Conv2d) and m.groups > 1 and max(m.stride) > 1 and g.dtype == torch.bfloat16:
            return self.back(g.float(), shape).to(g.dtype)
        w, _ = self.made("back", g, lambda w: self.kernel.pack_back(self.module, w, g, shape))
        return self.kernel.packed_back(self.module, g, w, shape)

    @property
    def kernel(self) -> "Kernel":
        """The routines for this kind of layer."""
        if isinstance(self.module, nn.Linear):
            return LINEAR
        return PATCHES if apart(self.module) else CONVOLUTION

    def made(self, what: str, x: Tensor, make: Callable[[Tensor], Tensor]) -> Weights:
        """Return what `make` gives of the weights in x's precision, and the bias; again only after they changed."""
        key, now = (what, x.dtype), stamp(self.module, self.norm)
        found = self.ready.get(key)
        if found is None or found.stamp != now:
            with torch.inference_mode(False), torch.no_grad():
                w, b = folded(self.module, self.norm, x.dtype)
                kept = tuple(one.detach() for one in tensors_of(self.module, self.norm))
                found = self.ready[key] = Ready(now, (make(w), b), kept)
        return found.weights


@dataclass(frozen=True, eq=False)
class Ready:
    """What was made of weights, and of which; these stay alive, so that no others come to lie where they lay."""

    stamp: Hashable
    weights: Weights
    of: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Passing:
    """The forward of a batch norm that its convolution has done: what it does behind the norm (timm) is left."""

    norm: nn.BatchNorm2d
    conv: Prepared

    def __call__(self, x: Tensor) -> Tensor:
        if self.conv.seen():
            return original(self.norm, x)
        return behind(self.norm, x)


class Through(torch.autograd.Function):
    """A prepared layer on the way to a gradient with respect to its input; its weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Prepared) -> Tensor:
        """Return the layer's output."""
        ctx.layer, ctx.shape = layer, x.shape
        return layer.forth(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of the input."""
        return ctx.layer.back(g[0], ctx.shape), None


def behind(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what a module that is more than a batch norm (timm's BatchNormAct2d) does after it."""
    for name in ("drop", "act"):
        rest = getattr(norm, name, None)
        x = rest(x) if isinstance(rest, nn.Module) else x
    return x


def folded(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> Weights:
    """Return weight and bias of a layer with the batch norm behind it."""
    w, b = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return w.to(dtype), None if b is None else b.to(dtype)
    s = (norm.running_var.double() + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach().double())
    shift = (0 if b is None else b.double()) - norm.running_mean.double()
    beta = 0 if norm.bias is None else norm.bias.detach().double()
    return (w.double() * s.view(-1, 1, 1, 1)).to(dtype), (beta + shift * s).to(dtype)


def stamp(*modules: nn.Module | None) -> Hashable:
    """Return what changes when the modules' tensors do, or a norm's eps."""
    eps = tuple(getattr(module, "eps", None) for module in modules)
    versions = ((one, 0 if one.is_inference() else one._version) for one in tensors_of(*modules))
    return eps, *((one.data_ptr(), one.device, one.dtype, version) for one, version in versions)


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """Return the modules' own parameters and buffers."""
    own = [(*module._parameters.values(), *module._buffers.values()) for module in modules if module is not None]
    return [one for several in own for one in several if one is not None]


def packable(x: Tensor) -> bool:
    """Tell whether oneDNN's own order of weights exists for inputs like this."""
    if x.device.type != "cpu" or not bool(torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    return x.dtype == torch.float32 or (
        x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@dataclass(frozen=True, eq=False)
class Kernel:
    """The routines of one kind of layer: from plain weights, and from packed ones forth and back."""

    plain: Callable[..., Tensor]
    pack: Callable[..., Tensor]
    packed: Callable[..., Tensor]
    pack_back: Callable[..., Tensor]
    packed_back: Callable[..., Tensor]


def convolve(m: nn.Conv2d, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return a convolution."""
    return F.conv2d(x, w, b, m.stride, m.padding, m.dilation, m.groups)


def geometry(m: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return padding, stride, dilation and groups."""
    return tuple(int(n) for n in m.padding), m.stride, m.dilation, m.groups


def pack_convolution(m: nn.Conv2d, w: Tensor, x: Tensor) -> Tensor:
    """Return a convolution's weights in the order for inputs like x."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(w, *geometry(m), list(x.shape))
    return packed


def packed_convolution(m: nn.Conv2d, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return a convolution by packed weights."""
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(x, w, b, *geometry(m), "none", [], "")
    return output


def remainder(m: nn.Conv2d, g: Tensor, shape: torch.Size) -> list[int]:
    """Return how many rows and columns of the input lie behind the last step of a convolution."""
    padding, stride, dilation, _ = geometry(m)
    reach = [
        (g.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (m.kernel_size[i] - 1) + 1 for i in (0, 1)
    ]
    return [shape[2 + i] - reach[i] for i in (0, 1)]


def pack_convolution_back(m: nn.Conv2d, w: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Return a convolution's weights in the order for the way back."""
    padding, stride, dilation, groups = geometry(m)
    over = remainder(m, g, shape)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        w, padding, over, stride, dilation, groups, list(g.shape)
    )
    return packed


def packed_convolution_back(m: nn.Conv2d, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of a convolution's input: the transposed convolution of that of its output."""
    padding, stride, dilation, groups = geometry(m)
    over = remainder(m, g, shape)
    gradient: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        g, w, None, padding, over, stride, dilation, groups, "none", [], ""
    )
    return gradient


def apart(m: nn.Conv2d) -> bool:
    """Tell whether a convolution looks at square patches that do not overlap, as the first one of a ViT does."""
    padding, stride, dilation, groups = geometry(m)
    square = stride == m.kernel_size == (stride[0], stride[0])
    return square and stride[0] > 1 and not any(padding) and set(dilation) == {1} and groups == 1


def pack_patches_back(m: nn.Conv2d, w: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Return the weights of a convolution of patches as those of a linear layer from outputs to a patch."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(w.flatten(1).t().contiguous(), g.numel() // g.shape[1])
    return packed


def packed_patches_back(m: nn.Conv2d, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of the input of a convolution of patches: a linear layer's output, laid out.

    oneDNN's transposed convolution takes 4 to 14 times as long for patches of images, about as long for those of many
    channels.
    """
    patches: Tensor = torch.ops.mkldnn._linear_pointwise(g.permute(0, 2, 3, 1), w, None, "none", [], "")
    below, right = remainder(m, g, shape)
    return F.pad(F.pixel_shuffle(patches.permute(0, 3, 1, 2), m.stride[0]), (0, right, 0, below))


def multiply(m: nn.Linear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return a linear layer's output."""
    return F.linear(x, w, b)


def pack_linear(m: nn.Linear, w: Tensor, x: Tensor) -> Tensor:
    """Return a linear layer's weights in the order for inputs like x."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(w, x.numel() // x.shape[-1])
    return packed


def packed_linear(m: nn.Linear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return a linear layer's output by packed weights."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return output


def pack_linear_back(m: nn.Linear, w: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Return a linear layer's weights in the order for the way back."""
    return pack_linear(m, w.t().contiguous(), g)


def packed_linear_back(m: nn.Linear, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of a linear layer's input from that of its output."""
    return packed_linear(m, g, w, None)


CONVOLUTION = Kernel(convolve, pack_convolution, packed_convolution, pack_convolution_back, packed_convolution_back)
PATCHES = Kernel(convolve, pack_convolution, packed_convolution, pack_patches_back, packed_patches_back)
LINEAR = Kernel(multiply, pack_linear, packed_linear, pack_linear_back, packed_linear_back)


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a layer or norm: the tensors that it read and gave, and what was in them then."""

    module: nn.Module
    x: Tensor
    output: Tensor
    read: Tensor
    gave: Tensor


class Reads(TorchDispatchMode):
    """Count how often torch's operations read the memory of watched tensors, and see attention; entered by `with`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[int, int] = {}
        self.attends = False

    def watch(self, tensor: Tensor) -> None:
        """Start to count for a tensor, which must stay alive."""
        self.counts[memory(tensor)] = 0

    def add(self, tensor: Tensor) -> None:
        """Count one more, if the tensor is watched."""
        if tensor.layout == torch.strided and memory(tensor) in self.counts:
            self.counts[memory(tensor)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attends |= func is FUSED
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.add(one)
        return func(*args, **(kwargs or {}))


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def memory(tensor: Tensor) -> int:
    """Return the number of the memory that a tensor and its views share."""
    return int(tensor.untyped_storage()._cdata)


def forwards(classifier: Classifier) -> tuple[list[tuple[nn.Module, Callable[[Tensor], Tensor]]], bool]:
    """Return the modules that can do with less and their new forward, and whether torch's fused attention runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((1, classifier.channels, *classifier.size), generator=generator).to(classifier.device)
    new: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    known: dict[Hashable, bool] = {}
    with torch.no_grad(), frozen(classifier.model):
        calls, reads, logits = observed(classifier.model, classifier.normalize(x))
        norms = {id(conv): norm for conv, norm in pairs(calls, reads)}
        for call in calls:
            if isinstance(call.module, nn.Conv2d | nn.Linear) and ordinary(call.module):
                norm = norms.get(id(call))
                layer = Prepared(call.module, norm, last=memory(call.output) == memory(logits))
                kind = type(call.module), settings_of(call.module), call.read.shape
                layer.packs = known[kind] = known[kind] if kind in known else agrees(layer, call)
                new += [(call.module, layer)] if norm is None else [(call.module, layer), (norm, Passing(norm, layer))]
    return new, reads.attends


def observed(network: nn.Module, x: Tensor) -> tuple[list[Call], Reads, Tensor]:
    """Run a network on one image; return what its convolutions, linear layers and norms did, and its logits."""
    calls: list[Call] = []
    reads = Reads()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = first(output)
        if tensor is None:
            return
        reads.add(tensor)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and inputs and isinstance(inputs[0], Tensor):
            read = inputs[0] if isinstance(module, nn.BatchNorm2d) else inputs[0].clone()
            calls.append(Call(module, inputs[0], tensor, read, tensor.clone()))
            reads.watch(tensor)

    with ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_hook(note).remove)
        with reads:
            logits = read_logits(network(x))
    return calls, reads, logits


def pairs(calls: list[Call], reads: Reads) -> Iterator[tuple[Call, nn.BatchNorm2d]]:
    """Yield the convolutions with the norm that alone reads what they give, where folding changes no number."""
    runs = Counter(call.module for call in calls)
    norms = {id(call.x): call for call in calls if isinstance(call.module, nn.BatchNorm2d)}
    for call in calls:
        then = norms.get(id(call.output))
        if then is None or runs[call.module] > 1 or runs[then.module] > 1 or reads.counts[memory(call.output)] != 1:
            continue
        conv, norm = call.module, then.module
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and ordinary(conv) and ordinary(norm):
            w, b = folded(conv, norm, call.read.dtype)
            if same(behind(norm, convolve(conv, call.read, w, b)), then.gave):
                yield call, norm


def ordinary(module: nn.Module) -> bool:
    """Tell whether a module does what its class says: no forward of its own, no hooks, no odd padding."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.BatchNorm2d):
        return module.running_mean is not None
    if isinstance(module, nn.Conv2d):
        return type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    return type(module) is nn.Linear


def same(found: Tensor, expected: Tensor) -> bool:
    """Tell whether numbers are the same but for rounding: to 100 eps of the largest, 4 in bfloat16."""
    off, largest = (found - expected).abs().max(), expected.abs().max()
    most = 4 if expected.dtype == torch.bfloat16 else 100
    return bool(off <= most * torch.finfo(expected.dtype).eps * largest)


def agrees(layer: Prepared, call: Call) -> bool:
    """Tell whether oneDNN has the layer's operations, and packed weights give what plain ones do, forth and back."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = call.read.to(dtype)
            if packable(x) and call.read.dtype == torch.float32:
                w, b = folded(layer.module, layer.norm, dtype)
                y = layer.kernel.plain(layer.module, x, w, b)
                if not (same(layer.forth(x), y) and same(layer.back(y, x.shape), gradient(layer, x, w, y))):
                    return False
    except (RuntimeError, AttributeError):
        return False
    finally:
        layer.ready.clear()
    return True


def settings_of(layer: nn.Conv2d | nn.Linear) -> Hashable:
    """Return what decides which routine runs."""
    return layer.weight.shape, layer.bias is None, geometry(layer) if isinstance(layer, nn.Conv2d) else None


def gradient(layer: Prepared, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of the input as torch has it."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(layer.kernel.plain(layer.module, leaf, w, None), leaf, g)
    return found
