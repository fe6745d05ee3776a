"""Patches. Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions, 2023 (arXiv 2308.11052)."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.erase import Eraser, mix, resolve
from sightline.methods._cam import cam
from sightline.methods._crops import Classes, cam_scores
from sightline.methods._perturbed import (
    Chosen,
    Weight,
    average,
    called,
    check_counts,
    complete,
    maps_of,
    weighting,
)
from sightline.registry import unknown
from sightline.types import Images, Labels, Saliency, Score

Unit: TypeAlias = Literal["pixels", "cells"]


def random_patch(
    method: Chosen,
    *,
    samples: int = 50,
    patch: int = 16,
    unit: Unit = "pixels",
    drop: float = 0.1,
    seed: int = 0,
    weight: Weight = None,
    erase: Eraser = "black",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over copies of the image that miss random patches.

    S = 1/n sum_i w_i M(x * m_i): each patch of the image is erased with probability `drop` (appendix D.2). A patch is
    `patch` pixels a side, or with `unit` = "cells" one of `patch` x `patch` cells; the paper says "16 x 16 grid-wise
    patches". w_i = 1, or the copy's `weight`, a score. The method's grid; `drop` = 0 gives the method's own map. The
    class is that of the clean image. Costs 1 forward and a map a copy, `chunk` images (at least the batch) at a time.

    Raises:
        ValueError: fewer than one sample or image at a time, `drop` outside [0, 1], a patch that does not fit, or
            weights below zero (when called).
        LookupError: an unknown unit or eraser (when called), method or weight.
    """
    return partial(
        patched,
        method=complete(method),
        samples=samples,
        patch=patch,
        unit=unit,
        drop=drop,
        seed=seed,
        weight=weighting(weight),
        erase=erase,
        chunk=chunk,
    )


def disc_patch(
    method: Chosen,
    *,
    samples: int = 50,
    patch: int = 16,
    unit: Unit = "pixels",
    alpha: float = 0.4,
    by: Chosen = cam,
    classes: Classes = "all",
    seed: int = 0,
    weight: Weight = None,
    erase: Eraser = "black",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over copies of the image that miss patches, the discriminative ones above all.

    As `random_patch`, but a patch is erased with probability p = alpha S_cam (appendix D.2), S_cam in [0, 1] the
    largest value in the patch of the maps of all classes, each divided by its maximum. These are maps of the method
    `by` on the clean image: one forward for CAM; where CAM is not defined, give `by=grad_cam`, a map a class.
    `classes` = "label" looks at the explained class alone. `alpha` = 0 gives the method's own map.

    Raises:
        ValueError: as `random_patch`; `alpha` outside [0, 1], or a network without CAM (when called).
        LookupError: an unknown choice.
    """
    return partial(
        disc_patched,
        method=complete(method),
        samples=samples,
        patch=patch,
        unit=unit,
        alpha=alpha,
        by=complete(by),
        classes=classes,
        seed=seed,
        weight=weighting(weight),
        erase=erase,
        chunk=chunk,
    )


@called("random_patch")
def patched(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    patch: int,
    unit: Unit,
    drop: float,
    seed: int,
    weight: Score | None,
    erase: Eraser,
    chunk: int,
) -> Saliency:
    """Return the mean map of copies without random patches, (b, 1, i, j) on the method's grid."""
    check_counts(samples, chunk)
    if not 0 <= drop <= 1:
        raise ValueError(f"expected drop in [0, 1], the probability of a patch to be erased, got {drop}")
    filling = resolve(erase, classifier.mean)
    y, x = classifier.labels(x, y), x.detach()
    tiles = numbered(x, patch, unit)
    p = torch.full_like(largest(x[:1, :1], tiles), drop)
    copies = (mix(x, mask, filling) for mask in masks(x, p, tiles, samples, seed))
    return average(maps_of(method, classifier, y, copies, chunk, weight))


@called("disc_patch")
def disc_patched(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    samples: int,
    patch: int,
    unit: Unit,
    alpha: float,
    by: Method,
    classes: Classes,
    seed: int,
    weight: Score | None,
    erase: Eraser,
    chunk: int,
) -> Saliency:
    """Return the mean map of copies without discriminative patches, (b, 1, i, j) on the method's grid."""
    check_counts(samples, chunk)
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha in [0, 1], the probability of the most discriminative patch, got {alpha}")
    filling = resolve(erase, classifier.mean)
    y, S = cam_scores(classifier, x, y, by, classes)
    x, tiles = x.detach(), numbered(x, patch, unit)
    p = alpha * largest(S, tiles)
    copies = (mix(x, mask, filling) for mask in masks(x, p, tiles, samples, seed))
    return average(maps_of(method, classifier, y, copies, chunk, weight))


def numbered(x: Images, patch: int, unit: Unit) -> Int[Tensor, "h w"]:
    """Return the number of each pixel's patch, row by row.

    Raises:
        ValueError: a patch below one pixel, or more cells than pixels.
        LookupError: an unknown unit.
    """
    if unit not in ("pixels", "cells"):
        raise LookupError(unknown(unit, ("pixels", "cells"), "unit"))
    h, w = x.shape[2:]
    if patch < 1 or (unit == "cells" and patch > min(h, w)):
        raise ValueError(f"expected patches of at least one pixel, got patch={patch} {unit} for {h} x {w} images")
    rows, columns = (torch.arange(n, device=x.device) for n in (h, w))
    rows, columns = (rows // patch, columns // patch) if unit == "pixels" else (rows * patch // h, columns * patch // w)
    return rows[:, None] * (1 + columns[-1]) + columns


def largest(S: Saliency, tiles: Int[Tensor, "h w"]) -> Float[Tensor, "b n"]:
    """Return each map's maximum in each patch."""
    found = S.new_full((len(S), 1 + int(tiles[-1, -1])), -torch.inf)
    return found.scatter_reduce(1, tiles.flatten().expand(len(S), -1), S.flatten(1), "amax")


def masks(x: Images, p: Float[Tensor, "_ n"], tiles: Int[Tensor, "h w"], samples: int, seed: int) -> Iterator[Saliency]:
    """Yield masks that are 0 in each patch with probability p, from the same draws for every image of a batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        u = torch.rand(p.shape[1:], generator=generator, dtype=torch.float32).to(p.device)
        yield (u >= p).to(x.dtype)[:, tiles][:, None].expand(len(x), -1, -1, -1)
