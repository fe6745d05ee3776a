"""Training. One loop for every trainer: it owns order, augmentation, processes, checkpoints and stopping.

What happens at a step depends on (seed, epoch, step) alone, so on the CPU a run that was killed and resumed ends with
the very bits of an uninterrupted one. A trainer owns modules, optimizers, schedules and its own gradients.

Under `torchrun` each process takes its part of every step's images and gradients are summed: the same training as in
one process, up to rounding, for networks whose images do not know of each other. Batch norms do: every process has its
own statistics on the CPU, all have common ones on GPUs (`synchronize`). Dropout draws alike in every process.
"""

import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from sightline.data import Batch, Indexed, Sample, collate
from sightline.processes import fabric_of, summed
from sightline.runs import describe, write_bytes, write_text

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""From an image (ch, h, w) in [0, 1] and the only randomness it may use to another such image."""


@dataclass(frozen=True)
class Joint:
    """An augmentation of whole samples: `move` returns image and mask moved together, without what it cannot move."""

    move: Callable[[Sample, torch.Generator], Sample]


Metrics: TypeAlias = Mapping[str, float]

CHECKPOINT = "checkpoint.pt"


class NotFiniteError(FloatingPointError):
    """A step whose numbers are not finite: `numbers` says which are not."""

    def __init__(self, numbers: Metrics) -> None:
        super().__init__(", ".join(f"{name} = {value}" for name, value in numbers.items()))
        self.numbers = numbers


@runtime_checkable
class Trainer(Protocol):
    """What `fit` drives."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that must be equal for a checkpoint to fit: the hyper-parameters, the kind of network."""
        ...

    def setup(self, fabric: "Fabric") -> None:
        """Move modules to the fabric's device and make optimizers; called once, before all else."""
        ...

    def epoch(self, number: int, steps: int) -> None:
        """Enter epoch `number` (from 0) of `steps` steps: set modes and flags; after a resume also in its middle."""
        ...

    def step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Learn from this process's images, `share` of the step's; return means over them, `loss` among them.

        With `gradients` and `update`, forward passes under `fabric.autocast()`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that changes: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a training is: in `epoch` of `epochs` (from 0), `step` of `steps` done; the metrics of the last step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    metrics: Metrics

    @property
    def done(self) -> int:
        """How many steps are done."""
        return self.epoch * self.steps + self.step

    @property
    def total(self) -> int:
        """How many steps there are."""
        return self.epochs * self.steps

    @property
    def note(self) -> str:
        """The metrics on one line."""
        return "  ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())


@dataclass(frozen=True)
class Position:
    """The next step to do, the sums over the epoch so far, the means of the epochs before."""

    epoch: int = 0
    step: int = 0
    sums: Metrics = field(default_factory=dict[str, float])
    history: tuple[Metrics, ...] = ()

    def after(self, metrics: Metrics, share: float, last: bool) -> "Position":
        """Return the position after one more step, which saw `share` of the epoch's images."""
        sums = {name: self.sums.get(name, 0.0) + share * value for name, value in metrics.items()}
        if last:
            return Position(self.epoch + 1, 0, {}, (*self.history, sums))
        return replace(self, step=self.step + 1, sums=sums)


def fit(
    trainer: Trainer,
    dataset: Indexed[Sample],
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    out: Path | str | None = None,
    every: int = 200,
    augment: Augment | Joint | None = None,
    resume: bool = True,
    report: Callable[[Progress], None] | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    fraction: float = 1.0,
) -> tuple[Metrics, ...]:
    """Train for `epochs` epochs and return the mean metrics of each.

    An epoch sees `fraction` of the images, drawn anew each time. `batch` images make a step, whatever the number of
    processes; the first process alone reports and writes, and all must see the same `out`.

    With `out`, a checkpoint is written every `every` steps, after each epoch, and when SIGINT or SIGTERM arrives (after
    the running step; then the signal takes its usual course; a second one does so at once). A later call with the same
    `out` goes on from there. The network stays on the device where it was trained.

    Raises:
        ValueError: numbers out of range, no data, a checkpoint that is broken or was made with other settings, or so
            few images in a step that a batch norm has no statistics.
        FloatingPointError: a step whose metrics, gradient or weights are not finite; `out/nonfinite.json` names its
            images, and no checkpoint is written after it.
    """
    if min(epochs, batch, every) < 1 or len(dataset) == 0 or not 0 < fraction <= 1:
        raise ValueError(
            "expected epochs, batch and every >= 1, fraction in (0, 1] and at least one image, got "
            f"epochs={epochs}, batch={batch}, every={every}, fraction={fraction} and {len(dataset)} images"
        )
    fabric = fabric_of(accelerator, precision)
    numbers = {"images": len(dataset), "epochs": epochs, "batch": batch, "seed": seed, "fraction": fraction}
    ends = {"first": dataset[0].id, "last": dataset[len(dataset) - 1].id}
    settings = {**numbers, **ends, "precision": precision, "augment": describe(named(augment)), **trainer.settings}
    folder = None if out is None else Path(out)
    seen = max(1, math.ceil(round(fraction * len(dataset), 6)))  # 0.07 * 100 is a little more than 7
    steps, entered, stopped = math.ceil(seen / batch), -1, False
    with own_randomness(fabric.device), held_signals() as received:
        reseed(fabric.device, "setup", seed)
        trainer.setup(fabric)
        at = read_checkpoint(folder, trainer, settings) if resume else Position()
        for epoch, step, indices in walk(at, len(dataset), seen, epochs=epochs, batch=batch, seed=seed):
            if epoch != entered:
                trainer.epoch(epoch, steps)
                entered = epoch
            mine, share = part(fabric, indices)
            samples = [varied(dataset[i], augment, generator("augment", seed, epoch, i)) for i in mine]
            reseed(fabric.device, "step", seed, epoch, step)
            try:
                with few_images(seen, batch, fabric.world_size):
                    found = trainer.step(collate(samples).to(fabric.device), share)
                metrics, stopped = together(fabric, found, share, stop=bool(received))
                finite(metrics)
            except NotFiniteError as error:
                ids, place = [dataset[i].id for i in indices], written(fabric, folder)
                raise FloatingPointError(nonfinite(error.numbers, place, epoch=epoch, step=step, ids=ids)) from error
            at = at.after(metrics, len(indices) / seen, step + 1 == steps)
            if report is not None and fabric.is_global_zero:
                report(Progress(epoch, epochs, step + 1, steps, metrics))
            stopped = stopped or (fabric.world_size == 1 and bool(received))
            if stopped or at.step % every == 0:
                write_checkpoint(written(fabric, folder), trainer, settings, at)
            if stopped:
                break
    if received:
        signal.raise_signal(received[0])
    if received or stopped:
        raise KeyboardInterrupt(f"training stopped by {f'signal {received[0]}' if received else 'another process'}")
    return at.history


def part(fabric: "Fabric", indices: Sequence[int]) -> tuple[Sequence[int], float]:
    """Return the images of a step that this process takes, and which share of the step they are.

    A process for which none is left takes the first one with a share of 0.
    """
    mine = indices[fabric.global_rank :: fabric.world_size]
    return (mine, len(mine) / len(indices)) if mine else (indices[:1], 0.0)


def written(fabric: "Fabric", folder: Path | None) -> Path | None:
    """Return the folder in the one process that writes, None in the others."""
    return folder if fabric.is_global_zero else None


def together(fabric: "Fabric", found: Mapping[str, Tensor], share: float, *, stop: bool) -> tuple[Metrics, bool]:
    """Return the means of a step's metrics over all processes, and whether any of them has to stop."""
    values = torch.tensor([share * float(value) for value in found.values()] + [float(stop)], dtype=torch.float64)
    *means, stops = summed(fabric, values).tolist()
    return dict(zip(found, means, strict=True)), stops > 0


def averaged(fabric: "Fabric", value: Tensor, share: float) -> Tensor:
    """Return the mean over the step's images of a mean over this process's, without its gradient."""
    return summed(fabric, share * value.detach())


def gradients(
    fabric: "Fabric", loss: Tensor, parameters: Sequence[Tensor], share: float, *, retain: bool = False
) -> list[Tensor | None]:
    """Return the gradient of the loss's mean over the step's images in all processes.

    `loss` is the mean over this process's images; `retain` keeps its graph. A parameter without a part in it has None.
    """
    own = torch.autograd.grad(share * loss, parameters, retain_graph=retain, allow_unused=True)
    found = [gradient for gradient in own if gradient is not None]
    if fabric.world_size > 1:
        nn.utils.vector_to_parameters(summed(fabric, torch.cat([one.flatten() for one in found])), found)
    return [*own]


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    clip: float | None = None,
) -> None:
    """Take one step of the optimizer along these gradients, whose joint norm is first cut to `clip`.

    Raises:
        NotFiniteError: the norm of the gradient before the step, which then is not taken, or of the weights after it.
            Both are the same in every process.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    finite({"norm of the gradient": float(norm)})
    optimizer.step()
    optimizer.zero_grad()
    norms = torch.stack([torch.linalg.vector_norm(parameter.detach()).to(norm) for parameter in parameters])
    finite({"norm of the weights": float(torch.linalg.vector_norm(norms))})


def finite(numbers: Metrics) -> None:
    """Check that all numbers are finite.

    Raises:
        NotFiniteError: one is not.
    """
    if not all(math.isfinite(value) for value in numbers.values()):
        raise NotFiniteError(numbers)


@contextmanager
def few_images(seen: int, batch: int, processes: int) -> Iterator[None]:
    """Say which batch would do where a batch norm gets a single value a channel: one image, of 1 x 1 features.

    Raises:
        ValueError: it does.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        least = seen % batch or batch
        where = f" in {processes} processes" if processes > 1 else ""
        fitting = [size for size in range(2 * processes, seen + 1) if not 0 < seen % size < 2 * processes]
        advice = f"take batch={min(fitting, key=lambda size: abs(size - batch))}" if fitting else "take more images"
        raise ValueError(
            f"a batch norm of 1 x 1 features cannot learn from a single image, and {seen} images by batch={batch} "
            f"leave a step of {least}{where}; {advice}"
        ) from error


def synchronize(fabric: "Fabric", model: nn.Module) -> nn.Module:
    """Give the batch norms of a network common statistics where several GPUs train it; in place but for their kind."""
    if fabric.world_size == 1 or fabric.device.type != "cuda":
        return model
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model)


def walk(
    at: Position, images: int, seen: int, *, epochs: int, batch: int, seed: int
) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Yield epoch, step and the images of the step, from a position on; `seen` of all images once an epoch."""
    for epoch in range(at.epoch, epochs):
        order: list[int] = torch.randperm(images, generator=generator("order", seed, epoch))[:seen].tolist()
        first = at.step if epoch == at.epoch else 0
        for step in range(first, math.ceil(seen / batch)):
            yield epoch, step, order[step * batch : (step + 1) * batch]


def named(augment: Augment | Joint | None) -> Callable[..., Any] | None:
    """Return the function whose name and settings a checkpoint keeps."""
    return augment.move if isinstance(augment, Joint) else augment


def varied(sample: Sample, augment: Augment | Joint | None, randomness: torch.Generator) -> Sample:
    """Return the sample as a `Joint` moves it, or with an augmented image alone.

    Then it has no geometry, which holds no longer.
    """
    if augment is None:
        return sample
    if isinstance(augment, Joint):
        return augment.move(sample, randomness)
    return Sample(sample.id, augment(sample.image, randomness), sample.label, sample.labels)


def generator(*key: str | int) -> torch.Generator:
    """Return a generator on the CPU whose sequence depends on the key alone."""
    return torch.Generator().manual_seed(seed_of(key))


def seed_of(key: tuple[str | int, ...]) -> int:
    """Return a number below 2^63 for a key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def reseed(device: torch.device, *key: str | int) -> None:
    """Seed the randomness that modules such as dropout draw from, inside `own_randomness`."""
    torch.default_generator.manual_seed(seed_of(key))
    if device.type == "cuda":
        torch.cuda.manual_seed(seed_of(key))


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give the caller's global random state back at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list while inside; the second one takes its usual course at once.

    Outside the main thread, which alone receives signals, nothing is held.
    """
    received: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in held}
    usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            restore()
            signal.raise_signal(number)

    try:
        for number in usual:
            signal.signal(number, note)
        yield received
    finally:
        restore()


def nonfinite(metrics: Metrics, folder: Path | None, *, epoch: int, step: int, ids: Sequence[str]) -> str:
    """Say that a number is NaN or infinite, and keep what led there in `nonfinite.json`."""
    shown = {name: str(value) for name, value in metrics.items()}
    named = f"its images are {', '.join(ids[:4])}{' ...' if len(ids) > 4 else ''}"
    if folder is not None:
        table = {"epoch": epoch, "step": step, "ids": list(ids), "metrics": shown}
        named = f"its images are listed in {write_text(folder / 'nonfinite.json', json.dumps(table, indent=1))}"
    values = ", ".join(f"{name} = {value}" for name, value in shown.items())
    return (
        f"training is not finite at epoch {epoch}, step {step}: {values}; {named}; "
        "lower the learning rate, lengthen the warm-up, or look at these images"
    )


def write_checkpoint(folder: Path | None, trainer: Trainer, settings: Mapping[str, Any], at: Position) -> None:
    """Write the checkpoint atomically; without a folder do nothing."""
    if folder is not None:
        content = BytesIO()
        torch.save({"settings": dict(settings), "at": asdict(at), "trainer": trainer.state_dict()}, content)
        write_bytes(folder / CHECKPOINT, content.getbuffer())


def read_checkpoint(folder: Path | None, trainer: Trainer, settings: Mapping[str, Any]) -> Position:
    """Load the folder's checkpoint into the trainer and return its position; where there is none, the start.

    Raises:
        ValueError: a broken checkpoint, or one of other settings.
    """
    if folder is None or not (path := folder / CHECKPOINT).exists():
        return Position()
    content = BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        made, at, learned = state["settings"], Position(**state["at"]), state["trainer"]
    except Exception as error:  # what an unpickler raises on broken bytes is not specified
        raise ValueError(f"{path} is no checkpoint of ours ({error}); delete it, or pass resume=False") from error
    names = sorted({*made, *settings})
    if changed := [name for name in names if made.get(name) != settings.get(name)]:
        told = ", ".join(f"{name} was {made.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise ValueError(
            f"{path} belongs to another training: {told}; use its settings, another folder, or resume=False"
        )
    trainer.load_state_dict(learned)
    return at


@contextmanager
def logged(folder: Path, kind: str | None) -> Iterator[Callable[[Progress], None]]:
    """Yield what writes each step's metrics below `folder`, as "csv" or for "tensorboard"; None writes nothing.

    Every start gets a folder of its own, `version_0`, `version_1` ...; a line is written as soon as its step is done.

    Raises:
        ValueError: tensorboard is not installed.
    """
    if kind is None:
        yield lambda at: None
        return
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    try:
        made = CSVLogger(folder, name="", flush_logs_every_n_steps=1) if kind == "csv" else None
        logger = TensorBoardLogger(folder, name="") if made is None else made
    except ModuleNotFoundError as error:
        raise ValueError("logs for tensorboard need it: pip install 'sightline[tensorboard]', or take csv") from error
    try:
        yield lambda at: logger.log_metrics({"epoch": at.epoch, **at.metrics}, at.done)
    finally:
        logger.save()
        logger.finalize("success")


class Remembered:
    """A data set that reads every sample once: id, image, label and, if `masks`, mask stay, other geometry does not.

    An image or mask that 8 bits hold exactly is kept in 8 bits, any other as it is; what comes out is equal to what
    went in. What does not fit into `most` bytes is read again.
    """

    def __init__(self, dataset: Indexed[Sample], most: int = 2**32, *, masks: bool = False) -> None:
        self.dataset, self.left, self.masks = dataset, most, masks
        self.kept: dict[int, tuple[str, Tensor, int | None, Tensor | None, Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Sample:
        if index not in self.kept:
            sample = self.dataset[index]
            image, mask = pack(sample.image), sample.mask if self.masks else None
            packed = None if mask is None else pack_mask(mask)
            self.left -= image.nbytes + (0 if packed is None else packed.nbytes)
            if self.left < 0:
                return Sample(sample.id, sample.image, sample.label, sample.labels, mask=mask)
            self.kept[index] = sample.id, image, sample.label, sample.labels, packed
        id_, image, label, labels, mask = self.kept[index]
        whole = image / 255 if image.dtype == torch.uint8 else image
        return Sample(id_, whole, label, labels, mask=None if mask is None else mask.long())


def remember(dataset: Indexed[Sample], *, most: int = 2**32, masks: bool = False) -> Indexed[Sample]:
    """Read every sample of `dataset` at most once, as far as they fit into `most` bytes; see `Remembered`."""
    return Remembered(dataset, most, masks=masks)


def pack_mask(mask: Tensor) -> Tensor:
    """Return the mask in 8 bits where that loses nothing, else the mask."""
    bits = mask.to(torch.uint8)
    return bits if torch.equal(bits.to(mask.dtype), mask) else mask


def pack(image: Tensor) -> Tensor:
    """Return the image in 8 bits where that loses nothing, else the image."""
    bits = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return bits if image.dtype == torch.float32 and torch.equal(bits / 255, image) else image
