"""Hooks. Look inside a network, and leave no trace: every context manager here undoes what it did, also on an error."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sightline.registry import unknown


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module called `name`.

    Raises:
        LookupError: no such module; the message names the nearest ones.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        raise LookupError(unknown(name, [known for known in modules if known], "layer"))
    return modules[name]


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the dotted name of a module inside `model`; the first one of a module with several.

    Raises:
        LookupError: the module is not inside the model.
    """
    names: dict[nn.Module, str] = {candidate: name for name, candidate in model.named_modules()}
    if module in names:
        return names[module]
    raise LookupError(
        f"the layer {type(module).__name__} is not inside {type(model).__name__}; give a module of this very model"
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and stop gradients to the parameters; every flag comes back."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    grads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for parameter in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in grads:
            parameter.requires_grad_(True)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `change` on every output of the module; what it returns, unless None, replaces the output.

    Under autocast `change` sees an output in half precision as float32, and what it returns goes on as it was.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        tensor = first(output)
        changed = None if tensor is None else change(widened(tensor))
        return None if tensor is None or changed is None else put_first(output, changed.to(tensor.dtype))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor that autocast has made narrow in float32, any other as it is."""
    if torch.is_autocast_enabled(tensor.device.type) and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor


@contextmanager
def capture(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect copies of the layers' outputs; a layer that runs twice leaves its last one.

    Copies, because an in-place ReLU behind the layer would change what was collected.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda output: found.update({name: output.clone()})

    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(hooked(submodule(model, name), keep(name)))
        yield found


@contextmanager
def cut(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Make the layer's output a leaf that asks for a gradient: the backward pass stops there.

    The list gets one leaf a call of the layer; the last one counts.
    """
    leaves: list[Tensor] = []

    def split(output: Tensor) -> Tensor:
        leaves.append(output.detach().clone().requires_grad_())
        return leaves[-1].clone()

    with hooked(submodule(model, layer), split):
        yield leaves


@contextmanager
def edit(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the layer's output by `change(output)`."""
    with hooked(submodule(model, layer), change):
        yield


@contextmanager
def seen(model: nn.Module, x: Tensor, read: Callable[[Any], Tensor]) -> Iterator[list[Tensor]]:
    """Keep a copy of what is read of the network's first output for this very input in a pass that nobody changes.

    Nobody does where no module is in training mode, none inside has a hook, and neither autocast nor other functions in
    torch's place came after this began; other weights or another `forward` would not be noticed. A scripted network has
    no hooks and shows nothing.
    """
    found: list[Tensor] = []
    if isinstance(model, torch.jit.ScriptModule):
        yield found
        return
    precision = torch.is_autocast_enabled(x.device.type)

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        asked = not found and len(inputs) == 1 and isinstance(inputs[0], Tensor)
        free = not torch._C._is_torch_function_mode_enabled() and torch.is_autocast_enabled(x.device.type) is precision
        if asked and free and untouched(model) and identical(inputs[0], x):
            found.append(read(output).detach().clone())

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def identical(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are of one kind, in one place and equal."""
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def untouched(model: nn.Module) -> bool:
    """Tell whether a network is in evaluation mode, and no module inside has a hook."""
    inside = [module for module in model.modules() if module is not model]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in inside)
    return not hooked and not any(module.training for module in (model, *inside))


class Substituted(TorchFunctionMode):
    """Call other functions instead of torch's; entered by `with`."""

    def __init__(self, substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.substitutes = substitutes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.substitutes.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def substituted(substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Call `substitutes[f]` wherever the network calls the torch function f, by a module or by hand.

    The substitute gets f's arguments and may call f itself. What f calls inside (`multi_head_attention_forward` its
    softmax) is not seen; scripted parts of a network are not either.
    """
    with Substituted(substitutes):
        yield


@contextmanager
def differentiable() -> Iterator[None]:
    """Record gradients whatever the caller's mode is, inference mode included."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def first(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output: a tensor, a tuple or a mapping of tensors."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def put_first(output: Any, tensor: Tensor) -> Any:
    """Return the output with its first tensor replaced, of the same type as it was."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):
        key = next(key for key, item in output.items() if isinstance(item, Tensor))
        changed = type(output)(output)
        changed[key] = tensor
        return changed
    index = next(index for index, item in enumerate(output) if isinstance(item, Tensor))
    items = [*output[:index], tensor, *output[index + 1 :]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
