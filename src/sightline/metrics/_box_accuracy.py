"""Box accuracy. How often a box of the thresholded map meets a true box, at one threshold and at the best one.

Choe, Oh, Lee, Chun, Akata and Shim, Evaluating weakly supervised object localization methods right, CVPR 2020: the
largest contour (MaxBoxAcc); Choe et al., Evaluation for weakly supervised object localization, TPAMI 2022: all contours
and three overlaps (MaxBoxAccV2).

The published scheme traces the contours of every image at 1,000 thresholds. Here the boxes of all regions at all
thresholds are found at once: every pixel climbs to a peak of the map; the region of a threshold is the union of the
parts above it of those peaks' basins that meet above it; so one box a basin and level, united from the highest ridge
between basins down, gives every box, hole and size without tracing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sightline.metrics._measure import Case, Measure
from sightline.metrics._pxap import Resize, check_resize, scaled
from sightline.registry import unknown

Protocol: TypeAlias = Literal["official", "exact"]
Regions: TypeAlias = Literal["largest", "all"]
Connectivity: TypeAlias = Literal[4, 8]
Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Grid: TypeAlias = NDArray[np.int32]

MOST = 10_000
"""Thresholds; fourteen bits of a key hold them."""

PLACE = 28
"""Bits of a key for a pixel's place, below the bits of its value."""

FINE = 20
"""Bits of a key for what tells values of one level apart."""

OUTWARD = np.array([1, 1, -1, -1])
"""Signs of x0, y0, x1, y1 with which the outermost border is the smallest number."""

STEPS = (0, 1), (1, 0), (1, 1), (1, -1)
"""Rows and columns to half of the neighbors of a pixel; the first two of them are all with 4-connectivity."""


@dataclass(frozen=True)
class Search:
    """How boxes are searched for: the thresholds, as shares of the map's maximum, and what is done at each."""

    thresholds: tuple[float, ...]
    regions: Regions
    protocol: Protocol
    resize: Resize
    connectivity: Connectivity

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            LookupError: an unknown choice.
            ValueError: no threshold, too many, one outside [0, 1), or a connectivity that the protocol lacks.
        """
        check_resize(self.resize)
        choices = (self.regions, ("largest", "all"), "regions"), (self.protocol, ("official", "exact"), "protocol")
        for given, known, kind in choices:
            if given not in known:
                raise LookupError(unknown(given, known, kind))
        if self.connectivity not in (4, 8) or (self.connectivity == 4 and self.protocol == "official"):
            raise ValueError(
                f"expected connectivity 8, or 4 with protocol='exact', got {self.connectivity} with {self.protocol!r}"
            )
        if not 1 <= len(self.thresholds) <= MOST:
            raise ValueError(f"expected 1 to {MOST} thresholds, got {len(self.thresholds)}")
        if not all(0 <= one < 1 for one in self.thresholds):
            raise ValueError(f"expected a threshold in [0, 1), a share of the maximum, got {self.thresholds[0]}")


def box_accuracy(
    *,
    threshold: float = 0.2,
    iou: float = 0.5,
    regions: Regions = "largest",
    protocol: Protocol = "official",
    resize: Resize = "bicubic",
    connectivity: Connectivity = 8,
) -> Measure:
    """Measure BoxAcc(eta, delta) = mean 100 1[max_B IoU(B, B_eta) >= delta], in percent, higher is better.

    B are the label's boxes, B_eta the box of {s > eta max s} at eta = `threshold`, delta = `iou`. The default is the
    20 % of the maximum of Zhou et al. (CAM), since Choe et al. fix no threshold. The map s, the two protocols and what
    does not count are those of `max_box_accuracy`; with regions="all" the best box of all regions counts.
    Opti-CAM's B.5 is protocol="exact", resize="bilinear".

    Raises:
        LookupError: an unknown choice.
        ValueError: a threshold outside [0, 1), `iou` outside [0, 1], connectivity 4 with the official protocol, or an
            image with neither boxes nor a mask.
    """
    search = Search((threshold,), regions, protocol, resize, connectivity)
    check_overlaps((iou,))

    def score(case: Case) -> Tensor:
        return 100 * accuracies(overlaps(case, search, "box_accuracy"), (iou,))

    return Measure(score, higher_is_better=True)


def max_box_accuracy(
    *,
    iou: float = 0.5,
    thresholds: int = 1000,
    protocol: Protocol = "official",
    resize: Resize = "bicubic",
    connectivity: Connectivity = 8,
) -> Measure:
    """Measure MaxBoxAcc = max_eta mean 100 1[max_B IoU(B, B_eta) >= delta], in percent, higher is better.

    B_eta is the box of the largest region of {s > eta max s}, eta = 0, 1/n, ..., (n - 1)/n with n = `thresholds`, and
    one eta is chosen for the whole data set; delta = `iou` (Choe et al. 2020). s is the raw map at the input's
    resolution, min-max scaled image by image; bicubic as in the official code (bilinear: as every other metric here).
    The curve is the accuracy against eta; there are no numbers of single images.

    protocol="official" repeats the published evaluation to the digit: s is truncated to 256 levels and eta times the
    maximum too; the largest region is the contour with the largest polygon through pixel centers; its box
    (x, y, x + w, y + h) is cut off at size - 1; boxes are inclusive, so sides are x1 - x0 + 1; no region gives the
    box 0 0 0 0, one pixel; true boxes are truncated to whole pixels. "exact" takes s as it is, the region with the most
    pixels (of equal ones the first in row-major order), and half-open boxes; no region overlaps nothing. Regions are
    8-connected; `connectivity` 4 may be asked of the exact protocol.

    A constant or non-finite map has no region. True boxes may reach beyond the image; their whole area counts, and a
    box without area or outside the image is missed. An image without a box of its label does not count.

    Raises:
        LookupError: an unknown choice.
        ValueError: fewer than one or more than 10,000 thresholds, `iou` outside [0, 1], connectivity 4 with the
            official protocol, or an image with neither boxes nor a mask.
    """
    search = Search(evenly(thresholds), "largest", protocol, resize, connectivity)
    return maximum(search, (iou,), "max_box_accuracy")


def max_box_accuracy_v2(
    *,
    iou: Sequence[float] = (0.3, 0.5, 0.7),
    thresholds: int = 1000,
    regions: Regions = "all",
    protocol: Protocol = "official",
    resize: Resize = "bicubic",
    connectivity: Connectivity = 8,
) -> Measure:
    """Measure MaxBoxAccV2 = mean_delta max_eta mean 100 1[max IoU(B, B_eta) >= delta], in percent, higher is better.

    Every region of {s > eta max s} has a box B_eta, and the best one counts; for each delta of `iou` one eta is chosen
    for the whole data set (Choe et al. 2022). The curve is the mean accuracy over the deltas against eta, so its
    maximum is at most the number. All else is as in `max_box_accuracy`.

    protocol="official" takes the box of every contour, and so of every hole too: its outline is made of the pixels
    around it. "exact" takes regions alone. regions="largest" with protocol="exact" is the box accuracy that Opti-CAM
    prints.

    Raises:
        LookupError: an unknown choice.
        ValueError: as `max_box_accuracy`, or no overlap at all.
    """
    return maximum(
        Search(evenly(thresholds), regions, protocol, resize, connectivity), tuple(iou), "max_box_accuracy_v2"
    )


def maximum(search: Search, iou: tuple[float, ...], metric: str) -> Measure:
    """Return the measure of the accuracy at each overlap's best threshold."""
    check_overlaps(iou)

    def score(case: Case) -> Tensor:
        return 100 * accuracies(overlaps(case, search, metric), iou)

    def finish(numbers: Tensor) -> Tensor:
        return numbers.view(len(iou), -1).amax(1).mean()

    def curve(numbers: Tensor) -> Tensor:
        return numbers.view(len(iou), -1).mean(0)

    width = len(iou) * len(search.thresholds)
    return Measure(score, True, state="mean", width=width, finish=finish, curve=curve, axis=search.thresholds)


def accuracies(overlap: Float[Tensor, "b n"], iou: tuple[float, ...]) -> Float[Tensor, "b width"]:
    """Return 1 where the overlap of a threshold reaches delta and 0 elsewhere, delta by delta; NaN stays."""
    hit = torch.stack([(overlap >= delta).to(overlap.dtype) for delta in iou], 1)
    return torch.where(overlap[:, None].isnan(), torch.nan, hit).flatten(1)


def overlaps(case: Case, search: Search, metric: str) -> Float[Tensor, "b n"]:
    """Return the best overlap of each image at each threshold; NaN where there is no box of the label."""

    def make() -> Tensor:
        s = scaled(case, search.resize)[:, 0].cpu().numpy()
        rows = [one(s[i], case.boxes(i, metric).numpy(), search) for i in range(len(s))]
        return torch.from_numpy(np.stack(rows)).to(case.raw.device)

    return case.once(("box overlaps", search), make)


def one(s: NDArray[Any], B: Floats, search: Search) -> Floats:
    """Return one image's part of `overlaps`."""
    return best_overlaps(s, B, search) if len(B) else np.full(len(search.thresholds), np.nan)


def best_overlaps(s: NDArray[Any], B: Floats, search: Search) -> Floats:
    """Return max IoU(B, B_eta) over the true boxes and the boxes of a map in [0, 1], at each threshold."""
    rank, group = leveled(s, search)
    found, level = candidates(rank, s, search) if rank.any() else (np.zeros((1, 4), np.int64), np.zeros(1, np.int64))
    best = np.zeros(int(level.max()) + 1)
    if search.protocol == "official":
        B, found[:, 2:] = np.trunc(B), np.minimum(found[:, 2:], np.array(s.shape[::-1]) - 1)
    np.maximum.at(best, level, ious(found, B, 1 if search.protocol == "official" else 0).max(1))
    return best[group]


def leveled(s: NDArray[Any], search: Search) -> tuple[Integers, Integers]:
    """Return the level of each pixel of a map in [0, 1], and that of each threshold.

    A threshold of level g marks s > eta max s, which are the pixels of a level above g. Levels have no gaps: thresholds
    that mark the same pixels share one.
    """
    eta = np.array(search.thresholds)
    if search.protocol == "exact":
        depth = np.searchsorted(eta * float(s.max()), s.astype(np.float64))
        below = gapless(depth, len(eta))
        return below.take(depth), below[:-1]
    q = (s * 255).astype(np.uint8)
    depth = np.searchsorted((eta * q.max()).astype(np.int64), np.arange(256))
    below = gapless(depth[np.bincount(q.ravel()).nonzero()[0]], len(eta))
    return below[depth].take(q), below[:-1]


def gapless(depth: Integers, count: int) -> Integers:
    """Return how many different numbers of `depth` lie above 0 and up to each of 0 to `count`."""
    present = np.zeros(count + 1, bool)
    present[depth] = True
    present[0] = False
    return np.cumsum(present)


def candidates(rank: Integers, s: NDArray[Any], search: Search) -> tuple[Integers, Integers]:
    """Return the boxes that count, half-open, and the level of each."""
    if search.regions == "largest" and search.protocol == "official":
        return contours(rank)
    fine = (s * (2**FINE - 1)).astype(np.int64)
    if search.regions == "largest":
        return most_pixels(rank, fine, search.connectivity)
    outer = components(rank, fine, search.connectivity)
    if search.protocol == "exact":
        return outer
    inner = holes(rank, fine)
    return np.concatenate([outer[0], inner[0]]), np.concatenate([outer[1], inner[1]])


def contours(rank: Integers) -> tuple[Integers, Integers]:
    """Return the box of the contour with the largest area at each level; of equal ones the one that OpenCV gives first.

    A hole's contour lies inside its region's, so outer ones are enough.
    """
    levels, shown = np.arange(int(rank.max())), rank.astype(np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    for level in levels:
        marked = cv2.threshold(shown, float(level), 1, cv2.THRESH_BINARY)[1]
        traced = cv2.findContours(marked, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        x, y, w, h = cv2.boundingRect(max(traced, key=cv2.contourArea))
        boxes.append((x, y, x + w, y + h))
    return np.array(boxes), levels


def components(rank: Integers, fine: Integers, connectivity: Connectivity) -> tuple[Integers, Integers]:
    """Return the half-open boxes of the connected regions of all levels, and the level of each."""
    found = basins(rank, fine, connectivity)
    region, level = found.alive.nonzero()
    return extents(found, rank)[region, :, level].astype(np.int64) * OUTWARD, level


def holes(rank: Integers, fine: Integers) -> tuple[Integers, Integers]:
    """Return the half-open boxes of the outlines of the holes of all levels, and the level of each.

    A hole is a 4-connected region of what is not marked, away from the border; its outline are the pixels around it.
    """
    top, finest = int(rank.max()), 2**FINE - 1
    depth = np.pad(top - rank, 1, constant_values=top)
    found = basins(depth, np.pad(finest - fine, 1, constant_values=finest), 4)
    found.alive[-1] = False  # the frame: the last pixel is its peak, and regions join towards the later peak
    region, level = found.alive.nonzero()
    boxes = extents(found, depth)[region, :, level].astype(np.int64) * OUTWARD
    return boxes + np.array([-2, -2, 0, 0]), top - 1 - level


def most_pixels(rank: Integers, fine: Integers, connectivity: Connectivity) -> tuple[Integers, Integers]:
    """Return the half-open box of the region with the most pixels at each level; of equal ones the first by rows.

    A basin that has joined another one has fewer pixels than it below, so it needs no sorting out.
    """
    found = basins(rank, fine, connectivity)
    size, first = sizes(found, rank), firsts(found, rank)
    region = np.where(size == size.max(0), first, rank.size).argmin(0)
    level = np.arange(found.alive.shape[1])
    return extents(found, rank)[region, :, level].astype(np.int64) * OUTWARD, level


@dataclass(frozen=True, eq=False)
class Basins:
    """Where each pixel climbs to, and how what lies above a level hangs together.

    `label`: the number of the peak at the end of each pixel's steepest ascent, peaks by rows. `joins`: rows of (basin,
    another one of a larger number, level), the highest first: below the level the first is a part of the second.
    `alive`: at which levels a basin is a region of its own, with all that has joined it.
    """

    label: Grid
    joins: Integers
    alive: NDArray[np.bool_]


def basins(rank: Integers, fine: Integers, connectivity: Connectivity) -> Basins:
    """Return the basins of a map of levels; `fine` orders pixels of one level, so that plateaus have few peaks."""
    place = np.arange(rank.size).reshape(rank.shape)
    key = (rank << (PLACE + FINE)) | (fine << PLACE) | place
    across = spread(key, 1)
    best = spread(across, 0) if connectivity == 8 else np.maximum(across, spread(key, 0))
    up = (best & (2**PLACE - 1)).ravel()
    while not np.array_equal(further := up.take(up), up):
        up = further
    peaks = (up == place.ravel()).nonzero()[0]
    number = np.zeros(rank.size, np.int32)
    number[peaks] = np.arange(len(peaks))
    label = number.take(up).reshape(rank.shape)
    joins = joined(ridges(label, rank, connectivity), len(peaks))
    level, death = np.arange(int(rank.max())), np.zeros(len(peaks), np.int64)
    death[joins[:, 0]] = joins[:, 2]
    return Basins(label, joins, (level < rank.ravel()[peaks, None]) & (level >= death[:, None]))


def spread(key: Integers, axis: int) -> Integers:
    """Return at each place the largest key of it and its two neighbors along an axis."""
    largest = key.copy()
    source, target = key.swapaxes(0, axis), largest.swapaxes(0, axis)
    np.maximum(target[1:], source[:-1], out=target[1:])
    np.maximum(target[:-1], source[1:], out=target[:-1])
    return largest


def ridges(label: Grid, rank: Integers, connectivity: Connectivity) -> Integers:
    """Return the highest pass between each two adjoining basins, the highest first, as rows of (a, b, level), a < b."""
    basin, level = label.ravel(), rank.ravel()
    a, b = np.concatenate([fronts(basin, label.shape[1], *step) for step in STEPS[: connectivity // 2]], 1)
    height = np.minimum(level.take(a), level.take(b))
    a, b, count, levels = basin.take(a), basin.take(b), int(basin.max()) + 1, int(level.max()) + 1
    key = np.sort((np.minimum(a, b).astype(np.int64) * count + np.maximum(a, b)) * levels + height)
    pair, height = np.divmod(key, levels)
    last = (np.diff(pair, append=-1) != 0) & (height > 0)
    passes = np.stack([*np.divmod(pair[last], count), height[last]], 1)
    return passes[np.argsort(-passes[:, 2], kind="stable")]


def fronts(basin: NDArray[np.int32], width: int, down: int, across: int) -> Integers:
    """Return the places where a basin adjoins another one so many rows and columns on, and the places of the other.

    Places count along the rows, so what lies beyond a row's end is sorted out.
    """
    step = down * width + across
    here = (basin[: max(0, len(basin) - step)] != basin[step:]).nonzero()[0]
    column = here % width + across
    here = here[(column >= 0) & (column < width)]
    return np.stack([here, here + step])


def joined(passes: Integers, count: int) -> Integers:
    """Return the passes that join two regions not joined higher up, each between the regions' last basins."""
    last, joins = list(range(count)), list[tuple[int, int, int]]()
    for a, b, level in passes.tolist():
        a, b = end(last, a), end(last, b)
        if a != b:
            last[min(a, b)] = max(a, b)
            joins.append((min(a, b), max(a, b), level))
    return np.array(joins, np.int64).reshape(-1, 3)


def end(last: list[int], basin: int) -> int:
    """Return the last basin of a basin's region, and shorten the way to it."""
    while last[basin] != basin:
        last[basin] = last[last[basin]]
        basin = last[basin]
    return basin


def extents(found: Basins, rank: Integers) -> NDArray[Any]:
    """Return x0, y0, -x1, -y1 of the region of each basin at each level where it is alive, as (basins, 4, levels)."""
    h, w = rank.shape
    count, levels = found.alive.shape
    kind = np.int16 if h + w < 2**15 else np.int32  # the table is most of what this needs: 2 kB a peak of the map
    table = np.full((count, 4, levels + 1), h + w, kind)
    flat, cell = table.reshape(-1), found.label * np.int64(4 * (levels + 1)) + rank
    x, y = np.arange(w, dtype=kind), np.arange(h, dtype=kind)
    falling = (cell.T[::-1], x[::-1], h), (cell[::-1], y[::-1], w), (cell.T, -1 - x, h), (cell, -1 - y, w)
    for number, (places, values, times) in enumerate(falling):  # of several values at one place the last one stays
        flat[number * (levels + 1) :][places.ravel()] = values.repeat(times)
    return united(table, found.joins, np.minimum)


def sizes(found: Basins, rank: Integers) -> Integers:
    """Return the number of pixels of the region of each basin at each level where it is alive."""
    count, levels = found.alive.shape
    cell = found.label * np.int64(levels + 1) + rank
    table = np.bincount(cell.ravel(), minlength=count * (levels + 1)).reshape(count, levels + 1)
    return united(table, found.joins, np.add)


def firsts(found: Basins, rank: Integers) -> Integers:
    """Return the place, by rows, of the first pixel of the region of each basin at each level where it is alive."""
    count, levels = found.alive.shape
    table = np.full((count, levels + 1), rank.size)
    cell = found.label * np.int64(levels + 1) + rank
    table.reshape(-1)[cell[::-1, ::-1].ravel()] = np.arange(rank.size)[::-1].copy()
    return united(table, found.joins, np.minimum)


def united(table: NDArray[Any], joins: Integers, combine: np.ufunc) -> NDArray[Any]:
    """Return what a table of (basin, ..., rank) says of what lies above each level, with all that has joined there."""
    above = table[..., :0:-1]
    combine.accumulate(above, axis=-1, out=above)
    above = above[..., ::-1]
    for a, b, level in joins.tolist():
        part = above[b, ..., :level]
        combine(part, above[a, ..., :level], out=part)
    return above


def ious(found: Integers, B: Floats, unit: int) -> Floats:
    """Return the overlap of each found box with each true box; sides are x1 - x0 + unit, no area is an overlap of 0."""
    x0, y0, x1, y1 = found[:, :, None].astype(np.float64).swapaxes(0, 1)
    across = (np.minimum(x1, B[:, 2]) - np.maximum(x0, B[:, 0]) + unit).clip(0)
    inside = across * (np.minimum(y1, B[:, 3]) - np.maximum(y0, B[:, 1]) + unit).clip(0)
    union = (x1 - x0 + unit) * (y1 - y0 + unit) + area(B, unit) - inside
    overlap: Floats = inside / np.where(union > 0, union, 1)
    return overlap


def area(B: Floats, unit: int) -> Floats:
    """Return the area of each box; 0 where it ends before it starts."""
    size: Floats = (B[:, 2] - B[:, 0] + unit).clip(0) * (B[:, 3] - B[:, 1] + unit).clip(0)
    return size


def evenly(count: int) -> tuple[float, ...]:
    """Return 0, 1/n, ..., (n - 1)/n.

    Raises:
        ValueError: n below one.
    """
    if count < 1:
        raise ValueError(f"expected at least one threshold, got thresholds={count}")
    return tuple((np.arange(count) * (1 / count)).tolist())


def check_overlaps(iou: tuple[float, ...]) -> None:
    """Check the overlaps at which a box counts.

    Raises:
        ValueError: none, or one outside [0, 1].
    """
    if not iou or not all(0 <= one <= 1 for one in iou):
        raise ValueError(f"expected overlaps in [0, 1], at least one, got iou={', '.join(map(str, iou)) or 'none'}")
