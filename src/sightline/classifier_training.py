"""Training a classifier. Cross entropy or a multi-label loss with the usual choices; staged fine-tuning of a new head.

The two stages of the medical experiments of Opti-CAM (Zhang et al., CVIU 2024), the new head first, then all layers for
50 epochs: `ClassifierConfig(epochs=60, freeze_epochs=10, lr=1e-3, lr_all=1e-5, schedule="constant", warmup=0.0)`. The
multi-label classifiers of Maruf et al., Beyond discriminative regions, 2023 (arXiv 2308.11052), start from `IRN`;
"rescale+flip+binary_mask" and "rescale+flip+gaussian_noise" as its `augment` give their perturbed ones.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sightline.classifier import Classifier, check_labels, read_logits
from sightline.data import Batch, Indexed, Sample, batches
from sightline.hooks import submodule
from sightline.kinds import configured
from sightline.registry import unknown
from sightline.runs import Choice
from sightline.training import Augment, Metrics, Progress, fit, generator, gradients, synchronize, update
from sightline.types import Labels, Logits, Values
from sightline.wsol_training import Part, regularizer, weighted

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained.

    `loss` is "cross_entropy" of the label, or "soft_margin" of all classes that an image shows, L = -1/k sum_c [y_c log
    sigma(s_c) + (1 - y_c) log sigma(-s_c)] with y of `Sample.labels`, or the label alone where an image has none.

    During the first `freeze_epochs` epochs the layers whose names begin with a name in `freeze` (by default all but
    the head) stay as they are, batch-norm statistics included; then everything learns at `lr_all` (by default `lr`),
    with a schedule of its own. The head learns at `head_lr` times the rate of the rest. `warmup` is in epochs; `step`
    multiplies by `decay` every `decay_every` epochs, `power` is that of "poly" (see `learning_rate`).

    `augment` is "none" or names of `AUGMENTATIONS` joined by "+", applied in that order, with settings where wanted:
    "rescale?low=0.5+flip+binary_mask?keep=0.8". "gaussian_noise" leaves [0, 1] and stands last: others clamp.

    `regularizer` is "none" or one of "has", "cutmix" and "adl", with settings where wanted: "has?grid=7&drop=0.3" (see
    `wsol_training`); the accuracy is on what the network then sees, and counts each of an image's labels by its share
    (with "soft_margin" the labels of each of the mixed images). Under several processes "has" and "adl" draw what one
    process would, "cutmix" the same boxes but partners inside of each process.

    `permute` is the seed of a permutation that gives every image the label of another one, for good: nothing can be
    learned but the images by heart (Adebayo et al., NeurIPS 2018; see `Permuted`).

    Raises:
        ValueError: numbers out of range, settings of a first stage that has no epochs, or smoothed multi-label targets.
        LookupError: an unknown augmentation, regularizer or setting of one.
        TypeError: a setting of an augmentation or a regularizer that is of another kind.
    """

    epochs: int = 20
    batch: int = 64
    loss: str = "cross_entropy"
    optimizer: str = "sgd"
    lr: float = 0.05
    lr_all: float | None = None
    head_lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 1.0
    decay: float = 0.1
    decay_every: int = 20
    power: float = 0.9
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
        expect_choice(self, CHOICES)
        expect(self, ">= 1", "epochs", "batch", "decay_every")
        expect(self, "> 0", "lr", "lr_all", "head_lr", "decay", "power")
        expect(self, ">= 0", "warmup", "weight_decay", "momentum")
        expect(self, "in [0, 1)", "label_smoothing")
        if not 0 <= self.freeze_epochs <= self.epochs:
            raise ValueError(
                f"expected freeze_epochs in 0..epochs, got freeze_epochs={self.freeze_epochs} of epochs={self.epochs}; "
                "change both"
            )
        if self.freeze_epochs == 0 and (self.freeze or self.lr_all is not None):
            raise ValueError("freeze and lr_all need freeze_epochs >= 1: the epochs of the first stage")
        if self.loss == "soft_margin" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} softens one label an image, and soft_margin has several; use "
                "label_smoothing=0, or loss='cross_entropy'"
            )


CHOICES: Mapping[str, Sequence[str]] = {
    "loss": ("cross_entropy", "soft_margin"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "step", "constant", "poly"),
}

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


TRAINING = "training a classifier"


class ClassifierTrainer:
    """A `Trainer`: a loss of the classifier's logits, one optimizer, parameters that were frozen stay so."""

    def __init__(self, classifier: Classifier, config: ClassifierConfig) -> None:
        model = classifier.model
        self.classifier, self.config, self.regularizer = classifier, config, regularizer(config.regularizer)
        self.learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.kept = frozen_names(model, config.freeze) if config.freeze_epochs else frozenset[str]()
        self.head = head_name(model) if config.head_lr != 1 else ""
        self.steps, self.done = 1, 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration and the network's shapes."""
        return {**asdict(self.config), "model": fingerprint(self.classifier.model)}

    def setup(self, fabric: "Fabric") -> None:
        """Move the network to its device and make the optimizer, with the head in a group of its own where asked."""
        c, self.fabric = self.config, fabric
        self.network = synchronize(fabric, fabric.to_device(self.classifier.model))
        named: list[tuple[str, Tensor]] = [*self.network.named_parameters()]
        head, rest = ([p for name, p in named if below(name, self.head) is inside] for inside in (True, False))
        groups = [{"params": rest, "factor": 1.0}, {"params": head, "factor": c.head_lr}]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, c.lr, c.momentum, weight_decay=c.weight_decay)
            if c.optimizer == "sgd"
            else torch.optim.AdamW(groups, c.lr, weight_decay=c.weight_decay)
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
        """Take one optimizer step; return loss and accuracy of the batch.

        The accuracy is the share of images that are right, with "soft_margin" that of decisions s_c > 0, one for each
        image and class.
        """
        x, several = self.classifier.normalize(batch.x), self.config.loss == "soft_margin"
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.config, self.done, self.steps)
        part = Part(self.fabric.global_rank, self.fabric.world_size)
        own = torch.arange(len(x))  # what is mixed is whose labels an image learns
        with self.regularizer(self.classifier, x, own, part=part) as (seen, learned), self.fabric.autocast():
            logits = read_logits(self.network(seen)).to(x.dtype)
        two = logits.shape[1] == 1 and not several
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if two else logits
        truth = multi_hot(batch, logits, TRAINING) if several else check_labels(logits, labels(batch, TRAINING))
        smoothed = partial(F.cross_entropy, label_smoothing=self.config.label_smoothing)
        loss_of, share_right = (soft_margin, decisions) if several else (smoothed, hits)
        loss = weighted(learned, lambda whose: loss_of(logits, truth[whose]))
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        update(self.optimizer, learning, gradients(self.fabric, loss, learning, share))
        self.done += 1
        return {"loss": loss.detach(), "accuracy": weighted(learned, lambda whose: share_right(logits, truth[whose]))}

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
        raise ValueError(unlabeled(missing[0], what))
    return batch.y


def unlabeled(image: str, what: str) -> str:
    """Say that an image has no label, and what needs one."""
    return f"{what} needs a label for every image; {image!r} has none"


def multi_hot(batch: Batch, logits: Logits, what: str) -> Int[Tensor, "b k"]:
    """Return which classes each image of a batch shows, 1 or 0: its `labels`, or its label alone where it has none.

    On the logits' device; `what` needs them.

    Raises:
        ValueError: an image with neither, `labels` that are not a 0 or 1 for each class, a label that is no class, or a
            single logit.
    """
    if logits.shape[1] == 1:
        raise ValueError(
            f"{what} on several labels an image needs an output for each class, and the network has a single one; use "
            "loss='cross_entropy', or give it two outputs"
        )
    return torch.stack([shown(sample, logits, what) for sample in batch.samples])


def shown(sample: Sample, logits: Logits, what: str) -> Int[Tensor, " k"]:
    """Return which classes a sample shows.

    Raises:
        ValueError: see `multi_hot`.
    """
    classes = logits.shape[1]
    if sample.labels is None and sample.label is None:
        raise ValueError(unlabeled(sample.id, what))
    if sample.labels is None:
        return F.one_hot(check_labels(logits[:1], sample.label), classes)[0]
    if sample.labels.shape != (classes,) or not set(sample.labels.tolist()) <= {0, 1}:
        raise ValueError(
            f"expected the labels of {sample.id!r} to be 0 or 1 for each of the network's {classes} classes, got "
            f"{sample.labels.tolist()}"
        )
    return sample.labels.to(logits.device, torch.long)


def soft_margin(logits: Logits, shown: Int[Tensor, "b k"]) -> Tensor:
    """Return the mean over images and classes of -[y log sigma(s) + (1 - y) log sigma(-s)]."""
    return F.multilabel_soft_margin_loss(logits, shown.to(logits))


def hits(logits: Logits, y: Labels) -> Tensor:
    """Return the share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == y).float().mean()


def decisions(logits: Logits, shown: Int[Tensor, "b k"]) -> Tensor:
    """Return the share of images and classes where s > 0 says rightly whether the image shows the class."""
    return ((logits > 0) == (shown > 0)).float().mean()


def learning_rate(config: ClassifierConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) with `steps` steps an epoch.

    Each stage of N steps starts anew: a warm-up of W steps at (n + 1) / W, then 1 ("constant"),
    (1 + cos(pi (n - W) / (N - W))) / 2 ("cosine"), (1 - (n - W) / (N - W))^power ("poly") or
    decay^floor(n / (decay_every * steps)) ("step"), times the peak, `lr` or `lr_all`. The head's is `head_lr` times it.
    """
    first = config.freeze_epochs * steps
    peak = config.lr if step < first or config.lr_all is None else config.lr_all
    n, total = (step, first) if step < first else (step - first, config.epochs * steps - first)
    warm = min(round(config.warmup * steps), total)
    if n < warm:
        return peak * (n + 1) / warm
    if config.schedule == "poly":
        return float(peak * (1 - (n - warm) / (total - warm)) ** config.power)
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


def mean_average_precision(classifier: Classifier, dataset: Indexed[Sample], *, batch: int = 64) -> float:
    """Return the mean over classes of the average precision of the classifier's logits, in [0, 1].

    The classes are those that at least one of the images shows, by its `labels`, or by its label where it has none; see
    `average_precision`. Class 0 of a network with a single output has the same logit, 0, for all images.

    Raises:
        ValueError: no image, none that shows a class, one without labels, or with labels that the network lacks.
    """
    if len(dataset) == 0:
        raise ValueError("mean average precision needs at least one image, got none")
    scores, truths = [], []
    for part in batches(dataset, batch):
        with torch.no_grad():
            logits = classifier(part.x.to(classifier.device)).cpu()
        scores.append(logits)
        truths.append(multi_hot(part, logits, "mean average precision") > 0)
    s, y = torch.cat(scores), torch.cat(truths)
    found = [average_precision(s[:, c], y[:, c]) for c in y.any(0).nonzero().flatten().tolist()]
    if not found:
        raise ValueError(f"mean average precision needs an image that shows a class; none of {len(dataset)} does")
    return sum(found) / len(found)


def average_precision(scores: Values, positive: Bool[Tensor, " b"]) -> float:
    """Return the mean, over the positives P, of the precision at the score of each, in (0, 1].

    AP = 1/|P| sum_{n in P} |{m in P: s_m >= s_n}| / |{m: s_m >= s_n}|, without interpolation: what VOC counts since
    2010, but for its envelope of the curve. Equal scores are one place in the ranking, the last one of them, so the
    order of the images does not matter, and a constant score has the share of positives.

    Raises:
        ValueError: no positive.
    """
    if not positive.any():
        raise ValueError(f"average precision needs at least one positive, got none among {len(scores)} scores")
    at = scores[positive]
    above, right = (len(some) - torch.searchsorted(some.sort().values, at) for some in (scores, at))
    return float((right.double() / above).mean())


def fingerprint(model: nn.Module) -> str:
    """Return a network's class and a digest of the names and shapes of its state."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return f"{type(model).__name__} {hashlib.blake2b(repr(shapes).encode(), digest_size=4).hexdigest()}"


def augmentation(names: str) -> Augment | None:
    """Return the augmentation of a configuration: "none", or names joined by "+", each with settings where wanted.

    Raises:
        LookupError: an unknown name or setting, with near ones.
        TypeError, ValueError: a setting of a wrong kind, or out of range.
    """
    if names == "none":
        return None
    chosen = tuple(names.split("+"))
    for name in chosen:
        augmenter(name)
    return partial(augmented, names=chosen)


def augmented(image: Tensor, randomness: torch.Generator, *, names: tuple[str, ...]) -> Tensor:
    """Apply augmentations in order."""
    for name in names:
        image = augmenter(name)(image, randomness)
    return image


@cache
def augmenter(text: str) -> Augment:
    """Return one augmentation with its settings: "flip", "binary_mask?keep=0.8", ....

    One with settings is tried on a black image: a number out of range is an error now, not at the first image.

    Raises:
        LookupError, TypeError, ValueError: see `augmentation`.
    """
    choice = Choice.parse(text)
    chosen = configured(AUGMENTATIONS, choice.name, choice.settings, "augmentation")
    if choice.settings:
        chosen(torch.zeros(3, 8, 8), torch.Generator())
    return chosen


def flip(image: Tensor, randomness: torch.Generator, /) -> Tensor:
    """Mirror left and right for half of the images."""
    return image.flip(-1) if draw(randomness, 0.0, 1.0) < 0.5 else image


def crop(image: Tensor, randomness: torch.Generator, /) -> Tensor:
    """Pad by an eighth of each side, by reflection, and crop back to the size at a random place."""
    h, w = image.shape[-2:]
    padded = F.pad(image[None], (w // 8, w // 8, h // 8, h // 8), mode="reflect")[0]
    top, left = (int(draw(randomness, 0.0, 2.0 * (side // 8) + 1)) for side in (h, w))
    return padded[:, top : top + h, left : left + w]


def zoom(image: Tensor, randomness: torch.Generator, /, *, smallest: float = 0.35) -> Tensor:
    """Crop `smallest` to 1 of the area at an aspect of 3/4 to 4/3, and resize to the old size (bilinear, antialiased).

    The aspect is relative to the image's own; a side that would exceed the image is cut to it.

    Raises:
        ValueError: `smallest` outside (0, 1].
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"zoom: expected smallest in (0, 1], a share of the area, got smallest={smallest}")
    h, w = image.shape[-2:]
    area, aspect = draw(randomness, smallest, 1.0), math.exp(draw(randomness, math.log(3 / 4), math.log(4 / 3)))
    height = max(1, min(h, round(h * (area / aspect) ** 0.5)))
    width = max(1, min(w, round(w * (area * aspect) ** 0.5)))
    top, left = int(draw(randomness, 0.0, h - height + 1.0)), int(draw(randomness, 0.0, w - width + 1.0))
    part = image[None, :, top : top + height, left : left + width]
    return F.interpolate(part, size=(h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)


def resized_crop(image: Tensor, randomness: torch.Generator, /) -> Tensor:
    """Zoom into .08 to 1 of the area: torchvision's RandomResizedCrop, but for sides that exceed the image."""
    return zoom(image, randomness, smallest=0.08)


def rescale(image: Tensor, randomness: torch.Generator, /, *, low: float = 0.625, high: float = 1.25) -> Tensor:
    """Resize by a factor of `low` to `high` (bilinear, antialiased), and crop back to the size at a random place.

    Where it has become smaller, it lies at a random place on its mean color. IRN (Ahn et al., CVPR 2019): the longer
    side becomes 320 to 640 pixels, and 512 x 512 of them are cropped. *Differs:* in shares of the image's side, so the
    crop has the image's aspect; bilinear for bicubic; the image's own mean color for the data set's.

    Raises:
        ValueError: not 0 < low <= high.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"rescale: expected factors 0 < low <= high, got low={low}, high={high}")
    (h, w), factor = image.shape[-2:], draw(randomness, low, high)
    height, width = (max(1, round(factor * side)) for side in (h, w))
    part = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
    rooms = h - height, w - width
    top, left = (min(0, room) + int(draw(randomness, 0.0, abs(room) + 1.0)) for room in rooms)
    canvas = image.mean((1, 2), keepdim=True).repeat(1, h, w)
    inside = part[:, max(0, -top) : h - top, max(0, -left) : w - left]
    canvas[:, max(0, top) : top + height, max(0, left) : left + width] = inside
    return canvas.clamp(0, 1)


def jitter(image: Tensor, randomness: torch.Generator, /) -> Tensor:
    """Scale brightness, contrast and saturation, each by .8 to 1.2, in this order; clamp to [0, 1]."""
    brightness, contrast, saturation = (draw(randomness, 0.8, 1.2) for _ in range(3))
    image = image * brightness
    image = image.mean() + contrast * (image - image.mean())
    gray = image.mean(0, keepdim=True)
    return (gray + saturation * (image - gray)).clamp(0, 1)


def left_half(image: Tensor, randomness: torch.Generator, /) -> Tensor:
    """Replace the right half by uniform noise: whoever learns so looks at the left one (CASM's two copies)."""
    half = image.shape[-1] // 2
    return torch.cat([image[..., :half], torch.rand(image[..., half:].shape, generator=randomness).to(image)], -1)


def binary_mask(image: Tensor, randomness: torch.Generator, /, *, keep: float = 0.9) -> Tensor:
    """Return I * m with m ~ Bernoulli(keep) for each pixel, all colors together: "model-pert-binary" of Maruf et al.

    Raises:
        ValueError: `keep` outside [0, 1].
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"binary_mask: expected keep in [0, 1], the probability of a pixel to stay, got keep={keep}")
    return image * (torch.rand(image.shape[-2:], generator=randomness) < keep).to(image)


def gaussian_noise(image: Tensor, randomness: torch.Generator, /, *, noise: float = 0.15) -> Tensor:
    """Return I + eps with eps ~ N(0, noise^2) for each value, not clamped: "model-pert-gaussian" of Maruf et al.

    Raises:
        ValueError: negative noise.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"gaussian_noise: expected noise >= 0, a share of the range [0, 1], got noise={noise}")
    return image + noise * torch.randn(image.shape, generator=randomness).to(image)


def draw(randomness: torch.Generator, low: float, high: float) -> float:
    """Return a uniform number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=randomness, dtype=torch.float64))


AUGMENTATIONS: Mapping[str, Augment] = {
    "flip": flip,
    "crop": crop,
    "zoom": zoom,
    "resized_crop": resized_crop,
    "rescale": rescale,
    "jitter": jitter,
    "left_half": left_half,
    "binary_mask": binary_mask,
    "gaussian_noise": gaussian_noise,
}

IRN = ClassifierConfig(
    epochs=5,
    batch=16,
    loss="soft_margin",
    lr=0.1,
    head_lr=10.0,
    momentum=0.0,
    weight_decay=1e-4,
    schedule="poly",
    warmup=0.0,
    freeze=("conv1", "bn1"),
    freeze_epochs=5,
    augment="rescale+flip",
)
"""As IRN (Ahn et al., Weakly supervised learning of instance segmentation with inter-pixel relations, CVPR 2019) trains
the classifier of its CAMs, for a pretrained ResNet; with other `epochs` give as many `freeze_epochs`. Its program hands
the weight decay to SGD in the momentum's place, so it trains without momentum, and so does this.

*Differs:* its program also cuts the gradient behind layer2 and holds all batch norms at their statistics;
`replace(IRN, freeze=("conv1", "bn1", "layer1", "layer2"))` does the former. See `rescale`; the last batch counts here.
"""
