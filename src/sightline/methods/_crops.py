"""Crops. Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions, 2023 (arXiv 2308.11052)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from sightline.classifier import Classifier, Method, check_labels, sigmoid
from sightline.maps import by_maximum, resize
from sightline.methods._cam import cam
from sightline.methods._per_class import per_class
from sightline.methods._perturbed import Chosen, Weight, called, check_counts, complete, weighed, weighting
from sightline.registry import chosen, unknown
from sightline.types import Images, Labels, Saliency, Score

Box: TypeAlias = tuple[int, int, int, int]
"""x0 y0 x1 y1 in pixels, half-open."""

Norm: TypeAlias = Literal["coverage", "n"]
Classes: TypeAlias = Literal["all", "each", "label"]
"""Whose maps say what is discriminative: all classes by one measure, each by its own, or the explained one alone."""

Reduce: TypeAlias = Literal["mean", "max"]

REDUCTIONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {"mean": torch.mean, "max": torch.amax}
"""How the pixels of a crop or patch make one score."""


def random_crop(
    method: Chosen,
    *,
    samples: int = 140,
    scale: tuple[float, float] = (0.1, 1.0),
    seed: int = 0,
    norm: Norm = "coverage",
    weight: Weight = sigmoid,
    chunk: int = 16,
) -> Method:
    """Return the method averaged over random crops, whose maps are put back where the crops lie.

        coverage  S(p) = sum_i w_i M_i(p) / sum_i w_i 1_i(p)        n  S(p) = 1/n sum_i w_i M_i(p)

    A crop has the image's proportions and a share of its area that is uniform in `scale`, at a uniform place; it is
    enlarged to the image's size (bilinear), and its map M_i brought to the crop's (bilinear); 1_i(p) tells whether
    pixel p lies in it. w_i is the class's sigmoid on the crop, or another `weight`, a score; None is 1. (b, 1, h, w)
    at the input's resolution, 0 where no crop lies. The class is that of the clean image. Costs 1 forward, a map a
    crop, and a forward a crop for the weight where the method makes no pass over the crop itself; `chunk` images (at
    least the batch) at a time.

    *Differs:* section 7.1 prints the sum over n; its crops overlap the center more often than the border, so the
    default divides by what covers each pixel.

    Raises:
        ValueError: fewer than one sample or image at a time, a scale outside (0, 1], or weights below zero (when
            called).
        LookupError: an unknown norm (when called), method or weight.
    """
    return partial(
        cropped,
        method=complete(method),
        samples=samples,
        scale=scale,
        seed=seed,
        norm=norm,
        weight=weighting(weight),
        chunk=chunk,
    )


def disc_crop(
    method: Chosen,
    *,
    samples: int = 50,
    beta: float = 0.7,
    scale: tuple[float, float] = (0.1, 1.0),
    by: Chosen = cam,
    classes: Classes = "all",
    reduce: Reduce = "mean",
    seed: int = 0,
    norm: Norm = "coverage",
    weight: Weight = sigmoid,
    chunk: int = 16,
) -> Method:
    """Return the method averaged over random crops, the least discriminative ones above all.

    The crops of `random_crop`, each of which counts with probability p = ReLU(beta - S_cam) (appendix D.2), where

        S(p) = max_c ReLU(M_c(p)) / max_c,q M_c(q)        S_cam = mean of S(p) over the pixels p of the crop

    are in [0, 1]. M_c are the maps of all classes on the clean image by the method `by`: one forward for CAM; where CAM
    is not defined, give `by=grad_cam`, a map a class. S is enlarged to the input (bilinear), its peak is 1 again.
    `classes` = "each" divides each class's map by its own maximum first (eq 1), "label" looks at the explained class
    alone; `reduce` = "max" takes the crop's largest pixel. Crops that do not count cost nothing.

    Where no crop of an image counts, its map is zero everywhere (the sum over none), which evaluations list as
    degenerate: with few samples, a small `beta`, or `reduce` = "max", by which a crop that holds the peak never counts.

    *Differs:* the paper calls S_cam "the maximum CAM score across all the C classes in the patch" and leaves open what
    the score of a patch is. If it were the largest pixel, a crop would have to miss every peak: in scenes of creatures
    none does with each of 20 classes divided by its own maximum, and one in fifteen for the explained class alone. So
    the maximum is over classes, the score the mean over the crop; and one maximum for all classes keeps those that the
    network does not see from counting as much as those it does.

    Raises:
        ValueError: as `random_crop`; `beta` below zero, or a network without CAM (when called).
        LookupError: an unknown choice.
    """
    return partial(
        disc_cropped,
        method=complete(method),
        samples=samples,
        beta=beta,
        scale=scale,
        by=complete(by),
        classes=classes,
        reduce=reduce,
        seed=seed,
        norm=norm,
        weight=weighting(weight),
        chunk=chunk,
    )


@called("random_crop")
def cropped(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    scale: tuple[float, float],
    seed: int,
    norm: Norm,
    weight: Score | None,
    chunk: int,
) -> Saliency:
    """Return the maps of random crops, put together to (b, 1, h, w)."""
    check_counts(samples, chunk)
    check_norm(norm)
    y, x = classifier.labels(x, y), x.detach()
    crops = boxes(x, samples, scale, torch.Generator().manual_seed(seed))
    counts = torch.ones(samples, len(x), dtype=torch.bool, device=x.device)
    return assembled(classifier, x, y, crops, counts, method=method, norm=norm, weight=weight, chunk=chunk)


@called("disc_crop")
def disc_cropped(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    beta: float,
    scale: tuple[float, float],
    by: Method,
    classes: Classes,
    reduce: Reduce,
    seed: int,
    norm: Norm,
    weight: Score | None,
    chunk: int,
) -> Saliency:
    """Return the maps of the crops that count, put together to (b, 1, h, w)."""
    check_counts(samples, chunk)
    check_norm(norm)
    if beta < 0:
        raise ValueError(f"expected beta >= 0, got {beta}; no crop counts with less")
    over = chosen(reduce, REDUCTIONS, "reduction")
    y, S = cam_scores(classifier, x, y, by, classes)
    x, generator = x.detach(), torch.Generator().manual_seed(seed)
    crops = boxes(x, samples, scale, generator)
    S_cam = torch.stack([over(S[:, 0, y0:y1, x0:x1].flatten(1), 1) for x0, y0, x1, y1 in crops])
    p = (beta - S_cam).relu()
    u = torch.rand((samples, 1), generator=generator, dtype=torch.float32).to(p.device)
    return assembled(classifier, x, y, crops, u < p, method=method, norm=norm, weight=weight, chunk=chunk)


def cam_scores(
    classifier: Classifier, x: Images, y: Labels | None, by: Method, classes: Classes
) -> tuple[Labels, Saliency]:
    """Return the labels, and at each pixel the largest of the classes' maps, divided by its maximum, in [0, 1].

    Raises:
        LookupError: an unknown choice of classes.
    """
    if classes not in ("all", "each", "label"):
        raise LookupError(unknown(classes, ("all", "each", "label"), "choice of classes"))
    with torch.no_grad():
        logits = classifier(x)
    y = check_labels(logits, y)
    each = torch.arange(logits.shape[1], device=y.device).expand(len(y), -1)
    M = per_class(by)(classifier, x, y[:, None] if classes == "label" else each)
    S = (by_maximum(M) if classes == "each" else M).amax(1, keepdim=True)
    return y, by_maximum(resize(S, (x.shape[2], x.shape[3]))).relu()


def boxes(x: Images, samples: int, scale: tuple[float, float], generator: torch.Generator) -> list[Box]:
    """Return random crops with the images' proportions, whose shares of the area are uniform in `scale`.

    Raises:
        ValueError: a scale outside (0, 1].
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"expected a scale (smallest, largest) share of the area in (0, 1], got {scale}")
    found: list[Box] = []
    for share, down, across in torch.rand((samples, 3), generator=generator, dtype=torch.float64).tolist():
        side = (low + (high - low) * share) ** 0.5
        h, w = (max(1, round(side * length)) for length in x.shape[2:])
        y0, x0 = int(down * (x.shape[2] - h + 1)), int(across * (x.shape[3] - w + 1))
        found.append((x0, y0, x0 + w, y0 + h))
    return found


def assembled(
    classifier: Classifier,
    x: Images,
    y: Labels,
    crops: list[Box],
    counts: Bool[Tensor, "n b"],
    *,
    method: Method,
    norm: Norm,
    weight: Score | None,
    chunk: int,
) -> Saliency:
    """Return the weighted maps of each image's crops that count, put back in place and normalized."""
    total, coverage = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    step = max(1, chunk // len(x))
    for start in range(0, len(crops), step):
        group = [(box, on.nonzero()[:, 0]) for box, on in zip(crops, counts, strict=True)][start : start + step]
        images, labels = torch.cat([zoomed(x[on], box) for box, on in group]), torch.cat([y[on] for _, on in group])
        if len(images) == 0:
            continue
        sizes = [len(on) for _, on in group]
        maps, w = (z.to(x.dtype) for z in weighed(method, classifier, images, labels, weight))
        w = w.view(-1, 1, 1, 1)
        for (box, on), M, share in zip(group, torch.split(maps, sizes), torch.split(w, sizes), strict=True):
            x0, y0, x1, y1 = box
            total[on, :, y0:y1, x0:x1] += share * resize(M, (y1 - y0, x1 - x0))
            coverage[on, :, y0:y1, x0:x1] += share
    return total / len(crops) if norm == "n" else total / torch.where(coverage > 0, coverage, 1)


def zoomed(x: Images, box: Box) -> Images:
    """Return the crop of each image, enlarged to the image's size."""
    x0, y0, x1, y1 = box
    return resize(x[:, :, y0:y1, x0:x1], (x.shape[2], x.shape[3]))


def check_norm(norm: Norm) -> None:
    """Check what the sum is divided by.

    Raises:
        LookupError: no such norm.
    """
    if norm not in ("coverage", "n"):
        raise LookupError(unknown(norm, ("coverage", "n"), "norm"))
