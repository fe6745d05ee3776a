"""RISE. Petsiuk, Das and Saenko, RISE: randomized input sampling for explanation of black-box models, BMVC 2018."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, check_labels, probability
from sightline.erase import Eraser, mix, resolve
from sightline.maps import resize
from sightline.types import Erase, Images, Labels, Saliency, Score


def rise(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 6000,
    cells: int = 8,
    p: float = 0.1,
    score: Score = probability,
    erase: Eraser = "black",
    seed: int = 0,
    chunk: int = 64,
) -> Saliency:
    """Return the mean of random masks, each weighted by the score of the image behind it.

    S = 1 / (N p) sum_i f(x * M_i) M_i (eq 6) over N = `samples` masks: a grid of `cells` x `cells`, each 1 with
    probability p and 0 otherwise, is enlarged bilinearly to cells + 1 cells of ceil(h / cells) x ceil(w / cells)
    pixels, and the image's window in it starts at a random pixel of the first cell. p and the number of masks are those
    of the official notebooks. Grids and offsets come from `seed`, the same for every image.

    (b, 1, h, w), non-negative where the score is. Costs 1 + `samples` forwards, `chunk` masked images at a time.
    `per_class(rise)` gives every class of one pass. *Differs:* within half a cell of the canvas's edge the outer cells
    are repeated, where the official code mirrors them.

    Raises:
        ValueError: fewer than one mask, cell or masked image at a time, or p outside (0, 1].
    """
    masks = Masks(samples, cells, p, seed, chunk)
    y = classifier.labels(x, y)
    return weighted(classifier, x, y[:, None], masks, score, resolve(erase, classifier.mean))


def rises(
    classifier: Classifier,
    x: Images,
    classes: Int[Tensor, "b n"],
    *,
    samples: int = 6000,
    cells: int = 8,
    p: float = 0.1,
    score: Score = probability,
    erase: Eraser = "black",
    seed: int = 0,
    chunk: int = 64,
) -> Float[Tensor, "b n h w"]:
    """Return RISE's maps of several classes of each image, of the same passes.

    Raises:
        ValueError: as `rise`, or a class that the network does not have.
    """
    masks = Masks(samples, cells, p, seed, chunk)
    with torch.no_grad():
        logits = classifier(x)
    labels = torch.stack([check_labels(logits, column) for column in classes.unbind(1)], 1)
    return weighted(classifier, x, labels, masks, score, resolve(erase, classifier.mean))


@dataclass(frozen=True)
class Masks:
    """How many random masks there are, and how they are made.

    Raises:
        ValueError: fewer than one mask, cell or mask at a time, or p outside (0, 1].
    """

    samples: int
    cells: int
    p: float
    seed: int
    chunk: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.samples, self.cells, self.chunk) < 1 or not 0 < self.p <= 1:
            given = f"samples={self.samples}, cells={self.cells}, chunk={self.chunk}, p={self.p}"
            raise ValueError(f"expected samples, cells, chunk >= 1 and p in (0, 1], got {given}")

    def __call__(self, size: tuple[int, int]) -> Iterator[Float[Tensor, "m 1 h w"]]:
        """Yield the masks for images of `size`, `chunk` at a time; they do not depend on the chunk."""
        (h, w), s = size, self.cells
        down, across = math.ceil(h / s), math.ceil(w / s)
        generator = torch.Generator().manual_seed(self.seed)
        grids = (torch.rand(self.samples, 1, s, s, generator=generator) < self.p).float()
        starts = (torch.rand(self.samples, 2, generator=generator) * torch.tensor([down, across])).long()
        for some, corners in zip(torch.split(grids, self.chunk), torch.split(starts, self.chunk), strict=True):
            canvas = resize(some, ((s + 1) * down, (s + 1) * across))
            windows = [one[:, v : v + h, u : u + w] for one, (v, u) in zip(canvas, corners.tolist(), strict=True)]
            yield torch.stack(windows)


def weighted(
    classifier: Classifier, x: Images, classes: Int[Tensor, "b n"], masks: Masks, score: Score, erase: Erase
) -> Float[Tensor, "b n h w"]:
    """Return 1 / (N p) sum_i f(x * M_i) M_i of each class of each image."""
    x = x.detach()
    S = x.new_zeros(*classes.shape, *x.shape[2:])
    with torch.no_grad():
        for M in masks((x.shape[2], x.shape[3])):
            M = M.to(x)
            for image, labels, s in zip(x, classes, S, strict=True):
                logits = classifier(mix(image.expand(len(M), -1, -1, -1), M, erase))
                f = torch.stack([score(logits, label.expand(len(M))) for label in labels])
                s += torch.einsum("nm,mhw->nhw", f.to(x.dtype), M[:, 0])
    return S / (masks.samples * masks.p)
