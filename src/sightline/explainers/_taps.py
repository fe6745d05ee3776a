"""Taps. The feature maps that CASM's decoder reads, found in any convolutional network by running it once.

Zolna, Geras, Cho: Classifier-agnostic saliency map extraction. CVIU 2020, https://arxiv.org/abs/1805.08249
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from sightline.classifier import Classifier, UnsuitedError, look
from sightline.hooks import differentiable, frozen
from sightline.layers import Probe, Seen, ToGrid, grid_of, outermost, passive, strides

Taps: TypeAlias = Literal["code", "paper"]


@dataclass(frozen=True)
class Tap:
    """A layer whose map is read: its channels, how many pixels high a cell is, its grid, whether it is read raw."""

    name: str
    channels: int
    stride: int
    to_grid: ToGrid
    raw: bool


@dataclass(frozen=True, eq=False)
class Place:
    """A map of more than one cell: who gave it, its (c, i, j), how often the image was halved, whether it is pooled."""

    name: str
    output: Tensor
    to_grid: ToGrid
    shape: tuple[int, int, int]
    level: int
    pooled: bool


def find_taps(classifier: Classifier, taps: Taps = "code") -> tuple[Tap, ...]:
    """Return the layers that the decoder reads, the finest first.

    A bottleneck is a map of more than one cell through which everything passes that reaches the logits: never inside a
    residual block, where the shortcut passes by. A scale is a power of two of pixels a cell.

    "paper": the last bottleneck of every scale that no pooling made, the image's own scale included: the layers that a
    downscaling follows, and the last one before the global pooling. ResNet-50: `relu` (behind conv1), `layer1` to
    `layer4`.

    "code": an entry, read raw, then the last bottlenecks from its scale on. The entry is what the first pooling gives
    (ResNet-50: `maxpool`, then `layer1` to `layer4`); where no module pools to a map, it is the first map coarser than
    the image, of the outermost module that stays at that scale (MiniResNet: `stem`, then `layer1` to `layer4`). An
    entry that is the last of its scale too is read once.

    Raises:
        UnsuitedError: fewer than two scales, as in a transformer.
        ValueError: neither "code" nor "paper".
    """
    if taps not in ("code", "paper"):
        raise ValueError(f"expected taps 'code' (the authors' program) or 'paper' (its text), got {taps!r}")
    with differentiable(), frozen(classifier.model):
        found = look(classifier)
        last = last_of_scales(found)
        first = entry(found) if taps == "code" else None
    kept = [place for place in last if first is None or place.level >= first.level]
    if len({place.level for place in kept}) < 2:
        raise UnsuitedError(
            f"CASM reads maps of two or more scales through which the whole image passes, and "
            f"{type(classifier.model).__name__} has {len(kept)} on {classifier.size[0]} x {classifier.size[1]} images; "
            "take a convolutional network that downscales in steps, such as resnet50 or mini_resnet, or explain this "
            "one with a method that needs no scales, such as rise"
        )
    again = first is not None and first.output is kept[0].output
    places = kept if first is None or again else [first, *kept]
    return tuple(tap(place, classifier.size[0], raw=first is not None and n == 0) for n, place in enumerate(places))


def tap(place: Place, height: int, *, raw: bool) -> Tap:
    """Return a place as a tap."""
    channels, rows, _ = place.shape
    return Tap(place.name, channels, round(height / rows), place.to_grid, raw)


def last_of_scales(found: Probe) -> list[Place]:
    """Return the last bottleneck of every scale that no pooling made, in order of the scales."""
    own = [place for place in reversed(list(places(found))) if not place.pooled]
    levels = sorted({place.level for place in own})
    last = (next((p for p in own if p.level == level and bottleneck(p.output, found)), None) for level in levels)
    return [place for place in last if place is not None]


def entry(found: Probe) -> Place | None:
    """Return the bottleneck at which the finest scale begins; None where nothing is coarser than the image."""
    coarser = [place for place in places(found) if place.level > 0 and bottleneck(place.output, found)]
    pooled = next((place for place in coarser if place.pooled), None)
    if pooled is not None or not coarser:
        return pooled
    begin = min(coarser, key=lambda place: place.level)
    around = [p for p in coarser if p.level == begin.level and f"{begin.name}.".startswith(f"{p.name}.")]
    return min(around, key=lambda place: place.name.count("."))


def places(found: Probe) -> Iterator[Place]:
    """Yield the maps of more than one cell that a module's last call gave, in the order in which they were made."""
    makers = {id(one.output): one for one in reversed(found.seen)}
    calls: Mapping[str, Seen] = {one.name: one for one in found.seen}
    steps = strides(found)
    for one in found.seen:
        to_grid = grid_of(one, found, steps) if one.output.ndim == 4 else None
        name = outermost(one, found)
        if to_grid is None or calls[name].output is not one.output:
            continue
        _, channels, i, j = to_grid(one.output, found.x).shape
        if i * j > 1:
            pooled = passive(makers[id(one.output)].module)
            yield Place(name, one.output, to_grid, (channels, i, j), halvings(found.x.shape[2:], (i, j)), pooled)


def halvings(image: Sequence[int], grid: Sequence[int]) -> int:
    """Return how often the image was halved: log2 of a cell's side in pixels, rounded."""
    return round(math.log2(image[0] * image[1] / (grid[0] * grid[1])) / 2)


def bottleneck(output: Tensor, found: Probe) -> bool:
    """Tell whether the image reaches the logits through this output alone."""
    return reaches(found, None) and not reaches(found, output)


def reaches(found: Probe, without: Tensor | None) -> bool:
    """Tell whether the image reaches the logits when an output is cut off."""
    done: set[Any] = {None, None if without is None else without.grad_fn}
    left: list[Any] = [found.reads.grad_fn]
    while left:
        node = left.pop()
        if node in done:
            continue
        if hasattr(node, "variable"):
            return True
        done.add(node)
        left += [before for before, _ in node.next_functions]
    return False
