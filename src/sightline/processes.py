"""Processes. One, or those that `torchrun` started, with the device of each; by lightning-fabric."""

import atexit
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from sightline.classifier import UnsuitedError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS: Mapping[str, Literal["32-true", "bf16-mixed"]] = {"32-true": "32-true", "bf16-mixed": "bf16-mixed"}
"""What can be used: nothing with loss scaling, whose state a checkpoint would have to carry."""

PATIENCE = timedelta(days=7)
"""How long a process waits for the others; `torchrun` ends all when one fails."""


def fabric_of(accelerator: str = "auto", precision: str = "32-true") -> "Fabric":
    """Return what knows devices, precision and processes: one, or those that `torchrun` started.

    `accelerator` is one of Lightning's; "auto" is CUDA where there is a GPU of it, else the CPU (Apple's GPUs hold no
    float64, in which scores are summed). Its import takes seconds.

    Raises:
        ValueError: a precision that is none of `PRECISIONS`, or an accelerator that this machine lacks.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    if precision not in PRECISIONS:
        raise ValueError(f"expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, local = PRECISIONS[precision], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = int(os.environ.get("WORLD_SIZE", 1)) // local
    try:
        if local * nodes == 1:
            return Fabric(accelerator=accelerator, devices=1, precision=chosen)
        strategy = DDPStrategy(timeout=PATIENCE)
        fabric = Fabric(accelerator=accelerator, strategy=strategy, devices=local, num_nodes=nodes, precision=chosen)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator {accelerator!r} cannot be used here: {error}; take auto or cpu") from error
    fabric.launch()
    atexit.register(leave)
    return fabric


def first() -> bool:
    """Tell whether this is the first, or the only, of the processes that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Leave the group of processes, which would else be torn down in the middle of the interpreter's end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def summed(fabric: "Fabric", values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if fabric.world_size == 1:
        return values
    total = fabric.all_reduce(values.to(fabric.device), reduce_op="sum")
    return cast(Tensor, total).to(values.device)


def agreed(work: Callable[[], None]) -> None:
    """Do this process's work; where the network does not suit the method in one process, raise that in all.

    Raises:
        UnsuitedError: in this process or in another. Any other error ends this process, and `torchrun` the others.
    """
    if not torch.distributed.is_initialized():
        work()
        return
    said: str | None = None
    try:
        work()
    except UnsuitedError as error:
        said = str(error)
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, said)
    if found := [text for text in texts if text is not None]:
        raise UnsuitedError(found[0])
