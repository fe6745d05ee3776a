"""Occlusion.

Zeiler and Fergus, Visualizing and understanding convolutional networks, ECCV 2014; sizes, grid and the discs of "blur
occlusion" after Fong and Vedaldi, Meaningful perturbation, ICCV 2017, supplement, sections 3 and 4.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, check_labels, logit
from sightline.erase import Eraser, filler, mix
from sightline.maps import blur, pad, scale
from sightline.types import Images, Labels, Saliency, Score

Shape: TypeAlias = Literal["square", "disc"]


def occlusion(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    size: float = 35.0,
    grid: int = 28,
    shape: Shape = "square",
    soften: float = 10.0,
    score: Score = logit,
    erase: Eraser = "mean",
    chunk: int = 64,
) -> Saliency:
    """Return what the score loses, on average, behind the patches that hide a pixel.

    S(u) = sum_k M_k(u) (f_c(x) - f_c(x_k)) / sum_k M_k(u), where x_k = (1 - M_k) x + M_k filling hides patch k, one of
    `grid` x `grid` that lie evenly over the image. (b, 1, h, w), signed: below zero where hiding helps.

    `size` is the side of a `square`, or the diameter of a `disc` whose edge is softened by a Gaussian of `soften`
    (squares are hard); both in pixels of a 224 x 224 image, and scaled by sqrt(h w) / 224 to others (`size` to whole
    pixels, at least one). Patches reach over the border. `shape="disc", erase="blur"` is the paper's blur occlusion.

    Costs grid^2 + 1 forwards an image, `chunk` hidden images at a time.

    Raises:
        ValueError: a size, grid or chunk that is not above zero, a negative softening, or patches that leave gaps.
        LookupError: an unknown shape or eraser.
    """
    check_settings(size, grid, shape, soften, chunk)
    with torch.no_grad():
        logits = classifier(x)
        y = check_labels(logits, y)
        P, rows, columns = layout((x.shape[2], x.shape[3]), size, grid, shape, soften, x)
        cover = spread(P.new_ones(1, grid, grid), P, rows, columns)
        check_cover(cover, grid)
        s = behind(classifier, x, y, grid**2, placed(P, rows, columns), score=score, erase=erase, chunk=chunk)
        lost = (score(logits, y) - s).T.reshape(-1, grid, grid).to(x.dtype)
        return spread(lost, P, rows, columns) / cover


def check_settings(size: float, grid: int, shape: str, soften: float, chunk: int) -> None:
    """Check the settings.

    Raises:
        ValueError: one out of its range.
        LookupError: an unknown shape.
    """
    if size <= 0 or grid < 1 or soften < 0 or chunk < 1:
        raise ValueError(
            "expected size > 0, grid >= 1, soften >= 0 and chunk >= 1, "
            f"got size={size}, grid={grid}, soften={soften}, chunk={chunk}"
        )
    if shape not in ("square", "disc"):
        raise LookupError(f"no shape called {shape!r}; known: disc, square")


def check_cover(cover: Saliency, grid: int) -> None:
    """Check that every pixel is hidden by some patch.

    Raises:
        ValueError: some are not.
    """
    if bool((cover <= 0).any()):
        size = (cover.shape[2], cover.shape[3])
        enough = math.ceil(math.ceil(max(size) / grid) / scale(size))
        raise ValueError(
            f"the patches leave gaps on a grid of {grid} x {grid}; pass a finer grid, or larger patches: "
            f"squares cover the image from size={enough}.0 on"
        )


def layout(
    image: tuple[int, int], size: float, grid: int, shape: Shape, soften: float, like: Tensor
) -> tuple[Float[Tensor, "p p"], Int[Tensor, "g h"], Int[Tensor, "g w"]]:
    """Return the patch in a frame of zeros, and its row and its column at each pixel, for every place of the grid."""
    side = max(1, round(size * scale(image)))
    sigma = soften * scale(image) if shape == "disc" else 0.0
    reach = math.ceil(4 * sigma)
    patch = disc(side, like) if shape == "disc" else like.new_ones(side, side)
    P = blur(pad(patch[None, None], reach, reach, "zeros"), sigma, padding="zeros")[0, 0]
    framed = pad(P[None, None], 1, 1, "zeros")[0, 0]
    rows, columns = (
        (torch.arange(length) - starts(length, side, grid)[:, None] + reach + 1).clamp(0, len(framed) - 1)
        for length in image
    )
    return framed, rows.to(like.device), columns.to(like.device)


def disc(side: int, like: Tensor) -> Float[Tensor, "p p"]:
    """Return the disc in a square of `side` pixels: 1 where a pixel's center lies in it, 0 elsewhere."""
    offsets = torch.arange(side, dtype=like.dtype, device=like.device) - (side - 1) / 2
    return (offsets[:, None] ** 2 + offsets**2 <= (side / 2) ** 2).to(like.dtype)


def starts(length: int, side: int, grid: int) -> Int[Tensor, " g"]:
    """Return the first pixel of each patch along an axis, exactly: those whose centers lie in [c - side/2, c + side/2).

    c = (k + 1/2) length / grid, k = 0 .. grid - 1.
    """
    k = torch.arange(grid)
    return -(((side + 1) * grid - (2 * k + 1) * length) // (2 * grid))


def placed(
    P: Float[Tensor, "p p"], rows: Int[Tensor, "g h"], columns: Int[Tensor, "g w"]
) -> Callable[[Tensor], Saliency]:
    """Return the function from numbers of patches, row by row, to their masks (n, 1, h, w): 1 = hidden."""
    grid = len(rows)
    return lambda k: P[rows[k // grid][:, :, None], columns[k % grid][:, None, :]][:, None]


def spread(
    values: Float[Tensor, "b g g"], P: Float[Tensor, "p p"], rows: Int[Tensor, "g h"], columns: Int[Tensor, "g w"]
) -> Saliency:
    """Return sum_k M_k(u) v_k over all patches k, one value v_k a patch."""
    parts = [torch.einsum("bk,ikj->bij", values[:, a], P[row][:, columns]) for a, row in enumerate(rows)]
    return torch.stack(parts).sum(0)[:, None]


def behind(
    classifier: Classifier,
    x: Images,
    y: Labels,
    count: int,
    masks: Callable[[Tensor], Saliency],
    *,
    score: Score,
    erase: Eraser,
    chunk: int,
) -> Float[Tensor, "n b"]:
    """Return the score of each image behind each of `count` masks; `masks` makes those of given numbers, 1 = hidden."""
    filling = filler(x, erase, classifier.mean)

    def seen(images: Tensor, numbers: Tensor) -> Tensor:
        M = masks(numbers).repeat_interleave(len(images), 0)
        i = images.repeat(len(numbers))
        return score(classifier(mix(x[i], 1 - M, filling(i))), y[i]).view(len(numbers), -1)

    every = torch.arange(count, device=x.device)
    found = [
        torch.cat([seen(images, numbers) for numbers in torch.split(every, max(1, chunk // len(images)))])
        for images in torch.split(torch.arange(len(x), device=x.device), chunk)
    ]
    return torch.cat(found, 1)
