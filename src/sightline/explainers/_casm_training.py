"""Training CASM. Zolna, Geras, Cho: Classifier-agnostic saliency map extraction. CVIU 2020, algorithm 1.

The mapping m confuses classifiers drawn from a history, and the classifier f goes on learning on clean and masked-out
images: so m must find all that any classifier could use. After the authors' program; what differs is said where.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.classifier import Classifier, check_labels
from sightline.classifier_training import augmentation, expect, expect_choice, fingerprint, hits, labels
from sightline.data import Batch, Indexed, Sample
from sightline.erase import mix, resolve
from sightline.explainers._casm import Casm, Objective, classifier_loss, mapping_loss, predict, read
from sightline.explainers._taps import Taps
from sightline.processes import PRECISIONS
from sightline.training import Metrics, Progress, averaged, fit, gradients, synchronize, update
from sightline.types import Images, Logits

if TYPE_CHECKING:
    from lightning_fabric import Fabric

State: TypeAlias = Mapping[str, Tensor]

LAMBDAS: Mapping[str, Mapping[str, float]] = {
    "F": {"entropy": 2.5, "classification": 9.0},
    "L": {"entropy": 14.0, "classification": 18.0},
    "FL": {"entropy": 7.5, "classification": 11.0},
    "L100": {"entropy": 10.0, "classification": 17.0},
}
"""The program's regularization coefficient by thinning and score; L1000, and any other period, has that of L100."""

GAIN = 0.1
"""How fast lambda follows the area: its logarithm grows by GAIN times the error, step by step."""

REACH = 100.0
"""How many times its start value, up or down, lambda may become."""


@dataclass(frozen=True)
class CasmConfig:
    """How a CASM is trained.

    `thinning` says which classifiers the mapping meets (section 2.3): "F" the given one alone, which never learns (the
    classifier-dependent baseline), "L" the current one alone, "FL" the given and the current one, "L100" the current
    one and what it was every 100th step (any period), of which `cap` are kept. The current one is drawn with
    probability `draw`, else one of the past.

    `lam` weighs the area of masks against `score`; None takes the program's value for ImageNet (`LAMBDAS`). With `area`
    given, lambda starts there and follows the masks' mean area to this value (ours).

    "shared" lets the classifier be the encoder, "separate" trains a second copy of it with the decoder. "joint" takes
    one step of the classifier, on the mean of clean and masked loss where it was drawn, on the clean loss where one of
    the past was; "sequential" takes the program's two: on the clean images, then, if it was drawn, as it now is, on the
    masked-out ones. `erase` is the name of what fills them: "mean" is 0 in normalized space, "noise" one and the same
    noise for all images of all steps.

    Epochs are a random `fraction` of the images; both rates fall by `decay` every `decay_every` epochs; the joint norm
    of the mapping's gradient is cut to `clip`; `weight_decay` is for both optimizers.

    *Differs:* the defaults take the paper's one step of the classifier, and crops of .35 to 1 of the area. `CASM_CODE`
    is the program's training, `CASM_PAPER` that of the paper's text.

    Raises:
        ValueError: numbers out of range, or an unknown choice.
        LookupError: an unknown eraser or augmentation.
    """

    epochs: int = 60
    batch: int = 128
    fraction: float = 0.2
    thinning: str = "L100"
    cap: int = 30
    draw: float = 0.5
    score: Objective = "entropy"
    encoder: Literal["shared", "separate"] = "shared"
    taps: Taps = "code"
    lam: float | None = None
    area: float | None = None
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_mapping: float = 1e-3
    decay: float = 0.1
    decay_every: int = 20
    clip: float = 10.0
    erase: str = "mean"
    update: Literal["joint", "sequential"] = "joint"
    augment: str = "zoom+flip"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        augmentation(self.augment)
        resolve(self.erase, (0.0,))
        expect_choice(self, CHOICES)
        if self.thinning not in LAMBDAS and not re.fullmatch("L[1-9][0-9]*", self.thinning):
            raise ValueError(
                f"expected thinning F, L, FL or L with a period of steps, such as L100, got {self.thinning!r}"
            )
        expect(self, ">= 1", "epochs", "batch", "cap", "decay_every")
        expect(self, "> 0", "lr", "lr_mapping", "clip", "decay")
        expect(self, ">= 0", "momentum", "weight_decay", "lam")
        expect(self, "in (0, 1]", "fraction")
        expect(self, "in [0, 1]", "draw")
        expect(self, "in (0, 1)", "area")
        if self.lam == 0 and self.area is not None:
            raise ValueError(f"expected lam > 0 where area is given, got lam={self.lam}, area={self.area}")

    @property
    def start(self) -> float:
        """The lambda of the first step: `lam`, or the program's."""
        return LAMBDAS.get(self.thinning, LAMBDAS["L100"])[self.score] if self.lam is None else self.lam


CHOICES: Mapping[str, Sequence[str]] = {
    "score": ("entropy", "classification"),
    "encoder": ("shared", "separate"),
    "taps": ("code", "paper"),
    "update": ("joint", "sequential"),
    "precision": tuple(PRECISIONS),
}

CASM_CODE = CasmConfig(update="sequential", augment="resized_crop+flip")
"""As the authors' program trains, which made the paper's numbers; what still differs is said at `kept`."""

CASM_PAPER = CasmConfig(epochs=70, decay=1.0, taps="paper", augment="resized_crop+flip")
"""As the paper's text has it: 70 epochs at constant rates, one step of the classifier on both losses (equation 8), and
taps before each downscaling. Where it is silent (batch, augmentation, clipping, lambda), as the program."""


def train_casm(
    classifier: Classifier,
    dataset: Indexed[Sample],
    config: CasmConfig,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    every: int = 200,
    resume: bool = True,
    report: Callable[[Progress], None] | None = None,
    accelerator: str = "auto",
) -> tuple[Casm, tuple[Metrics, ...]]:
    """Train a saliency mapping against a classifier with `fit`; return it, and the mean metrics of each epoch.

    The given network is copied and stays as it is. The mapping is in evaluation mode, on the device of its training.

    Raises:
        UnsuitedError: the network has fewer than two spatial scales.
        ValueError, FloatingPointError: as `fit`; a sample without a label, or with one that the network lacks.
    """
    trainer = CasmTrainer(classifier, config, seed=seed)
    history = fit(
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
        fraction=config.fraction,
    )
    return trainer.casm.requires_grad_(True).eval(), history


class History:
    """Classifiers of the past: copies of their states on the CPU, `cap` at most.

    What is drawn comes from torch's default generator on the CPU.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.states: list[State] = []

    def keep(self, model: nn.Module, fabric: "Fabric | None" = None) -> None:
        """Copy the network's state; where `cap` are kept, it takes the place of a random one.

        Of a fabric's processes all keep the first one's running statistics, which on the CPU are each process's own: so
        all meet the same classifiers of the past, which are those of a checkpoint.
        """
        state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        if fabric is not None:
            state |= fabric.broadcast({name: state[name] for name, _ in model.named_buffers() if name in state})
        if len(self.states) < self.cap:
            self.states.append(state)
        else:
            self.states[int(torch.randint(self.cap, (), device="cpu"))] = state

    def draw(self, current: float) -> State | None:
        """Return None, for the current classifier, with probability `current`, else one of the past, all alike."""
        if not self.states or float(torch.rand((), device="cpu")) < current:
            return None
        return self.states[int(torch.randint(len(self.states), (), device="cpu"))]


def kept(thinning: str, step: int) -> bool:
    """Say whether the classifier is kept before step `step`, counted from 0 over the whole run.

    *Differs:* the program keeps it after the clean half of a step, and counts within an epoch; so its "FL" has the
    classifier after one step where the paper's has the given one, f0.
    """
    return thinning not in ("F", "L") and (step == 0 if thinning == "FL" else step % int(thinning[1:]) == 0)


class CasmTrainer:
    """A `Trainer`: the mapping against a classifier drawn from a history, the classifier against the mapping.

    One step k, after equations (5) to (8): keep f where the thinning says so; draw f' (the current f in training mode,
    one of the past in evaluation mode); m = decoder(features of f, detached); loss_m from f'((1 - m) x) gives the
    decoder's gradient; only when both gradients are known do f and m take their steps. One forward pass of f' serves
    both. `classifier` (f) and `casm` (m, whose encoder is f where it is shared) are copies of what was given.
    """

    def __init__(self, classifier: Classifier, config: CasmConfig, *, seed: int = 0) -> None:
        self.config, self.learns = config, config.thinning != "F"
        self.classifier = copy.deepcopy(classifier)
        encoder = self.classifier if config.encoder == "shared" else copy.deepcopy(classifier)
        self.casm = Casm(encoder, taps=config.taps, seed=seed)
        self.past = replace(classifier, model=copy.deepcopy(classifier.model).requires_grad_(False))
        self.erase = resolve(config.erase, classifier.mean)
        self.history, self.lam, self.done = History(config.cap), config.start, 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration and the shapes of both networks."""
        shapes = {"model": fingerprint(self.classifier.model), "decoder": fingerprint(self.casm.decoder)}
        return {**asdict(self.config), "explainer": "casm", **shapes}

    def setup(self, fabric: "Fabric") -> None:
        """Move the networks to their device and make both optimizers."""
        c, self.fabric = self.config, fabric
        for module in (self.classifier.model, self.casm, self.past.model):
            fabric.to_device(synchronize(fabric, module))
        shared = c.encoder == "shared"
        self.mapping = list((self.casm.decoder if shared else self.casm.requires_grad_(True)).parameters())
        self.weights = list(self.classifier.model.requires_grad_(self.learns).parameters())
        self.descent = torch.optim.SGD(self.weights, c.lr, c.momentum, weight_decay=c.weight_decay)
        self.ascent = torch.optim.Adam(self.mapping, c.lr_mapping, weight_decay=c.weight_decay)

    def epoch(self, number: int, steps: int) -> None:
        """Set modes (training, but for what is fixed) and both learning rates."""
        self.casm.train()
        self.classifier.model.train(self.learns)
        self.past.model.eval()
        fall = self.config.decay ** (number // self.config.decay_every)
        for optimizer, rate in ((self.descent, self.config.lr), (self.ascent, self.config.lr_mapping)):
            for group in optimizer.param_groups:
                group["lr"] = rate * fall

    def step(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Take one step of the mapping and, unless it is fixed, of the classifier; return the metrics."""
        x, judge = batch.x, self.drawn()
        current, sequential = judge is self.classifier, self.config.update == "sequential"
        with self.fabric.autocast():
            features, logits = self.look(x)
            m = self.casm.decode(features, x)
        y = check_labels(logits, labels(batch, "training CASM"))
        if sequential:
            self.learn(classifier_loss(logits, None, y), share)
        with self.fabric.autocast():
            masked = predict(judge, mix(x, 1 - m, self.erase))
        loss_m = mapping_loss(logits, masked, y, m=m, lam=self.lam, score=self.config.score)
        loss_f = classifier_loss(logits, masked if current else None, y)
        G = gradients(self.fabric, loss_m, self.mapping, share, retain=self.learns and current)
        if not sequential:
            self.learn(loss_f, share)
        elif current:
            self.learn(F.cross_entropy(masked, y), share)
        update(self.ascent, self.mapping, G, clip=self.config.clip)
        lam = self.follow(averaged(self.fabric, m.mean(), share))
        self.done += 1
        return {
            "loss": (loss_f if self.learns else loss_m).detach(),
            "mapping_loss": loss_m.detach(),
            "area": m.detach().mean(),
            "accuracy": hits(logits, y),
            "accuracy_masked": hits(masked, y),
            "lambda": torch.tensor(lam, dtype=torch.float64),
            "history": torch.tensor(float(len(self.history.states))),
        }

    def drawn(self) -> Classifier:
        """Keep the classifier where the thinning says so, and return the one that the mapping meets now."""
        if kept(self.config.thinning, self.done):
            self.history.keep(self.classifier.model, self.fabric)
        state = self.history.draw(self.config.draw)
        if state is None:
            return self.classifier
        self.past.model.load_state_dict(state)
        return self.past

    def look(self, x: Images) -> tuple[list[Tensor], Logits]:
        """Return the features for the decoder, cut off from the classifier, and the classifier's logits."""
        if self.config.encoder == "separate":
            return read(self.casm.classifier, self.casm.taps, x)[0], predict(self.classifier, x)
        features, logits = read(self.classifier, self.casm.taps, x)
        return [A.detach() for A in features], logits

    def learn(self, loss: Tensor, share: float) -> None:
        """Take one step of the classifier, unless it is fixed; the mapping's graph stays."""
        if self.learns:
            update(self.descent, self.weights, gradients(self.fabric, loss, self.weights, share))

    def follow(self, area: Tensor) -> float:
        """Return this step's lambda; raise it where masks are larger than asked for, lower it where they are smaller.

        log lambda <- log lambda + GAIN (area - asked), within a factor `REACH` of its start.
        """
        lam, start, asked = self.lam, self.config.start, self.config.area
        if asked is not None:
            self.lam = min(max(lam * math.exp(GAIN * (float(area) - asked)), start / REACH), start * REACH)
        return lam

    def state_dict(self) -> dict[str, Any]:
        """Return copies; what the history holds never changes and is its own copy."""
        live = {
            "classifier": dict(self.classifier.model.state_dict()),
            "casm": dict(self.casm.state_dict()),
            "descent": self.descent.state_dict(),
            "ascent": self.ascent.state_dict(),
        }
        return {**copy.deepcopy(live), "history": [*self.history.states], "lambda": self.lam, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over networks, optimizers, the history, lambda and the number of steps done."""
        self.classifier.model.load_state_dict(state["classifier"])
        self.casm.load_state_dict(state["casm"])
        self.descent.load_state_dict(state["descent"])
        self.ascent.load_state_dict(state["ascent"])
        self.history.states = [*state["history"]]
        self.lam, self.done = float(state["lambda"]), int(state["done"])
