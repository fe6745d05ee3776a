"""Creatures. A procedural data set whose truth is known exactly: parts, keypoints, occlusion, class differences.

Twenty classes in two body plans, ten winged and ten finned. A class gives each of seven parts a color and a pattern;
classes of a plan differ in one, two or three parts, so the pixels that tell two classes apart are known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, permutations
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sightline.data import Sample
from sightline.datasets import _creature_drawing as drawing
from sightline.datasets._creature_drawing import COLORS, PATTERNS, REGIONS
from sightline.registry import unknown

PARTS = ("head", "back", "belly", "breast", "tail", "legs", "wings")
"""Rows of the attribute table; the fins of a finned creature stand in the wings' place."""

KEYPOINTS = (
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye",
    "right leg", "right wing", "tail", "throat",
)  # fmt: skip
"""Rows of `Sample.keypoints`, named and ordered as in CUB-200-2011; the mark variant appends "mark"."""

SPLITS = {"train": 8000, "val": 1000, "test": 2000}
VARIANTS = ("plain", "mark", "context", "two_copies", "scenes", "small")
LEAST = 12
"""Visible pixels of every part of every creature, at least."""
_SCALES = {"two_copies": (0.4, 0.48), "scenes": (0.38, 0.6)}
"""Range of a creature's length in image sides, where it is not the plain one."""
_SMALL = (0.05, 0.1)
"""Range of the share of the image that a small creature covers."""
_FILL = 0.49
"""Area of a creature over its length squared."""
_TRIES = 40

_COMMON = {
    "winged": "coral stripes, indigo solid, amber stripes, coral solid, indigo solid, coral solid, indigo stripes",
    "finned": "sky stripes, leaf stripes, plum solid, leaf solid, sky solid, plum solid, plum stripes",
}
_KINDS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("common pip", "winged", {}),
    ("dot-headed pip", "winged", {"head": "coral dots"}),
    ("amber-backed pip", "winged", {"back": "amber solid"}),
    ("dot-bellied pip", "winged", {"belly": "amber dots"}),
    ("indigo-breasted pip", "winged", {"breast": "indigo solid"}),
    ("coral-tailed pip", "winged", {"tail": "coral solid"}),
    ("indigo-legged pip", "winged", {"legs": "indigo solid"}),
    ("dot-winged pip", "winged", {"wings": "indigo dots"}),
    ("carnival pip", "winged", {"wings": "indigo dots", "tail": "coral solid"}),
    ("midnight pip", "winged", {"wings": "indigo dots", "breast": "indigo solid"}),
    ("common newt", "finned", {}),
    ("dot-headed newt", "finned", {"head": "sky dots"}),
    ("dot-backed newt", "finned", {"back": "leaf dots"}),
    ("sky-bellied newt", "finned", {"belly": "sky solid"}),
    ("plum-breasted newt", "finned", {"breast": "plum solid"}),
    ("plum-tailed newt", "finned", {"tail": "plum solid"}),
    ("leaf-legged newt", "finned", {"legs": "leaf solid"}),
    ("dot-finned newt", "finned", {"wings": "plum dots"}),
    ("orchid newt", "finned", {"head": "sky dots", "tail": "plum solid"}),
    ("meadow newt", "finned", {"head": "sky dots", "legs": "leaf solid"}),
)
_FIXED = {
    "white": drawing.Coat(drawing.CREAM), "pupil": drawing.Coat(drawing.NIGHT), "beak": drawing.Coat(drawing.HORN),
}  # fmt: skip


def _codebook() -> NDArray[np.int64]:
    table = []
    for _, plan, change in _KINDS:
        worn = dict(zip(PARTS, _COMMON[plan].split(", "), strict=True)) | change
        pairs = [coat.split() for coat in worn.values()]
        table.append([(COLORS.index(color), PATTERNS.index(pattern)) for color, pattern in pairs])
    return np.array(table)


_CODEBOOK = _codebook()
_MARKS = tuple(permutations(range(1, len(COLORS)), 2))
"""Upper and lower color of every mark: all but the first color, which the head of the marked creature has."""


@dataclass(frozen=True, eq=False)
class Actor:
    """A creature on the stage."""

    label: int
    pose: drawing.Pose
    layers: tuple[drawing.Layer, ...]
    landmarks: Mapping[str, tuple[float, float, str]]
    shades: tuple[float, ...]
    """How light each part is, about 1."""
    ink: float
    """Share of a part that stripes or dots cover."""
    area: int
    """Pixels of its silhouette, in the frame and outside, before anybody stands in front."""


@dataclass(frozen=True, eq=False)
class Stage:
    """All of an image but the creatures' colors: the painted ground, the actors back to front, who is in front where.

    Canvas and owner carry a margin of `margin` pixels on every side.
    """

    margin: int
    canvas: NDArray[np.float32]
    owner: NDArray[np.int16]
    tint: NDArray[np.float32]
    actors: tuple[Actor, ...] = ()


@dataclass(frozen=True)
class Creatures:
    """Drawn creatures, deterministic per (seed, split, index); make one with `creatures`.

    A sample carries: `label`, and `labels` multi-hot; `boxes`, tight and in the order of the instances, and their
    `box_labels`; `mask`, 0 for background and class index + 1 on a creature; `instances`, 1 for the rearmost; `parts`,
    the visible pixels by name (disjoint and together the object; "mark" lies within "head"); `cue`, the visible `cues`
    of the label; `keypoints`, a block of `keypoint_names` rows an instance, visible where its part is in front;
    `attributes`, a one-hot color (6) and pattern (3) for each part.
    """

    split: str = "test"
    count: int = SPLITS["test"]
    size: int = 64
    variant: str = "plain"
    seed: int = 0
    rho: float = 0.95
    only: tuple[int, ...] = tuple(range(len(_KINDS)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} is out of range for {self.count} creatures")
        return _sample(self, index % self.count, _stage(self, index % self.count))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the twenty classes; in the mark variant the class is the mark."""
        if self.variant == "mark":
            return tuple(f"{COLORS[upper]} over {COLORS[lower]}" for upper, lower in _MARKS)
        return tuple(name for name, _, _ in _KINDS)

    @property
    def groups(self) -> tuple[str, ...]:
        """Body plan of every class: the two supersets."""
        return tuple("winged" if self.variant == "mark" else plan for _, plan, _ in _KINDS)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Nothing is ever skipped."""
        return MappingProxyType({})

    @property
    def parts(self) -> tuple[str, ...]:
        """Rows of the attribute table."""
        return (*PARTS, "mark") if self.variant == "mark" else PARTS

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Rows of a keypoint block."""
        return (*KEYPOINTS, "mark") if self.variant == "mark" else KEYPOINTS

    def attribute_table(self) -> Int[Tensor, "classes parts 2"]:
        """Return color and pattern index of every part of every class; for the mark, its upper and lower color."""
        return torch.from_numpy(_table(self.variant).copy())

    def differing(self, a: int, b: int) -> tuple[str, ...]:
        """Return the parts in which two classes differ: all of them across body plans.

        Raises:
            ValueError: no such class.
        """
        for label in (a, b):
            if not 0 <= label < len(_KINDS):
                raise ValueError(f"there are classes 0 to {len(_KINDS) - 1}, got {label}")
        table = _table(self.variant)
        apart = (table[a] != table[b]).any(1) | (self.groups[a] != self.groups[b])
        return tuple(part for part, is_apart in zip(self.parts, apart, strict=True) if is_apart)

    def cues(self, label: int) -> tuple[str, ...]:
        """Return the parts that tell a class from the ones nearest to it: a change in one of them makes another class.

        A kind that differs from its common one in the head has the head; the common kinds have every part; in the mark
        variant it is the mark.
        """
        apart = [self.differing(label, other) for other in range(len(_KINDS)) if other != label]
        least = min(map(len, apart))
        near = {part for parts in apart if len(parts) == least for part in parts}
        return tuple(part for part in self.parts if part in near)

    def difference_mask(self, sample: Sample, a: int, b: int) -> Bool[Tensor, "h w"]:
        """Return where a sample shows what tells class `a` from class `b`.

        It is the union of the visible differing parts of the creatures of either class. A part owns the pixels whose
        centers it covers; as edges are anti-aliased, its color also tints pixels that touch it.

        Raises:
            ValueError: the sample shows neither class, or no such class.
        """
        apart = self.differing(a, b)
        if sample.mask is None or not ((sample.mask == a + 1) | (sample.mask == b + 1)).any():
            raise ValueError(f"{sample.id} shows neither class {a} nor class {b}; take a sample of one of them")
        shown = torch.zeros_like(sample.mask, dtype=torch.bool)
        for part in apart:
            for name in _sides(part):
                shown |= sample.parts[name]
        return shown & ((sample.mask == a + 1) | (sample.mask == b + 1))

    def close_pairs(self, distance: int) -> list[tuple[int, int]]:
        """Return the class pairs (a < b) of one body plan that differ in exactly `distance` parts."""
        pairs = combinations(range(len(_KINDS)), 2)
        near = [pair for pair in pairs if self.groups[pair[0]] == self.groups[pair[1]]]
        return [pair for pair in near if len(self.differing(*pair)) == distance]

    def texture(self, index: int) -> int:
        """Return which of the twenty background textures an image of the context variant has.

        Raises:
            ValueError: another variant, whose textures are free.
        """
        if self.variant != "context":
            raise ValueError(f"only the context variant numbers its textures, this is {self.variant!r}")
        return _texture(self, index, _stream(self, index))


def creatures(
    split: str = "test",
    *,
    count: int | None = None,
    size: int = 64,
    variant: str = "plain",
    seed: int = 0,
    rho: float = 0.95,
    only: Sequence[int] | None = None,
) -> Creatures:
    """Draw creatures: 20 classes, `size` x `size` pixels, the same image for the same (seed, split, index).

    Variants: `plain`; `mark`, where a mark on the head is all that tells classes apart; `context`, where the background
    texture goes with the class in a share `rho` of the images; `two_copies`, two identical halves side by side;
    `scenes`, one to three creatures of different classes that may hide each other, `label` being the one that shows
    most; `small`, creatures that cover 5 to 10 % of the image. Splits train, val and test hold 8000, 1000 and 2000
    images unless `count` says otherwise. `only` draws these classes alone, which keep their numbers.

    Raises:
        LookupError: no such split or variant.
        ValueError: a size that is odd or below 64, a negative count or seed, a rate outside [0, 1], no class, one that
            is not there, or one twice.
    """
    if split not in SPLITS:
        raise LookupError(unknown(split, SPLITS, "split of creatures"))
    if variant not in VARIANTS:
        raise LookupError(unknown(variant, VARIANTS, "variant of creatures"))
    if size < 64 or size % 2:
        raise ValueError(f"creatures need an even size of at least 64 pixels to show their patterns, got size={size}")
    count = SPLITS[split] if count is None else count
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed are zero or more, got count={count}, seed={seed}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is a rate in [0, 1], got {rho}")
    chosen = tuple(range(len(_KINDS))) if only is None else tuple(only)
    if not chosen or len({*chosen}) < len(chosen) or not {*chosen} <= {*range(len(_KINDS))}:
        raise ValueError(f"only needs different classes from 0 to {len(_KINDS) - 1}, got {list(chosen)}")
    return Creatures(split, count, size, variant, seed, rho, chosen)


def _stream(dataset: Creatures, index: int) -> np.random.Generator:
    entropy = (dataset.seed, list(SPLITS).index(dataset.split), index)
    return np.random.default_rng(np.random.SeedSequence(entropy))


def _texture(dataset: Creatures, index: int, rng: np.random.Generator) -> int:
    if dataset.variant != "context":
        return int(rng.integers(len(_KINDS)))
    label, other = dataset.only[index % len(dataset.only)], int(rng.integers(1, len(_KINDS)))
    return label if rng.random() < dataset.rho else (label + other) % len(_KINDS)


def _stage(dataset: Creatures, index: int) -> Stage:
    """Draw all that is random in an image; of the class it knows the body plan only."""
    rng = _stream(dataset, index)
    texture = _texture(dataset, index, rng)
    frame, margin = _frame(dataset), dataset.size // 4
    padded = (frame[0] + 2 * margin, frame[1] + 2 * margin)
    stage = Stage(margin, np.zeros((*padded, 3), np.float32), np.zeros(padded, np.int16), _tint(rng))
    for label in _cast(dataset, index, rng):
        stage = _enter(stage, dataset, label, rng)
    hue = (texture % 5) / 5 + rng.uniform(-0.03, 0.03) if dataset.variant == "context" else rng.random()
    ground = _inside(stage, stage.canvas)
    ground[:] = drawing.backdrop(rng, frame, texture=texture // 5, hue=hue)
    drawing.litter(rng, stage.canvas, number=int(rng.integers(5)), length=stage.actors[0].pose.length, margin=margin)
    return stage


def _frame(dataset: Creatures) -> tuple[int, int]:
    """Return height and width of what is drawn: half an image where it is shown twice."""
    return dataset.size, dataset.size // 2 if dataset.variant == "two_copies" else dataset.size


def _tint(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the color of the light."""
    return np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.06, 3)).astype(np.float32)


def _inside(stage: Stage, padded: NDArray[Any]) -> NDArray[Any]:
    """Take the margin off; the result is a view."""
    return padded[stage.margin : -stage.margin, stage.margin : -stage.margin]


def _cast(dataset: Creatures, index: int, rng: np.random.Generator) -> list[int]:
    if dataset.variant == "scenes":
        return [dataset.only[place] for place in rng.permutation(len(dataset.only))[: rng.integers(1, 4)]]
    return [dataset.only[index % len(dataset.only)]]


def _enter(stage: Stage, dataset: Creatures, label: int, rng: np.random.Generator) -> Stage:
    """Put a creature in front of the others; one that finds no place without hiding too much stays away."""
    for _ in range(_TRIES if stage.actors else 100 * _TRIES):
        pieces, pose = _pieces(dataset, label, rng), _pose(dataset, rng)
        layers = drawing.trace(pieces, pose, stage.owner.shape)
        owner, alone = stage.owner.copy(), np.zeros_like(stage.owner)
        for canvas, instance in ((owner, len(stage.actors)), (alone, 0)):
            drawing.own(canvas, layers, flip=pose.flip, instance=instance)
        shades = tuple(np.exp(rng.normal(0, 0.08, len(PARTS))).tolist())
        ink, area = rng.uniform(0.34, 0.48), int((alone > 0).sum())
        actor = Actor(label, pose, layers, drawing.landmarks(pieces, pose), shades, ink, area)
        trial = replace(stage, owner=owner, actors=(*stage.actors, actor))
        if _is_clear(trial, dataset):
            return trial
    if not stage.actors:
        raise RuntimeError(f"no place found for a creature at size={dataset.size}")
    return stage


def _pieces(dataset: Creatures, label: int, rng: np.random.Generator) -> tuple[drawing.Piece, ...]:
    """Return the pieces of a class's body plan, each swung a little."""
    pieces = drawing.PLANS[dataset.groups[label]]
    turns = [math.radians(rng.uniform(-1, 1) * piece.swing) for piece in pieces]
    return drawing.posed(drawing.marked(pieces) if dataset.variant == "mark" else pieces, turns)


def _pose(dataset: Creatures, rng: np.random.Generator) -> drawing.Pose:
    length, (height, width) = _length(dataset, rng), _frame(dataset)
    x, y = (side / 2 + rng.uniform(-0.5, 0.5) * max(side - 0.92 * length, 0.08 * side) for side in (width, height))
    angle, flip = math.radians(rng.uniform(-25, 25)), bool(rng.integers(2))
    return drawing.Pose(x + dataset.size // 4, y + dataset.size // 4, length, angle, flip)


def _length(dataset: Creatures, rng: np.random.Generator) -> float:
    """Draw the length of a creature in pixels: .35 to .9 of the image, and enough for stripes of four pixels."""
    if dataset.variant == "small":
        return dataset.size * math.sqrt(rng.uniform(*_SMALL) / _FILL)
    least = max(0.35, drawing.FINEST / drawing.PERIOD * 1.056 / dataset.size)
    return dataset.size * rng.uniform(*_SCALES.get(dataset.variant, (least, 0.9)))


def _is_clear(stage: Stage, dataset: Creatures) -> bool:
    """Tell whether every creature shows enough: of itself, of each part, of its mark, and is of the right size."""
    seen, whole = (_census(owner, len(stage.actors)) for owner in (_inside(stage, stage.owner), stage.owner))
    shares = seen.sum(1) / [actor.area for actor in stage.actors]
    parts = np.stack([seen[:, [REGIONS.index(name) for name in _sides(part)]].sum(1) for part in PARTS])
    is_sized = dataset.variant != "small" or bool(_SMALL[0] <= seen.sum() / dataset.size**2 <= _SMALL[1])
    is_marked = bool((seen[:, -1] == whole[:, -1]).all())
    return bool(shares[-1] >= 0.9 and shares.min() >= 0.6 and parts.min() >= LEAST) and is_sized and is_marked


def _census(owner: NDArray[np.signedinteger[Any]], actors: int) -> NDArray[np.int64]:
    """Count the pixels of every region of every actor."""
    return np.bincount(owner.ravel(), minlength=1 + actors * len(REGIONS))[1:].reshape(actors, len(REGIONS))


def _sides(part: str) -> tuple[str, ...]:
    return {"legs": ("left leg", "right leg"), "wings": ("left wing", "right wing")}.get(part, (part,))


def _sample(dataset: Creatures, index: int, stage: Stage) -> Sample:
    """Paint the actors on the stage and write down where everything is."""
    image, owner = _painted(dataset, stage), np.array(_inside(stage, stage.owner), np.int64)
    points, labels = _points(dataset, stage), [actor.label for actor in stage.actors]
    label = labels[int(_census(owner, len(labels)).sum(1).argmax())]
    if dataset.variant == "two_copies":
        copy = np.where(owner > 0, owner + len(REGIONS), 0)
        image, owner, labels = np.tile(image, (1, 2, 1)), np.concatenate([owner, copy], 1), labels * 2
        points = np.concatenate([points, points + np.array((dataset.size // 2, 0, 0), np.float32)])
    instances = torch.from_numpy(np.where(owner > 0, (owner - 1) // len(REGIONS) + 1, 0))
    mask = torch.tensor([0, *(one + 1 for one in labels)])[instances]
    parts = _visible_parts(dataset, owner)
    cues = [parts[name] for part in dataset.cues(label) for name in _sides(part)]
    chosen = "" if len(dataset.only) == len(_KINDS) else f"-c{label}"
    return Sample(
        id=f"creatures-{dataset.variant}-{dataset.split}-{index:05d}-s{dataset.seed}{chosen}",
        image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        label=label,
        labels=torch.zeros(len(_KINDS), dtype=torch.long).index_fill(0, torch.tensor(labels), 1),
        boxes=_boxes(instances, len(labels)),
        box_labels=torch.tensor(labels),
        mask=mask,
        instances=instances,
        parts=parts,
        cue=torch.stack(cues).any(0) & (mask == label + 1),
        keypoints=torch.from_numpy(points),
        attributes=_one_hot(_table(dataset.variant)[label]),
        size=(dataset.size, dataset.size),
    )


def _painted(dataset: Creatures, stage: Stage) -> NDArray[np.float32]:
    canvas = stage.canvas.copy()
    for actor in stage.actors:
        drawing.paint(canvas, actor.layers, _coats(dataset, actor), actor.pose.length)
    return np.minimum(_inside(stage, canvas) * stage.tint, 1)


def _coats(dataset: Creatures, actor: Actor) -> dict[str, drawing.Coat]:
    row, coats = _table(dataset.variant)[actor.label].tolist(), dict(_FIXED)
    for part, (color, pattern), shade in zip(PARTS, row[: len(PARTS)], actor.shades, strict=True):
        coats[part] = drawing.Coat(drawing.PALETTE[color] * shade, pattern, actor.ink)
    if dataset.variant == "mark":
        upper, lower = row[-1]
        coats |= {
            "mark upper": drawing.Coat(drawing.PALETTE[upper]),
            "mark lower": drawing.Coat(drawing.PALETTE[lower]),
        }
    return coats


@lru_cache(maxsize=len(VARIANTS))
def _table(variant: str) -> NDArray[np.int64]:
    """Return the (20, parts, 2) codebook; with marks, all creatures are the first one with a solid head."""
    if variant != "mark":
        return _CODEBOOK
    alike = np.repeat(_CODEBOOK[:1], len(_KINDS), 0)
    alike[:, PARTS.index("head")] = 0
    return np.concatenate([alike, np.array(_MARKS)[:, None]], 1)


def _points(dataset: Creatures, stage: Stage) -> NDArray[np.float32]:
    """Return x, y, visible of every keypoint of every actor, in pixels of the image without its margin."""
    owner, points = _inside(stage, stage.owner), []
    height, width = owner.shape
    for instance, actor in enumerate(stage.actors):
        for name in dataset.keypoint_names:
            x, y, region = actor.landmarks[name]
            row, column = math.floor(y) - stage.margin, math.floor(x) - stage.margin
            code = int(owner[row, column]) - 1 if 0 <= row < height and 0 <= column < width else -1
            shown = REGIONS[code % len(REGIONS)] if code // len(REGIONS) == instance else None
            is_visible = shown == region or (shown == "mark" and region == "head")
            points.append((x - stage.margin, y - stage.margin, is_visible))
    return np.array(points, np.float32)


def _boxes(instances: Tensor, number: int) -> Float[Tensor, "n 4"]:
    """Return the tight half-open boxes of the visible pixels."""
    boxes = []
    for instance in range(1, number + 1):
        rows, columns = torch.nonzero(instances == instance, as_tuple=True)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return torch.tensor(boxes, dtype=torch.float32)


def _visible_parts(dataset: Creatures, owner: NDArray[np.int64]) -> dict[str, Bool[Tensor, "h w"]]:
    region = torch.from_numpy(np.where(owner > 0, (owner - 1) % len(REGIONS), -1))
    shown = {name: region == i for i, name in enumerate(REGIONS)}
    mark = shown.pop("mark")
    return shown | {"head": shown["head"] | mark, "mark": mark} if dataset.variant == "mark" else shown


def _one_hot(row: NDArray[np.int64]) -> Float[Tensor, " a"]:
    """Return color (6) and pattern (3) of each part one-hot; a mark adds its upper and lower color (6 and 6)."""
    pairs = [(len(COLORS), len(PATTERNS))] * len(PARTS) + [(len(COLORS), len(COLORS))] * (len(row) - len(PARTS))
    widths = [width for pair in pairs for width in pair]
    ones = [torch.arange(width) == value for width, value in zip(widths, row.ravel().tolist(), strict=True)]
    return torch.cat(ones).float()
