"""CALM, the training. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021.

The published EM takes theta' = theta, the network of this very step; its gradient is that of the marginal likelihood,
since d log p(y | x) = sum_z p(z | x, y) d log p(y, z | x). An older theta' makes it an EM of its own.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.classifier import Classifier, UnsuitedError, check_labels
from sightline.classifier_training import augmentation, below, expect, fingerprint, flags_back, hits, labels
from sightline.data import Batch, Indexed, Sample
from sightline.explainers._calm import Calm
from sightline.registry import unknown
from sightline.training import Metrics, Progress, fit, gradients, own_randomness, synchronize, update
from sightline.types import Images, Labels

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def ml(log_joint: Float[Tensor, "b k i j"], y: Labels) -> Float[Tensor, ""]:
    """Return the negative log-likelihood, the mean over images of -log sum_z p(y, z | x) (Eq. 3)."""
    return -of_label(log_joint, y).logsumexp((1, 2)).mean()


def em(log_joint: Float[Tensor, "b k i j"], q: Float[Tensor, "b i j"], y: Labels) -> Float[Tensor, ""]:
    """Return the mean over images of -sum_z q_z log p(y, z | x) (Eqs. 5 and 6); q is a `posterior`."""
    return -(q * of_label(log_joint, y)).sum((1, 2)).mean()


def posterior(log_joint: Float[Tensor, "b k i j"], y: Labels) -> Float[Tensor, "b i j"]:
    """Return p(z | x, y) = p(y, z | x) / sum_l p(y, l | x), without gradient (Eq. 18)."""
    joint = of_label(log_joint.detach(), y)
    return (joint - joint.logsumexp((1, 2), keepdim=True)).exp()


def of_label(log_joint: Float[Tensor, "b k i j"], y: Labels) -> Float[Tensor, "b i j"]:
    """Return log p(y, z | x) of each image's label."""
    return log_joint[torch.arange(len(y), device=y.device), y]


OBJECTIVES = "ml", "em"
TEACHERS = "current", "lagged", "ema"


@dataclass(frozen=True)
class CalmConfig:
    """How a CALM network is trained: SGD with Nesterov momentum, `lr` times `decay` every `decay_every` epochs.

    `objective` is "ml" or "em". In "em" the posterior comes from a teacher theta': "current", the network of this step,
    as published (then the gradient is that of "ml"); "lagged", a copy taken every `lag` steps, so `lag` M-steps an
    E-step; or "ema", theta' <- `decay_teacher` theta' + (1 - `decay_teacher`) theta after each step. A teacher runs in
    the network's own mode, on the same batch, and draws (dropout) alike: its age is the only difference. On creatures
    "ml" gave the better maps over three seeds, so it is the default (docs/findings.md).

    Parameters that `slow` names learn at `lr`, all others at `ratio` times that; without names all of the trunk is slow
    but its last stage (`last_stage`). By "prefix" a name is that of a part of the trunk; by "substring" it may stand
    anywhere in the parameter's name, as in the published code, whose `slow=("conv1", "layer1", "layer2", "layer3")`
    finds the first convolution of every block, too. `augment`: see `ClassifierConfig`.

    *Differs:* the published code lets the first batch norm of a ResNet learn fast; here it is slow, as what is around
    it. The paper's rates are 3e-5 (CUB), 5e-5 (OpenImages) and 7e-5 (ImageNet) for backbones that ImageNet
    taught. `lr` here is for one that `ClassifierConfig` taught the same data: what is fast learns at a tenth of its
    rate.

    Raises:
        ValueError: numbers out of range.
        LookupError: an unknown objective, teacher, match or augmentation.
    """

    epochs: int = 40
    batch: int = 64
    objective: str = "ml"
    teacher: str = "lagged"
    lag: int = 100
    decay_teacher: float = 0.99
    lr: float = 5e-4
    ratio: float = 10.0
    slow: tuple[str, ...] = ()
    match: str = "prefix"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: float = 0.1
    decay_every: int = 30
    augment: str = "flip+crop"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        augmentation(self.augment)
        for name, known in (("objective", OBJECTIVES), ("teacher", TEACHERS), ("match", MATCHES)):
            if getattr(self, name) not in known:
                raise LookupError(unknown(str(getattr(self, name)), known, name))
        expect(self, ">= 1", "epochs", "batch", "lag", "decay_every")
        expect(self, "> 0", "lr", "ratio", "decay")
        expect(self, ">= 0", "weight_decay")
        expect(self, "in (0, 1)", "momentum")
        expect(self, "in [0, 1)", "decay_teacher")

    @property
    def remembers(self) -> bool:
        """Whether there is a teacher besides the network."""
        return self.objective == "em" and self.teacher != "current"


MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "prefix": lambda parameter, name: below(parameter.removeprefix("trunk."), name),
    "substring": lambda parameter, name: name in parameter,
}
"""How a name in `slow` finds a parameter."""


def train_calm(
    classifier: Classifier,
    dataset: Indexed[Sample],
    config: CalmConfig,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    every: int = 200,
    resume: bool = True,
    report: Callable[[Progress], None] | None = None,
    accelerator: str = "auto",
) -> tuple[Metrics, ...]:
    """Train a CALM network in place with `fit` and return the means of each epoch, on what it saw.

    `loss` is the objective, `nll` the negative log-likelihood, `spread` the share of the cells that the attention
    covers, e^H(h) / cells: 1 is uniform. The network is left in evaluation mode.

    Raises:
        UnsuitedError: not a CALM network.
        ValueError, FloatingPointError: as `fit`; names in `slow` that find no parameter or all of them, branches
            included; a sample without a label, or with one that the network lacks.
    """
    trainer = CalmTrainer(classifier, config)
    with flags_back(classifier.model):
        return fit(
            trainer,
            dataset,
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


class CalmTrainer:
    """A `Trainer` of a CALM network, and of the teacher where there is one.

    Raises:
        UnsuitedError: not a CALM network.
        ValueError: names in `slow` that find no parameter, or all.
    """

    def __init__(self, classifier: Classifier, config: CalmConfig) -> None:
        self.classifier, self.config, self.model = classifier, config, calm_of(classifier)
        self.slow, self.fast = groups(self.model, config)
        self.done = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration, the network's shapes and the kind of its attention."""
        kind = {"activation": self.model.activation, "detach": self.model.detach}
        return {**asdict(self.config), **kind, "model": fingerprint(self.model)}

    def setup(self, fabric: "Fabric") -> None:
        """Move the network to its device, copy the teacher, make the optimizer."""
        c, self.fabric = self.config, fabric
        synchronize(fabric, fabric.to_device(self.model))
        self.teacher = copy.deepcopy(self.model).requires_grad_(False) if c.remembers else None
        rates = [{"params": self.slow, "lr": c.lr}, {"params": self.fast, "lr": c.ratio * c.lr}]
        self.optimizer = torch.optim.SGD(rates, c.lr, c.momentum, weight_decay=c.weight_decay, nesterov=True)

    def epoch(self, number: int, steps: int) -> None:
        """Set training mode and the epoch's learning rates."""
        c = self.config
        for module in (self.model, self.teacher):
            if module is not None:
                module.train()
        for group, ratio in zip(self.optimizer.param_groups, (1.0, c.ratio), strict=True):
            group["lr"] = c.lr * ratio * c.decay ** (number // c.decay_every)

    def step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """Take one optimizer step and return loss, nll, accuracy and spread; let the teacher follow."""
        x, y = self.classifier.normalize(batch.x), labels(batch, "training CALM")
        with self.fabric.autocast():
            taught = self.taught(x)
            log_joint = self.model.joint(x)
            older = log_joint if taught is None else taught
            y = check_labels(log_joint.detach().logsumexp((2, 3)), y)
            loss = ml(log_joint, y) if self.config.objective == "ml" else em(log_joint, posterior(older, y), y)
        parameters = [*self.slow, *self.fast]
        update(self.optimizer, parameters, gradients(self.fabric, loss, parameters, share))
        self.done += 1
        if self.teacher is not None and self.config.teacher == "ema":
            follow(self.teacher, self.model, self.config.decay_teacher)
        return {"loss": loss.detach(), **seen(log_joint.detach(), y)}

    def taught(self, x: Images) -> Tensor | None:
        """Return the teacher's log p(y, z | x), None without one; the network then draws from the same random state."""
        if self.teacher is None:
            return None
        if self.config.teacher == "lagged" and self.done % self.config.lag == 0:
            self.teacher.load_state_dict(self.model.state_dict())
        with torch.no_grad(), own_randomness(self.fabric.device):
            return self.teacher.joint(x)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the network, the teacher and the optimizer, and the number of steps done."""
        teacher = {} if self.teacher is None else dict(self.teacher.state_dict())
        live = {"model": dict(self.model.state_dict()), "teacher": teacher, "optimizer": self.optimizer.state_dict()}
        return {**copy.deepcopy(live), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])


def calm_of(classifier: Classifier) -> Calm:
    """Return the classifier's network.

    Raises:
        UnsuitedError: not a CALM network.
    """
    if isinstance(classifier.model, Calm):
        return classifier.model
    raise UnsuitedError(
        f"expected a CALM network, got {type(classifier.model).__name__}; make one of it with "
        "sightline.explainers.surgery(classifier)"
    )


def groups(model: Calm, config: CalmConfig) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that learn slowly and those that learn fast, without those that do not learn.

    Raises:
        ValueError: the names in `slow` find no parameter or all of them, branches included; or none learns.
    """
    names, last = [name for name, _ in model.named_parameters()], last_stage(model.trunk, model.layer)
    if config.slow:
        found = {name for name in names if any(MATCHES[config.match](name, one) for one in config.slow)}
    else:
        trunk = {name for name in names if name.startswith("trunk.")}
        found = {name for name in trunk if not any(below(name, f"trunk.{part}") for part in last)}
    if len(found) in (0, len(names)):
        parts = {name.removeprefix("trunk.").partition(".")[0]: None for name in model.trunk.state_dict()}
        raise ValueError(
            f"slow={config.slow} (match={config.match!r}) finds {'every' if found else 'no'} parameter; the parts of "
            f"the trunk are {', '.join(parts)}"
        )
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not learning:
        raise ValueError("no parameter of the network learns; let some with .requires_grad_(True)")
    slow, fast = ([p for name, p in learning.items() if (name in found) is kind] for kind in (True, False))
    return slow, fast


def last_stage(trunk: nn.Module, layer: str, within: str = "") -> list[str]:
    """Return the names of a trunk's last stage and of what follows it, in the order in which the network has them.

    The last stage is the last part with a weight of two or more dimensions (a norm alone is none), up to the part that
    holds the layer. Of a trunk with one such part, it is that part's last stage; a single layer has none. ResNet:
    `layer4`; VGG-GAP and Inception-GAP: the new `conv`; DenseNet: `features.denseblock4`; VGG: the last convolution.
    """
    parts = {f"{within}{name}": module for name, module in trunk.named_children()}
    names = list(parts)
    end = next((n for n, name in enumerate(names) if below(layer, name)), len(names) - 1)
    stages = [name for name in names[: end + 1] if any(weight.ndim > 1 for weight in parts[name].parameters())]
    if not stages:
        return []
    stage = stages[-1]
    inner = [stage] if len(stages) > 1 else last_stage(parts[stage], layer, f"{stage}.")
    return [*inner, *names[names.index(stage) + 1 :]]


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, decay: float) -> None:
    """Set theta' to decay theta' + (1 - decay) theta; running statistics, which no training mode reads, stay."""
    for older, newer in zip(teacher.parameters(), model.parameters(), strict=True):
        older.lerp_(newer, 1 - decay)


def seen(log_joint: Float[Tensor, "b k i j"], y: Labels) -> dict[str, Tensor]:
    """Return what is worth watching: negative log-likelihood, accuracy, spread of the attention."""
    log_h = log_joint.logsumexp(1).flatten(1)
    spread = (-(log_h.exp() * log_h).sum(1)).exp() / log_h.shape[1]
    return {"nll": ml(log_joint, y), "accuracy": hits(log_joint.logsumexp((2, 3)), y), "spread": spread.mean()}
