"""Patches. Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions, 2023 (arXiv 2308.11052)."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.erase import Eraser, mix, resolve
from sightline.methods._cam import cam
from sightline.methods._crops import REDUCTIONS, Classes, Reduce, cam_scores
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
from sightline.registry import chosen, unknown
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

    S = 1/n sum_i w_i M(x * m_i): each patch of the image is erased with probability `drop` (appendix D.2). w_i = 1, or
    the copy's `weight`, a score. The method's grid; `drop` = 0 gives the method's own map. The class is that of the
    clean image. Costs 1 forward and a map a copy, `chunk` images (at least the batch) at a time.

    A patch is `patch` pixels of the input a side, whatever its size: the paper's images are VOC's, about 500 pixels a
    side, where 16 is 1/32; for the same share give 7 at 224 pixels and 2 at 64. The last row and column may be
    narrower. `unit` = "cells" instead divides the image into `patch` x `patch` patches, at any size; the paper's "16 x
    16 grid-wise patches" can mean either.

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
    reduce: Reduce = "mean",
    seed: int = 0,
    weight: Weight = None,
    erase: Eraser = "black",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over copies of the image that miss patches, the discriminative ones above all.

    As `random_patch`, but a patch is erased with probability p = alpha S_cam (appendix D.2). S_cam in [0, 1] is the
    score of a patch as `disc_crop` has it for a crop, with the same choices: the mean over the patch's pixels of the
    largest of all classes' maps, divided by one maximum. `alpha` = 0 gives the method's own map.

    *Differs:* as `disc_crop`. With each class divided by its own maximum, and the largest pixel taken, nearly every
    patch would be erased with a probability near `alpha`.

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
        reduce=reduce,
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
    heights, widths = sides(x, patch, unit)
    p = torch.full((1, len(heights), len(widths)), drop, device=x.device)
    copies = (mix(x, mask, filling) for mask in masks(x, p, heights, widths, samples=samples, seed=seed))
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
    reduce: Reduce,
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
    over, (heights, widths) = chosen(reduce, REDUCTIONS, "reduction"), sides(x, patch, unit)
    y, S = cam_scores(classifier, x, y, by, classes)
    x = x.detach()
    rows = torch.stack([over(band, 1) for band in torch.split(S[:, 0], heights, 1)], 1)
    p = alpha * torch.stack([over(band, 2) for band in torch.split(rows, widths, 2)], 2)
    copies = (mix(x, mask, filling) for mask in masks(x, p, heights, widths, samples=samples, seed=seed))
    return average(maps_of(method, classifier, y, copies, chunk, weight))


def sides(x: Images, patch: int, unit: Unit) -> tuple[list[int], list[int]]:
    """Return the patches' heights, row by row, and their widths, column by column.

    Raises:
        ValueError: a patch below one pixel, or more cells than pixels.
        LookupError: an unknown unit.
    """
    if unit not in ("pixels", "cells"):
        raise LookupError(unknown(unit, ("pixels", "cells"), "unit"))
    h, w = x.shape[2:]
    if patch < 1 or (unit == "cells" and patch > min(h, w)):
        raise ValueError(f"expected patches of at least one pixel, got patch={patch} {unit} for {h} x {w} images")
    rows, columns = (torch.arange(n) // patch if unit == "pixels" else torch.arange(n) * patch // n for n in (h, w))
    return rows.bincount().tolist(), columns.bincount().tolist()


def masks(
    x: Images, p: Float[Tensor, "_ r c"], heights: list[int], widths: list[int], *, samples: int, seed: int
) -> Iterator[Saliency]:
    """Yield masks that are 0 in each patch with probability p, from the same draws for every image of a batch."""
    generator = torch.Generator().manual_seed(seed)
    down, across = (torch.tensor(lengths, device=p.device) for lengths in (heights, widths))
    for _ in range(samples):
        u = torch.rand(p.shape[1:], generator=generator, dtype=torch.float32).to(p.device)
        kept = (u >= p).to(x.dtype).repeat_interleave(down, 1).repeat_interleave(across, 2)
        yield kept[:, None].expand(len(x), -1, -1, -1)
