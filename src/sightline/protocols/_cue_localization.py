"""Cue localization. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021.

Where do the maps of two classes differ? On the parts in which the classes do (section 5.2; the published code where it
departs from the paper).
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.data import Batch, Indexed, Sample, batches, collate
from sightline.evaluation import Maps, checked_batch
from sightline.maps import blur as blurred
from sightline.maps import by_maximum, resize, unit
from sightline.methods._normalized import Normalize
from sightline.metrics import finite
from sightline.metrics._pxap import average_precision, histogram_average_precision
from sightline.protocols._cues import Cues, Marks, Masks, Rule, cues_of
from sightline.registry import chosen
from sightline.runs import Choice, Score
from sightline.types import Saliency

Rescale: TypeAlias = Literal["none", "max", "unit", "clip"]
Spacing: TypeAlias = Literal["linear", "log"]
Pair: TypeAlias = tuple[int, int]
Pool: TypeAlias = tuple[Tensor, Tensor]
"""The scores of the pixels on the cue and of the others, or how many of either lie in each bin."""

NORMALIZED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda maps: maps,
    "max": lambda maps: by_maximum(maps.clamp(min=0)),
    "unit": unit,
}
RESCALED: Mapping[str, Callable[[Tensor], Tensor]] = {**NORMALIZED, "clip": lambda maps: maps.clamp(0, 1)}

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
"""What pairs that differ in so many parts are called."""

ROUNDING = 1e-6
"""Share of the larger map's peak up to which a difference is rounding: maps that know no class differ by nothing."""


def cue_localization(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    masks: Masks = "auto",
    pairs: Sequence[Sequence[int]] | None = None,
    distances: Sequence[int] = (1, 2, 3),
    limit: int | None = None,
    mapping: Rule = "substring",
    segmentation: bool = True,
    normalize: Normalize = "max",
    rescale: Rescale = "none",
    blur: float = 0.0,
    bins: int = 0,
    spacing: Spacing = "linear",
    drop_below: float = 0.0,
    reset: bool = True,
    batch: int = 16,
) -> dict[str, Score]:
    """Measure how well |s^A - s^B| finds what tells class A from class B: mPxAP in percent, higher is better.

        PxAP(A, B) = sum_k P_k (R_k - R_(k-1)) over the pixels of all images of A and B, scores |up(n(S_A) - n(S_B))|
        mPxAP      = mean over the pairs of classes that differ in one, two or three parts, and over all ("mean")

    S_A, S_B are the maps of the same image for both classes; they are subtracted at their own resolution, and the
    difference is resized bilinearly; below 1e-6 of the maps' peak it is rounding, and none. Maps that do not depend on
    the class get the share of the cue's pixels. Images without a visible differing part are skipped, and pixels that a
    mask ignores (255); a map that is not finite counts as zero. A pair without images, or without a pixel of the cue,
    does not count: `curve` holds the PxAP of every pair in order, NaN for such a one, and `count` is the number of
    pairs that do; without any the value is NaN. Every map is made once. With `bins=0` the pixels of a pair stay in
    memory until both of its classes are explained, those of all pairs without `reset`; with bins only counts do.

    *Differs:* thresholds are all scores, where the paper has [0, 1] and its code 1000 bins (`bins`, `spacing`); maps
    are normalized before they are subtracted, as the paper says, while the code subtracts raw maps and rescales the
    difference (`normalize="none", rescale="unit"`; for CALM `rescale="clip"`). The code never resets its counts
    between pairs (`reset=False`) and drops what its logarithmic thresholds do not reach (`drop_below=1e-7`).

    Args:
        method: what is judged.
        classifier: what it explains.
        samples: images of creatures, cub or cub_crops, or a wrapper around them.
        masks: "exact", the visible pixels of the differing parts (creatures); "keypoints", the pixels whose nearest
            keypoint is of a differing part, on the animal; "auto", exact where that is known.
        pairs: classes of the data set, two and two; by default all that differ in so many parts as `distances` says.
        distances: numbers of differing parts.
        limit: take at most so many pairs of each distance, evenly spaced; None takes all.
        mapping: how CUB's attributes find their part, see `part_of`.
        segmentation: keep of a keypoint mask what lies on the animal, where a sample has a mask; warns where none has.
        normalize: n, each map: "max" [S]_+ / max S (CAM, equation 2), "unit" (S - min S) / (max S - min S), or "none"
            (CALM, whose maps are probabilities).
        rescale: the same of each image's |difference|, or "clip" to [0, 1].
        blur: standard deviation of a Gaussian over each map, as a share of its side: 1/28 for gradients (the paper
            blurs and gives no width), 0 for none.
        bins: how many bins between 0 and 1; 0 counts every score on its own. Scores of one or more have a last bin of
            their own.
        spacing: "linear" bins, or "log" ones from 1e-7 with one more below that.
        drop_below: pixels with a lower score are neither right nor wrong; 0 keeps all.
        reset: whether each pair stands alone; else it is measured on its pixels and those of all pairs before it.
        batch: images explained at a time.

    Raises:
        LookupError: an unknown choice.
        ValueError: samples of a data set that does not know where its classes differ, or that lack labels or keypoints;
            a pair of equal or unknown classes; a number out of range; scores above one in bins that end there.
    """
    check_numbers(distances, limit, blur, bins, drop_below)
    cues, edges = cues_of(samples, mapping), bin_edges(bins, spacing)
    groups = grouped(cues, distances, limit) if pairs is None else sorted_out(cues, pairs)
    listed = [pair for group in groups.values() for pair in group]
    trial = Trial(
        maps=Maps.of_method(method),
        classifier=classifier,
        cues=cues,
        marking=cues.marking(masks, segmentation),
        normalize=chosen(normalize, NORMALIZED, "normalization"),
        rescale=chosen(rescale, RESCALED, "rescaling"),
        blur=blur,
        edges=edges,
        drop_below=drop_below,
        batch=batch,
    )
    pools = evidence(trial, samples, listed)
    values = alone(pools, edges) if reset else cumulative(dict(pools), listed, edges)
    parts = {WORDS[d]: groups.get(d, []) for d in sorted({1, 2, 3, *groups})} | {"mean": listed}
    return {part: scored(part, [values[pair] for pair in group]) for part, group in parts.items()}


@dataclass(frozen=True, eq=False)
class Trial:
    """What stays the same from pair to pair."""

    maps: Maps
    classifier: Classifier
    cues: Cues
    marking: Callable[[Sample], Marks]
    normalize: Callable[[Tensor], Tensor]
    rescale: Callable[[Tensor], Tensor]
    blur: float
    edges: Tensor | None
    drop_below: float
    batch: int

    def pools(self, images: Batch, number: int, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Pool]]:
        """Yield the pixels of each image of class `number`, for every pair whose cue is visible in it."""
        images, marks = checked_batch(images, self.classifier), [self.marking(sample) for sample in images.samples]
        found = [(row, pair, mark(*pair)) for row, mark in enumerate(marks) for pair in pairs]
        jobs = [(row, pair, cue) for row, pair, cue in found if cue is not None]
        if not jobs:
            return
        own = self.scaled(images, [self.cues.label(number)] * len(images))
        for start in range(0, len(jobs), self.batch):
            some = jobs[start : start + self.batch]
            rows, rivals = [row for row, _, _ in some], [self.cues.label(sum(pair) - number) for _, pair, _ in some]
            others = collate([images.samples[row] for row in rows]).to(images.x.device)
            scores = self.difference(own[rows], self.scaled(others, rivals), images)
            for one, sample, (_, pair, cue) in zip(scores, others.samples, some, strict=True):
                yield pair, self.pool(one, sample, cue)

    def scaled(self, images: Batch, labels: Sequence[int]) -> Saliency:
        """Return a map of each image, blurred and normalized, at its own resolution."""
        S = finite(self.maps.of(self.classifier, images, torch.tensor(labels, device=images.x.device)))
        return self.normalize(blurred(S, self.blur * math.sqrt(S.shape[2] * S.shape[3])))

    def difference(self, a: Saliency, b: Saliency, images: Batch) -> Float[Tensor, "n h w"]:
        """Return |s^A - s^B| at the images' resolution; what two runs of one network may differ by counts as zero."""
        noise = ROUNDING * torch.maximum(a.abs(), b.abs()).amax((2, 3), keepdim=True)
        apart = torch.where((a - b).abs() > noise, a - b, 0)
        return self.rescale(resize(apart, (images.x.shape[2], images.x.shape[3])).abs())[:, 0]

    def pool(self, scores: Float[Tensor, "h w"], sample: Sample, cue: Bool[Tensor, "h w"]) -> Pool:
        """Return the scores of the pixels that count."""
        counted = scores >= self.drop_below
        if sample.mask is not None:
            counted = counted & (sample.mask != 255).to(scores.device)
        cue = cue.to(scores.device)
        return self.kept(scores[cue & counted]), self.kept(scores[~cue & counted])

    def kept(self, scores: Float[Tensor, " n"]) -> Tensor:
        """Return the scores, or how many there are in each bin.

        Raises:
            ValueError: a score above one, for which there is no bin.
        """
        if self.edges is None:
            return scores
        if len(scores) and float(scores.max()) > 1 + 1e-6:
            raise ValueError(
                f"a difference of {float(scores.max()):.4g} lies outside [0, 1], which the bins divide; use "
                "normalize='max', rescale='unit' or bins=0"
            )
        bins = torch.bucketize(scores.double(), self.edges.to(scores.device), right=True)
        return bins.bincount(minlength=len(self.edges) + 1).double()


def evidence(trial: Trial, samples: Indexed[Sample], pairs: Sequence[Pair]) -> Iterator[tuple[Pair, list[Pool]]]:
    """Yield every pair with its pixels as soon as both of its classes are explained, class by class.

    Raises:
        ValueError: a sample without a label.
    """
    places = places_of(samples, warn=trial.marking == trial.cues.within)
    waiting: dict[Pair, list[Pool]] = defaultdict(list)
    for number in sorted({number for pair in pairs for number in pair}):
        mine = [pair for pair in pairs if number in pair]
        for images in batches(samples, trial.batch, places[trial.cues.label(number)]):
            for pair, pool in trial.pools(images, number, mine):
                waiting[pair].append(pool)
        for pair in mine:
            if number == max(pair):
                yield pair, waiting.pop(pair, [])


def places_of(samples: Indexed[Sample], *, warn: bool) -> Mapping[int, list[int]]:
    """Return where the images of each label are, and `warn` where they have no mask.

    Raises:
        ValueError: a sample without a label.
    """
    places: dict[int, list[int]] = defaultdict(list)
    bare = 0
    for index in range(len(samples)):
        sample = samples[index]
        if sample.label is None:
            raise ValueError(f"cue_localization goes by the classes of the images, and {sample.id!r} has no label")
        places[sample.label].append(index)
        bare += sample.mask is None
    if warn and bare:
        warnings.warn(
            f"{bare} of {len(samples)} images have no segmentation: their cues are all pixels nearest to the parts, "
            "background included; segmentation=False says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
    return places


def bin_edges(bins: int, spacing: str) -> Tensor | None:
    """Return the lower edges of all bins but the first, which begins at zero; None for no bins.

    Edge k of K is k / K (linear) or 10^(7 (k / K - 1)) (log).

    Raises:
        LookupError: an unknown spacing.
    """
    edges = chosen(spacing, SPACED, "spacing")
    return edges(torch.arange(1, bins + 1, dtype=torch.float64) / bins) if bins else None


SPACED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda shares: shares,
    "log": lambda shares: 10 ** (7 * (shares - 1)),
}


def alone(pools: Iterable[tuple[Pair, list[Pool]]], edges: Tensor | None) -> dict[Pair, float]:
    """Return the PxAP of each pair on its own pixels."""
    return {pair: precision(pool, edges) for pair, pool in pools}


def cumulative(pools: Mapping[Pair, list[Pool]], pairs: Sequence[Pair], edges: Tensor | None) -> dict[Pair, float]:
    """Return the PxAP of each pair on its own pixels and those of the pairs before it; NaN where it has none."""
    values: dict[Pair, float] = {}
    before: list[Pool] = []
    for pair in pairs:
        before = [joined([*before, *pools[pair]], edges)] if pools[pair] else before
        values[pair] = precision(before, edges) if pools[pair] else math.nan
    return values


def joined(pools: Sequence[Pool], edges: Tensor | None) -> Pool:
    """Return several pools as one."""
    inside, outside = zip(*pools, strict=True)
    if edges is None:
        return torch.cat(inside), torch.cat(outside)
    return torch.stack(inside).sum(0), torch.stack(outside).sum(0)


def precision(pools: Sequence[Pool], edges: Tensor | None) -> float:
    """Return the average precision in percent; NaN where there is no pixel on the cue."""
    if not pools:
        return math.nan
    inside, outside = joined(pools, edges)
    if edges is not None:
        return 100 * float(histogram_average_precision(inside, outside))
    truth = torch.cat([torch.ones_like(inside), torch.zeros_like(outside)]).bool()
    return 100 * average_precision(torch.cat([inside, outside]), truth)


def scored(part: str, values: Sequence[float]) -> Score:
    """Return the mean over the pairs that count."""
    counted = [value for value in values if not math.isnan(value)]
    mean = math.fsum(counted) / len(counted) if counted else math.nan
    return Score(Choice(part), mean, higher_is_better=True, curve=tuple(values), count=len(counted))


def grouped(cues: Cues, distances: Sequence[int], limit: int | None) -> dict[int, list[Pair]]:
    """Return the pairs of classes that differ in so many parts, at most `limit` of each, evenly spaced."""
    every = {distance: cues.classes.close_pairs(distance) for distance in sorted(set(distances))}
    numbers = {distance: len(pairs) if limit is None else min(limit, len(pairs)) for distance, pairs in every.items()}
    return {d: [pairs[k * len(pairs) // numbers[d]] for k in range(numbers[d])] for d, pairs in every.items()}


def sorted_out(cues: Cues, pairs: Sequence[Sequence[int]]) -> dict[int, list[Pair]]:
    """Return given pairs by the number of parts in which they differ.

    Raises:
        ValueError: a pair that is none, of classes that are alike or do not exist, or listed twice.
    """
    groups: dict[int, list[Pair]] = defaultdict(list)
    for given in pairs:
        if len(given) != 2:
            raise ValueError(f"expected pairs of two classes, got {list(given)}")
        pair = (min(given), max(given))
        if not (apart := cues.classes.differing(*pair)):
            raise ValueError(f"classes {pair[0]} and {pair[1]} differ in no part, so nothing tells them apart")
        if pair in groups[len(apart)]:
            raise ValueError(f"the pair {list(pair)} is listed twice")
        groups[len(apart)].append(pair)
    return dict(sorted(groups.items()))


def check_numbers(distances: Sequence[int], limit: int | None, blur: float, bins: int, drop_below: float) -> None:
    """Check the settings that are numbers.

    Raises:
        ValueError: one out of range.
    """
    if not distances or not all(1 <= distance < len(WORDS) for distance in distances):
        raise ValueError(f"expected distances from 1 to {len(WORDS) - 1} differing parts, got {list(distances)}")
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit >= 1 pairs of each distance, or None for all, got {limit}")
    if blur < 0 or bins < 0 or drop_below < 0:
        raise ValueError(f"expected blur, bins and drop_below >= 0, got {blur}, {bins} and {drop_below}")
