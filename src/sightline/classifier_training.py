"""Training a classifier. Cross entropy with the usual choices; staged fine-tuning with a replaced head.

The two stages of the medical experiments of Opti-CAM (Zhang et al., CVIU 2024), the new head first, then all layers for
50 epochs: `ClassifierConfig(epochs=60, freeze_epochs=10, lr=1e-3, lr_all=1e-5, schedule="constant", warmup=0.0)`.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.classifier import Classifier, check_labels, read_logits
from sightline.data import Batch, Indexed, Sample, batches
from sightline.hooks import submodule
from sightline.registry import unknown
from sightline.training import Augment, Metrics, Progress, fit, generator, gradients, synchronize, update
from sightline.types import Labels, Logits
from sightline.wsol_training import Part, regularizer, weighted

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained.

    During the first `freeze_epochs` epochs the layers whose names begin with a name in `freeze` (by default all but
    the head) stay as they are, batch-norm statistics included; then everything learns at `lr_all` (by default `lr`),
    with a schedule of its own. `warmup` is in epochs; `step` multiplies by `decay` every `decay_every` epochs.
    `augment` is "none" or names of `AUGMENTATIONS` joined by "+", applied in that order. `regularizer` is "none" or one
    of "has", "cutmix" and "adl", with settings where wanted: "has?grid=7&drop=0.3" (see `wsol_training`); the accuracy
    is on what the network then sees, and counts each of an image's labels by its share. Under several processes "has"
    and "adl" draw what one process would, "cutmix" the same boxes but partners inside of each process. `permute` is the
    seed of a permutation that gives every image the label of another one, for good: nothing can be learned but the
    images by heart (Adebayo et al., NeurIPS 2018; see `Permuted`).

    Raises:
        ValueError: numbers out of range, or settings of a first stage that has no epochs.
        LookupError: an unknown augmentation, regularizer or setting of one.
        TypeError: a setting of a regularizer that is of another kind.
    """

    epochs: int = 20
    batch: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    lr_all: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 1.0
    decay: float = 0.1
    decay_every: int = 20
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ()
    freeze_epochs: int = 0
    augment: str = "flip+crop"
    regularizer: str = "none"
    precision: str = "32-true"
    permute: int | None = None

    def __post_init__(self) -> None:
        augmentation(self.augment)
        regularizer(self.regularizer)
        expect_choice(self, {"optimizer": ("sgd", "adamw"), "schedule": ("cosine", "step", "constant")})
        expect(self, ">= 1", "epochs", "batch", "decay_every")
        expect(self, "> 0", "lr", "lr_all", "decay")
        expect(self, ">= 0", "warmup", "weight_decay", "momentum")
        expect(self, "in [0, 1)", "label_smoothing")
        if not 0 <= self.freeze_epochs <= self.epochs:
            raise ValueError(
                f"expected freeze_epochs in 0..epochs, got freeze_epochs={self.freeze_epochs} of epochs={self.epochs}"
            )
        if self.freeze_epochs == 0 and (self.freeze or self.lr_all is not None):
            raise ValueError("freeze and lr_all need freeze_epochs >= 1: the epochs of the first stage")


RULES: Mapping[str, Callable[[float], bool]] = {
    ">= 1": lambda value: value >= 1,
    ">= 0": lambda value: value >= 0,
    "> 0": lambda value: value > 0,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
}
"""What a configuration may ask of a number."""


def expect(config: object, rule: str, *names: str) -> None:
    """Check that entries of a configuration keep a rule of `RULES`; None keeps every rule.

    Raises:
        ValueError: one does not; it is named with its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not RULES[rule](value):
            raise ValueError(f"expected {name} {rule}, got {name}={value}")


def expect_choice(config: object, choices: Mapping[str, Sequence[str]]) -> None:
    """Check that entries of a configuration are among their choices.

    Raises:
        ValueError: one is not; it is named with its value and the choices.
    """
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {getattr(config, name)!r}")


def train(
    classifier: Classifier,
    dataset: Indexed[Sample],
    config: ClassifierConfig,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    every: int = 200,
    resume: bool = True,
    report: Callable[[Progress], None] | None = None,
    accelerator: str = "auto",
) -> tuple[Metrics, ...]:
    """Train a classifier's network in place with `fit`; return mean loss and accuracy of each epoch (on what it saw).

    The network is left in evaluation mode; which parameters learn is as before, also after an interruption.

    Raises:
        ValueError, FloatingPointError: as `fit`; a sample without a label, or with one that the network lacks.
    """
    with flags_back(classifier.model):
        return fit(
            ClassifierTrainer(classifier, config),
            dataset if config.permute is None else Permuted(dataset, config.permute),
            epochs=config.epochs,
            batch=config.batch,
            seed=seed,
            out=out,
            every=every,
            augment=augmentation(config.augment),
            resume=resume,
            report=report,
            precision=config.precision,
            accelerator=accelerator,
        )


class Permuted:
    """A data set whose images have each other's labels, by one fixed permutation.

    The permutation is a single circle drawn with `seed`, so no image of two or more keeps its place (its class it may,
    where the other one is of the same). What is counted in labels stays as it was. Every sample reads the other one
    too: put `remember` inside.
    """

    def __init__(self, dataset: Indexed[Sample], seed: int = 0) -> None:
        self.dataset = dataset
        order = torch.randperm(len(dataset), generator=generator("permute", seed))
        others = torch.empty_like(order)
        others[order] = order.roll(1)
        self.others: list[int] = others.tolist()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Sample:
        other = self.dataset[self.others[index]]
        return replace(self.dataset[index], label=other.label, labels=other.labels)


@contextmanager
def flags_back(model: nn.Module) -> Iterator[None]:
    """At the end let the parameters learn that did before, in evaluation mode."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.eval()


class ClassifierTrainer:
    """A `Trainer`: cross entropy of the classifier's logits, one optimizer, parameters that were frozen stay so."""

    def __init__(self, classifier: Classifier, config: ClassifierConfig) -> None:
        model = classifier.model
        self.classifier, self.config, self.regularizer = classifier, config, regularizer(config.regularizer)
        self.learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.kept = frozen_names(model, config.freeze) if config.freeze_epochs else frozenset[str]()
        self.steps, self.done = 1, 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration and the network's shapes."""
        return {**asdict(self.config), "model": fingerprint(self.classifier.model)}

    def setup(self, fabric: "Fabric") -> None:
        """Move the network to its device and make the optimizer."""
        c, self.fabric = self.config, fabric
        self.network = synchronize(fabric, fabric.to_device(self.classifier.model))
        parameters = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, c.lr, c.momentum, weight_decay=c.weight_decay)
            if c.optimizer == "sgd"
            else torch.optim.AdamW(parameters, c.lr, weight_decay=c.weight_decay)
        )

    def epoch(self, number: int, steps: int) -> None:
        """Set training mode; in the first stage freeze what the configuration names."""
        self.steps = steps
        kept = self.kept if number < self.config.freeze_epochs else frozenset[str]()
        for name, module in self.classifier.model.named_modules():
            module.training = name not in kept
        for name in self.learning:
            self.classifier.model.get_parameter(name).requires_grad_(name not in kept)

    def step(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Take one optimizer step; return loss and accuracy of the batch."""
        x, y = self.classifier.normalize(batch.x), labels(batch, "training a classifier")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.done, self.steps)
        part = Part(self.fabric.global_rank, self.fabric.world_size)
        with self.regularizer(self.classifier, x, y, part=part) as (seen, learned), self.fabric.autocast():
            logits = read_logits(self.network(seen)).to(x.dtype)
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
        targets = [(weight, check_labels(logits, label)) for weight, label in learned]
        loss = weighted(targets, lambda y: F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing))
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        update(self.optimizer, learning, gradients(self.fabric, loss, learning, share))
        self.done += 1
        return {"loss": loss.detach(), "accuracy": weighted(targets, lambda y: hits(logits, y))}

    def state_dict(self) -> dict[str, Any]:
        """Return copies: what `nn.Module.state_dict` returns are the live weights."""
        live = {"model": dict(self.classifier.model.state_dict()), "optimizer": self.optimizer.state_dict()}
        return {**copy.deepcopy(live), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights, optimizer and the number of steps done."""
        self.classifier.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])


def labels(batch: Batch, what: str) -> Labels:
    """Return the labels of a batch; `what` needs them.

    Raises:
        ValueError: an image has none.
    """
    if batch.y is None:
        missing = [sample.id for sample in batch.samples if sample.label is None]
        raise ValueError(f"{what} needs a label for every image; {missing[0]!r} has none")
    return batch.y


def hits(logits: Logits, y: Labels) -> Tensor:
    """Return the share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == y).float().mean()


def learning_rate(config: ClassifierConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) with `steps` steps an epoch.

    Each stage of N steps starts anew: a warm-up of W steps at (n + 1) / W, then 1 ("constant"),
    (1 + cos(pi (n - W) / (N - W))) / 2 ("cosine") or decay^floor(n / (decay_every * steps)) ("step").
    """
    first = config.freeze_epochs * steps
    peak = config.lr if step < first or config.lr_all is None else config.lr_all
    n, total = (step, first) if step < first else (step - first, config.epochs * steps - first)
    warm = min(round(config.warmup * steps), total)
    if n < warm:
        return peak * (n + 1) / warm
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * (n - warm) / (total - warm))) / 2
    return peak * config.decay ** (n // (config.decay_every * steps)) if config.schedule == "step" else peak


def frozen_names(model: nn.Module, prefixes: tuple[str, ...]) -> frozenset[str]:
    """Return the names of modules and parameters below the prefixes; without prefixes, of all but the head.

    Raises:
        LookupError: a prefix that begins no name.
        ValueError: no prefixes and no head.
    """
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()] if name]
    if not prefixes:
        head = head_name(model)
        return frozenset(name for name in names if not below(name, head) and not below(head, name))
    for prefix in prefixes:
        if prefix not in names:
            raise LookupError(unknown(prefix, names, "layer"))
    return frozenset(name for name in names if any(below(name, prefix) for prefix in prefixes))


def below(name: str, prefix: str) -> bool:
    """Say whether a dotted name is the prefix or lies inside it."""
    return name == prefix or name.startswith(f"{prefix}.")


def head_name(model: nn.Module) -> str:
    """Return the name of the layer that makes the logits: the last linear (or 1x1 convolution) of the usual names.

    Raises:
        ValueError: `fc`, `classifier`, `head`, `heads` hold none, and the network does not end in one.
    """
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    with_weights = [(name, m) for name, m in modules if next(m.parameters(recurse=False), None) is not None]
    usual = [(name, m) for name, m in with_weights if name.split(".")[0] in ("fc", "classifier", "head", "heads")]
    ends = [name for name, m in usual if is_head(m)] or [name for name, m in with_weights[-1:] if is_head(m)]
    if not ends or not ends[-1]:
        raise ValueError(
            f"found no last linear layer in {type(model).__name__}: looked in fc, classifier, head, heads and at its "
            "end; replace it by hand, and name the layers to freeze"
        )
    return ends[-1]


def is_head(module: nn.Module) -> bool:
    """Say whether a module can map features to classes."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def replace_head(model: nn.Module, classes: int, *, seed: int = 0) -> nn.Module:
    """Replace the last layer by a new one for `classes` classes, in place, and return the network.

    Weights are normal with standard deviation 0.01, the bias is zero.

    Raises:
        ValueError: fewer than one class, or no last linear layer.
    """
    if classes < 1:
        raise ValueError(f"expected at least one class, got {classes}")
    name = head_name(model)
    new = copy.deepcopy(submodule(model, name))
    weight = new.get_parameter("weight")
    drawn = 0.01 * torch.randn((classes, *weight.shape[1:]), generator=generator("head", seed))
    new.register_parameter("weight", nn.Parameter(drawn.to(weight)))
    new.register_parameter("bias", nn.Parameter(torch.zeros(classes).to(weight)))
    if isinstance(new, nn.Linear):
        new.out_features = classes
    if isinstance(new, nn.Conv2d):
        new.out_channels = classes
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


def accuracy(classifier: Classifier, dataset: Indexed[Sample], *, batch: int = 64) -> float:
    """Return the share of samples whose predicted class is their label.

    Raises:
        ValueError: no samples, or one without a label.
    """
    if len(dataset) == 0:
        raise ValueError("accuracy needs at least one image, got none")
    right = 0
    for part in batches(dataset, batch):
        y = labels(part, "accuracy")
        with torch.no_grad():
            right += int((classifier(part.x.to(classifier.device)).argmax(1).cpu() == y).sum())
    return right / len(dataset)


def fingerprint(model: nn.Module) -> str:
    """Return a network's class and a digest of the names and shapes of its state."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return f"{type(model).__name__} {hashlib.blake2b(repr(shapes).encode(), digest_size=4).hexdigest()}"


def augmentation(names: str) -> Augment | None:
    """Return the augmentation of a configuration: "none", or names joined by "+".

    Raises:
        LookupError: an unknown name.
    """
    if names == "none":
        return None
    chosen = names.split("+")
    for name in chosen:
        if name not in AUGMENTATIONS:
            raise LookupError(unknown(name, [*AUGMENTATIONS, "none"], "augmentation"))
    return partial(augmented, names=tuple(chosen))


def augmented(image: Tensor, randomness: torch.Generator, *, names: tuple[str, ...]) -> Tensor:
    """Apply augmentations in order."""
    for name in names:
        image = AUGMENTATIONS[name](image, randomness)
    return image


def flip(image: Tensor, randomness: torch.Generator) -> Tensor:
    """Mirror left and right for half of the images."""
    return image.flip(-1) if draw(randomness, 0.0, 1.0) < 0.5 else image


def crop(image: Tensor, randomness: torch.Generator) -> Tensor:
    """Pad by an eighth of each side, by reflection, and crop back to the size at a random place."""
    h, w = image.shape[-2:]
    padded = F.pad(image[None], (w // 8, w // 8, h // 8, h // 8), mode="reflect")[0]
    top, left = (int(draw(randomness, 0.0, 2.0 * (side // 8) + 1)) for side in (h, w))
    return padded[:, top : top + h, left : left + w]


def zoom(image: Tensor, randomness: torch.Generator, *, smallest: float = 0.35) -> Tensor:
    """Crop `smallest` to 1 of the area at an aspect of 3/4 to 4/3, and resize to the old size (bilinear, antialiased).

    The aspect is relative to the image's own; a side that would exceed the image is cut to it.
    """
    h, w = image.shape[-2:]
    area, aspect = draw(randomness, smallest, 1.0), math.exp(draw(randomness, math.log(3 / 4), math.log(4 / 3)))
    height = max(1, min(h, round(h * (area / aspect) ** 0.5)))
    width = max(1, min(w, round(w * (area * aspect) ** 0.5)))
    top, left = int(draw(randomness, 0.0, h - height + 1.0)), int(draw(randomness, 0.0, w - width + 1.0))
    part = image[None, :, top : top + height, left : left + width]
    return F.interpolate(part, size=(h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)


def resized_crop(image: Tensor, randomness: torch.Generator) -> Tensor:
    """Zoom into .08 to 1 of the area: torchvision's RandomResizedCrop, but for sides that exceed the image."""
    return zoom(image, randomness, smallest=0.08)


def jitter(image: Tensor, randomness: torch.Generator) -> Tensor:
    """Scale brightness, contrast and saturation, each by .8 to 1.2, in this order; clamp to [0, 1]."""
    brightness, contrast, saturation = (draw(randomness, 0.8, 1.2) for _ in range(3))
    image = image * brightness
    image = image.mean() + contrast * (image - image.mean())
    gray = image.mean(0, keepdim=True)
    return (gray + saturation * (image - gray)).clamp(0, 1)


def left_half(image: Tensor, randomness: torch.Generator) -> Tensor:
    """Replace the right half by uniform noise: whoever learns so looks at the left one (CASM's two copies)."""
    half = image.shape[-1] // 2
    return torch.cat([image[..., :half], torch.rand(image[..., half:].shape, generator=randomness).to(image)], -1)


def draw(randomness: torch.Generator, low: float, high: float) -> float:
    """Return a uniform number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=randomness, dtype=torch.float64))


AUGMENTATIONS: Mapping[str, Augment] = {
    "flip": flip,
    "crop": crop,
    "zoom": zoom,
    "resized_crop": resized_crop,
    "jitter": jitter,
    "left_half": left_half,
}
