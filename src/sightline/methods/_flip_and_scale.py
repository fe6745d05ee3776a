"""Flip and scale. Ahn, Cho and Kwak, Weakly supervised learning of instance segmentation (IRN), CVPR 2019."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, Method, PerClass, UnsuitedError
from sightline.maps import Mode, resize
from sightline.methods._mean import larger
from sightline.methods._perturbed import Chosen, called, check_counts, complete, maps_of
from sightline.types import Images, Labels, Saliency


def flip_and_scale(
    method: Chosen,
    *,
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0),
    flip: bool = True,
    positive: bool = False,
    mode: Mode = "bilinear",
    chunk: int = 16,
) -> Method:
    """Return the method averaged over enlarged, reduced and mirrored copies of the image.

    S = mean over s and f of f^-1(M(f(x_s))): x_s is the image with its sides times s, resampled by `mode`; f mirrors
    it left to right, or not; with `positive` negative values of each map are cut off first, as in IRN, where CAM is
    meant. (b, 1, i, j) on the largest of the maps' grids, at most the image's own: the others are resized to it
    (bilinear). One scale of 1 without flips gives the method's own map. The class is that of the clean image. Costs
    1 forward and 2 maps a scale, at s^2 times the price, `chunk` images (at least the batch) at a time. All classes of
    an image come at the price of one where the method's do (`per_class`).

    *Differs:* IRN sums, on a grid of a quarter of the image, and divides by the maximum; resampling there is bicubic.

    Raises:
        ValueError: no scale, one that is not above zero, fewer than one image at a time, or a network that cannot run
            on another size (when called).
        LookupError: no method of that name.
    """
    return partial(scaled, method=complete(method), scales=scales, flip=flip, positive=positive, mode=mode, chunk=chunk)


@called("flip_and_scale")
def scaled(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    scales: tuple[float, ...],
    flip: bool,
    positive: bool,
    mode: Mode,
    chunk: int,
) -> Saliency:
    """Return the mean map of scaled and mirrored copies, (b, 1, i, j)."""

    def maps(classifier: Classifier, x: Images, classes: Int[Tensor, "b 1"]) -> Saliency:
        return method(classifier, x, classes[:, 0])

    y = classifier.labels(x, y)
    made = partial(scaled_all, scales=scales, flip=flip, positive=positive, mode=mode, chunk=chunk)
    return made(classifier, x, y[:, None], method=maps)


def scaled_all(
    classifier: Classifier,
    x: Images,
    classes: Int[Tensor, "b n"],
    *,
    method: PerClass,
    scales: tuple[float, ...],
    flip: bool,
    positive: bool,
    mode: Mode,
    chunk: int,
) -> Float[Tensor, "b n _i _j"]:
    """Return the mean maps of several classes of each image, by a method that makes them together."""
    check_counts(1, chunk)
    if not scales or min(scales) <= 0:
        raise ValueError(f"expected one or more scales above zero, got {scales}")
    x = x.detach()
    maps: list[Float[Tensor, "b n _i _j"]] = []
    for scale in scales:
        copy = resize(x, (max(1, round(x.shape[2] * scale)), max(1, round(x.shape[3] * scale))), mode)
        maps += explained(method, classifier, classes, copy, flip, chunk, scale)
    maps = [one.relu() if positive else one for one in maps]
    h, w = larger(maps)
    size = min(h, x.shape[2]), min(w, x.shape[3])
    return torch.stack([resize(one, size) for one in maps]).mean(0)


def explained(
    method: PerClass,
    classifier: Classifier,
    classes: Int[Tensor, "b n"],
    copy: Images,
    flip: bool,
    chunk: int,
    scale: float,
) -> list[Float[Tensor, "b n _i _j"]]:
    """Return the maps of the copy, and those of its mirror image mirrored back.

    Raises:
        UnsuitedError: the network does not offer what the method needs.
        ValueError: it cannot run on images of the copy's size.
    """
    copies = [copy, copy.flip(3)] if flip else [copy]
    try:
        maps = list(maps_of(method, classifier, classes, copies, chunk))
    except UnsuitedError:
        raise
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        if scale == 1:
            raise
        h, w = copy.shape[2:]
        raise ValueError(
            f"{type(classifier.model).__name__} cannot be explained on {h} x {w} images (scale {scale}): {error}; pass "
            "scales=(1.0,)"
        ) from error
    return [maps[0], *(one.flip(3) for one in maps[1:])]
