"""Training a segmenter. Cross entropy of every pixel, on full masks or on the pseudo labels of any method.

The last stage of weakly supervised segmentation, as in IRN (Ahn, Cho and Kwak, CVPR 2019), which trains a DeepLab on
its pseudo labels; the falling rate is DeepLab's (Chen et al., TPAMI 2018).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sightline.backgrounds import IGNORE
from sightline.classifier import Classifier
from sightline.classifier_training import AUGMENTATIONS, augmentation, expect, expect_choice, fingerprint, flags_back
from sightline.data import Batch, Indexed, Sample, layers
from sightline.explainers._segmenter import segmenter_of
from sightline.interchange import MEANING, placed_labels, read_labels, read_names
from sightline.processes import PRECISIONS
from sightline.registry import unknown
from sightline.training import Joint, Metrics, Progress, fit, gradients, remember, synchronize, update

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MOVING = ("flip", "crop", "zoom", "resized_crop")
"""The augmentations that only move pixels: no pixel is new."""

COLORING = ("jitter", "left_half", "binary_mask", "gaussian_noise")
"""Those that change colors alone."""


@dataclass(frozen=True)
class SegmenterConfig:
    """How a segmenter is trained.

    `labels` is a folder of pseudo labels in place of the data set's own masks (see `Pseudo`). The rate of step n of N,
    after a warm-up of `warmup` epochs that rises evenly, falls by (1 - n / N)^power ("poly"), by half a "cosine", or
    stays ("constant"). `augment` is "none" or names in `MOVING` and `COLORING` joined by "+", applied in that order;
    image and mask move together. `momentum` is that of "sgd".

    *Differs:* the defaults are ours, for small networks from random weights: IRN's DeepLab takes SGD.

    Raises:
        ValueError: numbers out of range, an unknown choice, or an augmentation that no mask can follow.
        LookupError: an unknown augmentation.
    """

    epochs: int = 30
    batch: int = 16
    labels: str | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    warmup: float = 0.0
    augment: str = "flip+zoom"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        joint(self.augment)
        expect_choice(self, CHOICES)
        expect(self, ">= 1", "epochs", "batch")
        expect(self, "> 0", "lr", "power")
        expect(self, ">= 0", "momentum", "weight_decay", "warmup")


CHOICES: Mapping[str, Sequence[str]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("poly", "cosine", "constant"),
    "precision": tuple(PRECISIONS),
}


def train_segmenter(
    classifier: Classifier,
    dataset: Indexed[Sample],
    config: SegmenterConfig,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    every: int = 200,
    resume: bool = True,
    report: Callable[[Progress], None] | None = None,
    accelerator: str = "auto",
) -> tuple[Metrics, ...]:
    """Train a segmenter in place with `fit`; return mean loss and pixel accuracy of each epoch, on what it saw.

    Masks hold class + 1, 0 is the background, 255 is ignored. Where there are pseudo labels (`Pseudo`) give it
    samples as they are read, which know how large the original pictures were: it remembers them itself. The network is
    left in evaluation mode.

    Raises:
        UnsuitedError: the classifier's network is no segmenter.
        ValueError, FloatingPointError: as `fit`; a sample without a mask, with one of another size than its image, or
            with a class that the network lacks; pseudo labels that `Pseudo` refuses.
        FileNotFoundError: no folder of pseudo labels, or none for an image.
    """
    trainer, samples = SegmenterTrainer(classifier, config), dataset
    if config.labels is not None:
        samples = remember(Pseudo(dataset, Path(config.labels), classifier.classes), masks=True)
    with flags_back(classifier.model):
        return fit(
            trainer,
            samples,
            epochs=config.epochs,
            batch=config.batch,
            seed=seed,
            out=out,
            every=every,
            augment=joint(config.augment),
            resume=resume,
            report=report,
            precision=config.precision,
            accelerator=accelerator,
        )


@dataclass(frozen=True)
class Pseudo:
    """A data set whose masks are label maps in a folder: `root/ID.png`, or `root/labels/ID.png` where there is one.

    The id may leave out its own ending. A label map of the image's size is taken as it is; one of the original
    picture's size (`Sample.size`) goes where the data set's resize policy brings the picture, by the nearest pixel.
    Classes meet by their names, where the folder's `segment.json` has names and `classes` are not empty: they are those
    of the segmenter. Without names on one side the numbers are the segmenter's. Other geometry is left out. Put
    `remember` around it.

    Raises:
        FileNotFoundError: no such folder; for an item: no label map of it.
        ValueError: a `segment.json` that cannot be read; for an item: a file that holds no labels, labels of neither
            size, or a class that `classes` do not have, or that has the name of another one.
    """

    samples: Indexed[Sample]
    root: Path
    classes: tuple[str, ...] = ()
    folder: Path = field(init=False)
    names: tuple[str, ...] = field(init=False)
    """What the values of the label maps mean; () where they are the segmenter's, or nobody knows."""
    policy: str = field(init=False)
    """How the data set resizes."""

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}; expected one of label maps: sightline segment")
        inner = self.root / "labels"
        object.__setattr__(self, "folder", inner if inner.is_dir() else self.root)
        names = read_names(self.root)
        known = bool(self.classes and names[1:]) and names[1:] != self.classes
        object.__setattr__(self, "names", names if known else ())
        policies = (getattr(layer, "resize", None) for layer in layers(self.samples))
        object.__setattr__(self, "policy", next((one for one in policies if isinstance(one, str)), "direct"))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        """Read one image and its label map."""
        sample = self.samples[index]
        file = self.file(sample.id)
        mask = self.placed(self.numbered(read_labels(file), file), sample, file)
        return Sample(sample.id, sample.image, sample.label, sample.labels, mask=mask)

    def numbered(self, labels: Int[Tensor, "h w"], file: Path) -> Int[Tensor, "h w"]:
        """Return labels in the numbers of the segmenter's classes."""
        if not self.names:
            return labels
        numbers = torch.full((256,), -1)
        numbers[0], numbers[IGNORE] = 0, IGNORE
        for value, name in enumerate(self.names[1:IGNORE], 1):
            if self.classes.count(name) == self.names[1:].count(name) == 1:
                numbers[value] = self.classes.index(name) + 1
        found = numbers[labels]
        if bool((found < 0).any()):
            self.refuse(int(labels[found < 0][0]), file)
        return found

    def refuse(self, value: int, file: Path) -> NoReturn:
        """Say that a value of a label map is no class of the segmenter.

        Raises:
            ValueError: always.
        """
        if value >= len(self.names):
            raise ValueError(f"{file} holds {value}, for which {MEANING} has no name")
        name = self.names[value]
        why = "two classes are called so" if name in self.classes else unknown(name, self.classes, "class")
        raise ValueError(
            f"{file} holds {value}, which {MEANING} calls {name!r}, and the segmenter has no such class: {why}; make "
            "labels with a classifier of the same classes"
        )

    def placed(self, labels: Int[Tensor, "_h _w"], sample: Sample, file: Path) -> Int[Tensor, "h w"]:
        """Return labels where the image is.

        Raises:
            ValueError: they are neither of the image's size nor of the original picture's.
        """
        size, there = (sample.image.shape[1], sample.image.shape[2]), (labels.shape[0], labels.shape[1])
        if there == size:
            return labels
        if there != sample.size:
            raise ValueError(
                f"{file} is {there} pixels, its image {size}, the original picture {sample.size or 'of unknown size'}; "
                "make labels of one of these sizes from the same data: sightline segment"
            )
        return placed_labels(labels, size, self.policy)

    def file(self, name: str) -> Path:
        """Return the label map of an image."""
        paths = dict.fromkeys(self.folder / f"{stem}.png" for stem in (name, PurePath(name).with_suffix("")))
        if found := [path for path in paths if path.exists()]:
            return found[0]
        there = sum(1 for _ in self.folder.rglob("*.png"))
        raise FileNotFoundError(
            f"no label map {' or '.join(map(str, paths))} for image {name!r}: the folder holds {there} for {len(self)} "
            "images; make them with sightline segment from the same data"
        )


def joint(names: str) -> Joint | None:
    """Return the augmentation of a configuration that moves images with their masks: "none", or names joined by "+".

    Raises:
        LookupError: an unknown name.
        ValueError: one that no mask can follow, such as one that fills margins.
    """
    if augmentation(names) is None:
        return None
    chosen = tuple(names.split("+"))
    if others := [name for name in chosen if name not in (*MOVING, *COLORING)]:
        raise ValueError(f"masks cannot follow augment={others[0]}; take some of {', '.join((*MOVING, *COLORING))}")
    return Joint(partial(moved, names=chosen))


def moved(sample: Sample, randomness: torch.Generator, *, names: tuple[str, ...]) -> Sample:
    """Apply augmentations in order to the image, and what moves its pixels to those of the mask, by the nearest.

    Each that moves pixels is applied, with the same randomness, to a picture of the pixels' places too: what comes out
    says from where each pixel came.

    Raises:
        ValueError: no mask, or one of another size than the image.
    """
    image, mask = sample.image, mask_of(sample)
    h, w = mask.shape
    rows, columns = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    places = torch.stack([rows, columns])
    for name in names:
        if name in MOVING:
            again = torch.Generator().set_state(randomness.get_state())
            places = AUGMENTATIONS[name](places, again)
        image = AUGMENTATIONS[name](image, randomness)
    i, j = ((place * (side - 1)).round().long() for place, side in zip(places, (h, w), strict=True))
    return Sample(sample.id, image, sample.label, sample.labels, mask=mask[i, j])


def mask_of(sample: Sample) -> Int[Tensor, "h w"]:
    """Return the mask of a sample.

    Raises:
        ValueError: it has none, or one of another size than its image.
    """
    if sample.mask is None:
        raise ValueError(
            f"training a segmenter needs a mask for every image; {sample.id!r} has none; take data with masks, or "
            "pseudo labels: labels=DIR"
        )
    if sample.mask.shape != sample.image.shape[1:]:
        sizes = tuple(sample.mask.shape), tuple(sample.image.shape[1:])
        raise ValueError(f"the mask of {sample.id!r} is {sizes[0]} pixels, its image {sizes[1]}; resize both")
    return sample.mask.long()


def masks_of(samples: Sequence[Sample], classes: int) -> Int[Tensor, "b h w"]:
    """Return the masks of a batch.

    Raises:
        ValueError: a mask that `mask_of` refuses, or with a class that the network lacks.
    """
    masks = [mask_of(sample) for sample in samples]
    for sample, mask in zip(samples, masks, strict=True):
        wrong = mask[((mask > classes) & (mask != IGNORE)) | (mask < 0)]
        if len(wrong):
            raise ValueError(
                f"the mask of {sample.id!r} holds {int(wrong[0])}; the segmenter has {classes} classes, which are 1 to "
                f"{classes} in a mask, besides 0, the background, and {IGNORE}, which is ignored"
            )
    return torch.stack(masks)


def pixel_loss(logits: Float[Tensor, "b n h w"], masks: Int[Tensor, "b h w"]) -> Tensor:
    """Return the mean over images of each image's mean cross entropy over its pixels that count.

        loss = 1/B sum_i 1/|P_i| sum_{p in P_i} -log p_ip,m_ip        P_i: the pixels of image i that are not ignored

    An image of which none counts adds 0. So every image weighs the same, however much of it is ignored.

    *Differs:* the usual mean over all pixels of the batch; it is no mean over images, and several processes, which
    average over images, would have another one than one process.
    """
    each = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none")
    return over_pixels(each, masks != IGNORE)


def pixel_accuracy(logits: Float[Tensor, "b n h w"], masks: Int[Tensor, "b h w"]) -> Tensor:
    """Return the mean over images of the share of the counting pixels that are right; an image without any adds 0."""
    return over_pixels((logits.argmax(1) == masks).to(logits.dtype), masks != IGNORE)


def over_pixels(values: Float[Tensor, "b h w"], counted: Bool[Tensor, "b h w"]) -> Tensor:
    """Return the mean over images of each image's mean over the pixels that count."""
    sums, counts = (values * counted).sum((1, 2)), counted.sum((1, 2))
    return (sums / counts.clamp(min=1)).mean()


class SegmenterTrainer:
    """A `Trainer`: cross entropy of the pixels, one optimizer."""

    def __init__(self, classifier: Classifier, config: SegmenterConfig) -> None:
        self.classifier, self.config = classifier, config
        self.model = segmenter_of(classifier)
        self.steps, self.done = 1, 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration and the network's shapes."""
        return {**asdict(self.config), "explainer": "segmenter", "model": fingerprint(self.model)}

    def setup(self, fabric: "Fabric") -> None:
        """Move the network to its device and make the optimizer."""
        c, self.fabric = self.config, fabric
        fabric.to_device(synchronize(fabric, self.model))
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.weights, c.lr, c.momentum, weight_decay=c.weight_decay)
            if c.optimizer == "sgd"
            else torch.optim.AdamW(self.weights, c.lr, weight_decay=c.weight_decay)
        )

    def epoch(self, number: int, steps: int) -> None:
        """Set training mode."""
        self.steps = steps
        self.model.train()

    def step(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Take one optimizer step; return loss and pixel accuracy of the batch."""
        x, masks = self.classifier.normalize(batch.x), masks_of(batch.samples, self.model.classes).to(batch.x.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.done, self.steps)
        with self.fabric.autocast():
            logits = self.model.pixels(x).to(x.dtype)
        loss = pixel_loss(logits, masks)
        update(self.optimizer, self.weights, gradients(self.fabric, loss, self.weights, share))
        self.done += 1
        return {"loss": loss.detach(), "pixel_accuracy": pixel_accuracy(logits.detach(), masks)}

    def state_dict(self) -> dict[str, Any]:
        """Return copies."""
        live = {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}
        return {**copy.deepcopy(live), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights, optimizer and the number of steps done."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])


def learning_rate(config: SegmenterConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) with `steps` steps an epoch.

    Of N steps the first W = `warmup` * `steps` rise as (n + 1) / W; then t = (n - W) / (N - W) falls as
    (1 - t)^power ("poly"), (1 + cos(pi t)) / 2 ("cosine"), or not at all.
    """
    total = config.epochs * steps
    warm = min(round(config.warmup * steps), total)
    if step < warm:
        return config.lr * (step + 1) / warm
    t = (step - warm) / (total - warm)
    if config.schedule == "poly":
        return config.lr * math.pow(1 - t, config.power)
    return config.lr * (1 + math.cos(math.pi * t)) / 2 if config.schedule == "cosine" else config.lr
