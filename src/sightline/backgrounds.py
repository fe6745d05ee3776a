"""Backgrounds. How the maps of several classes become one label for every pixel.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023; what is ignored between two thresholds, and the dense CRF, as in IRN: Ahn, Cho
and Kwak, Weakly supervised learning of instance segmentation with inter-pixel relations, CVPR 2019.

A resolve gets an image in [0, 1] and the normalized maps of the classes that compete, at the image's size, and returns
the maps that a threshold turns into labels (`labels_at`): 0 background, class + 1, 255 ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.kinds import configured
from sightline.maps import blur, by_maximum
from sightline.registry import chosen, load
from sightline.runs import Choice

Resolve: TypeAlias = Callable[[Float[Tensor, "ch h w"], Float[Tensor, "n h w"]], Float[Tensor, "n h w"]]
"""From an image and the maps of its competing classes to maps that a threshold turns into labels."""

IGNORE = 255
"""The label of pixels that do not count."""

LARGEST = 253
"""The last class for which a mask has a value."""


def basic(image: Float[Tensor, "ch h w"], maps: Float[Tensor, "n h w"], /) -> Float[Tensor, "n h w"]:
    """Leave the maps as they are: one threshold separates the background."""
    return maps


def smooth(
    image: Float[Tensor, "ch h w"],
    maps: Float[Tensor, "n h w"],
    /,
    *,
    size: int = 13,
    sigma: float = 5.0,
    renormalize: bool = True,
) -> Float[Tensor, "n h w"]:
    """Smooth each map with a Gaussian of standard deviation `sigma` in a window of `size` x `size` pixels.

    The window sums to one; at the border the map is mirrored without its edge pixel, as OpenCV does. With `renormalize`
    each map is then divided by its maximum again (SPEC 10; the paper does not say); maps that were not divided before,
    such as a segmenter's, want `renormalize=False`, which is what `resolve_of(..., divided=False)` takes.

    Raises:
        ValueError: a window that has no middle, or a negative sigma.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"smooth: expected a window of an odd size of at least 1 pixel, got size={size}")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"smooth: expected sigma >= 0 pixels, got sigma={sigma}")
    smoothed = blur(maps[:, None], sigma, radius=size // 2)[:, 0]
    return by_maximum(smoothed) if renormalize else smoothed


def superpixel(
    image: Float[Tensor, "ch h w"],
    maps: Float[Tensor, "n h w"],
    /,
    *,
    scale: float = 100.0,
    sigma: float = 0.5,
    min_size: int = 50,
    renormalize: bool = False,
) -> Float[Tensor, "n h w"]:
    """Give each pixel the mean of its map in its superpixel, of Felzenszwalb and Huttenlocher (IJCV 2004).

    The paper does not give their numbers: these are SPEC 10's. Means are taken in float64 on the CPU, so that every
    device gives the same. With `renormalize` each map is divided by its maximum afterwards.

    *Differs:* a superpixel whose mean is the threshold is background, as a pixel is in the other resolves; the paper
    takes it as foreground.

    Raises:
        ValueError: a scale that is not positive, or a negative sigma or size.
    """
    if not 0 < scale < float("inf") or not 0 <= sigma < float("inf") or min_size < 0:
        raise ValueError(
            f"superpixel: expected scale > 0, sigma >= 0 and min_size >= 0, got scale={scale}, sigma={sigma}, "
            f"min_size={min_size}"
        )
    places = superpixels(image, scale, sigma, min_size).flatten()
    counts = places.bincount()
    sums = torch.zeros(len(maps), len(counts), dtype=torch.float64).index_add_(
        1, places, maps.flatten(1).double().cpu()
    )
    means = (sums / counts)[:, places].view(maps.shape).to(maps)
    return by_maximum(means) if renormalize else means


def superpixels(image: Float[Tensor, "ch h w"], scale: float, sigma: float, min_size: int) -> Int[Tensor, "h w"]:
    """Number the superpixels of an image from 0, on the CPU."""
    from skimage.segmentation import felzenszwalb

    found = felzenszwalb(
        image.permute(1, 2, 0).double().cpu().numpy(), scale=scale, sigma=sigma, min_size=min_size, channel_axis=-1
    )
    return torch.from_numpy(found.astype(np.int64))


def crf(
    image: Float[Tensor, "ch h w"],
    maps: Float[Tensor, "n h w"],
    /,
    *,
    threshold: float = 0.3,
    iterations: int = 10,
    confidence: float = 0.7,
    near: float = 3.0,
    near_weight: float = 3.0,
    far: float = 50.0,
    color: float = 5.0,
    far_weight: float = 10.0,
) -> Float[Tensor, "n h w"]:
    """Refine the labels at `threshold` with a dense CRF; return them as one-hot maps of 0 and 1.

    So any threshold in (0, 1) gives the refined labels; an ignore band takes two fields, see `refined_labels`. Of
    Krähenbühl and Koltun, NeurIPS 2011, as IRN runs it: a pixel's energy is -log(confidence) for its own label and
    -log((1 - confidence) / n) for each of the n others; two pixels of different labels cost
    near_weight exp(-d^2 / (2 near^2)) + far_weight exp(-d^2 / (2 far^2) - c^2 / (2 color^2)), d their distance in
    pixels, c that of their colors in [0, 255], both kernels normalized symmetrically; `iterations` of mean field. It
    needs `pydensecrf2`, and runs on the CPU.

    Raises:
        ValueError: no pydensecrf2, fewer iterations than none, no confidence in (0, 1), or a width or weight that is
            not positive.
    """
    widths = {"near": near, "near_weight": near_weight, "far": far, "color": color, "far_weight": far_weight}
    if wrong := {name: value for name, value in widths.items() if not 0 < value < float("inf")}:
        raise ValueError(f"crf: expected widths and weights above 0, got {wrong}")
    if iterations < 0 or not 0 < confidence < 1:
        raise ValueError(
            f"crf: expected iterations >= 0 and 0 < confidence < 1, got iterations={iterations}, "
            f"confidence={confidence}"
        )
    n, h, w = maps.shape
    field = random_field()(w, h, n + 1)
    labels = labels_at(maps, range(n), threshold).flatten().cpu()
    sure = torch.arange(n + 1)[:, None] == labels
    energy = -torch.where(sure, confidence, (1 - confidence) / max(n, 1)).log()
    pixels = (255 * image.expand(3, h, w)).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()
    field.setUnaryEnergy(energy.float().contiguous().numpy())
    field.addPairwiseGaussian(sxy=near, compat=near_weight)
    field.addPairwiseBilateral(sxy=far, srgb=color, rgbim=pixels, compat=far_weight)
    refined = torch.from_numpy(np.array(field.inference(iterations))).argmax(0).view(h, w)
    return (torch.arange(1, n + 1)[:, None, None] == refined).to(maps)


def random_field() -> Callable[..., Any]:
    """Return the dense CRF's class.

    Raises:
        ValueError: it is not installed.
    """
    try:
        found: Callable[..., Any] = load("pydensecrf.densecrf:DenseCRF2D")
    except LookupError as error:
        raise ValueError("a dense CRF needs pydensecrf2: pip install 'sightline[crf]', or take superpixel") from error
    return found


RESOLVES: Mapping[str, Resolve] = {"basic": basic, "smooth": smooth, "superpixel": superpixel, "crf": crf}
"""Name -> background resolve."""


def resolve_of(what: str | Mapping[str, Any] | Resolve, *, divided: bool = True) -> Resolve:
    """Return a resolve with its settings: "smooth?sigma=3", {"name": "smooth", "sigma": 3}, or one that is a function.

    Maps that are not `divided` by their maximum stay so: what would divide them (`renormalize`) does it only where the
    settings say so. Ours are tried on a blank image, so that what is wrong is said now.

    Raises:
        LookupError: an unknown name or setting, with near ones.
        TypeError: neither of these, or a setting of a wrong kind.
        ValueError: a setting out of range, or a library that is not installed.
    """
    if callable(what):
        return what
    choice = Choice.of(what)
    function = chosen(choice.name, RESOLVES, "background resolve")
    raw = {} if divided or "renormalize" not in signature(function).parameters else {"renormalize": False}
    found = configured(RESOLVES, choice.name, {**raw, **choice.settings}, "background resolve")
    found(torch.zeros(3, 2, 2), torch.zeros(1, 2, 2))
    return found


def labels_at(
    maps: Float[Tensor, "n h w"], classes: Sequence[int], low: float, high: float | None = None
) -> Int[Tensor, "h w"]:
    """Return 0 where no map exceeds `low`, class + 1 of the largest one where it exceeds `high`, 255 between them.

    Of equal maps the first one's class counts. Without `high` nothing is ignored. IRN's levels are .05 and .30.

    Raises:
        ValueError: another number of classes than of maps, a class outside 0..253, or low > high.
    """
    check_classes(classes, len(maps))
    high = low if high is None else high
    if not low <= high:
        raise ValueError(f"expected low <= high, got low={low}, high={high}; pixels between them are ignored")
    if not len(maps):
        return torch.zeros(maps.shape[1:], dtype=torch.long, device=maps.device)
    value, which = maps.max(0)
    label = torch.tensor(classes, device=maps.device)[which] + 1
    return torch.where(value > high, label, torch.where(value > low, IGNORE, 0))


def check_classes(classes: Sequence[int], count: int) -> None:
    """Check that there is a class for every map, and a value for every class.

    Raises:
        ValueError: there is not.
    """
    if len(classes) != count:
        raise ValueError(f"expected a class for each of {count} maps, got {list(classes)}")
    if wrong := [label for label in classes if not 0 <= label <= LARGEST]:
        raise ValueError(f"masks hold classes 0 to {LARGEST}, as 1 to {LARGEST + 1}, got class {wrong[0]}")


def confident(low: Int[Tensor, "h w"], high: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
    """Join the labels at a low and a high threshold: what is foreground at high, background at low, else 255.

    For labels that were refined at each threshold of its own (`refined_labels`); else `labels_at`.
    """
    return torch.where(high > 0, high, torch.where(low > 0, IGNORE, 0))


def refined_labels(
    image: Float[Tensor, "ch h w"],
    maps: Float[Tensor, "n h w"],
    classes: Sequence[int],
    *,
    low: float,
    high: float,
    refine: Callable[..., Float[Tensor, "n h w"]] = crf,
) -> Int[Tensor, "h w"]:
    """Return the labels at `low` and at `high`, each refined by a dense CRF of its own, joined as IRN joins them.

    Foreground is what the CRF of the labels at `high` says is, background what neither says is foreground, 255 the
    rest. `refine` is `crf`, with settings: a function of image, maps and `threshold` to one-hot maps.

    Raises:
        ValueError: as `labels_at` and `crf`.
    """
    found = [labels_at(refine(image, maps, threshold=t), classes, 0.5) for t in dict.fromkeys((low, high))]
    return confident(found[0], found[-1])
