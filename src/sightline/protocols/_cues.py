"""Cues. Where the parts lie that tell two classes apart.

Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021, section 5.2; what the paper leaves
open follows its published code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sightline.data import Sample, layers, numbered_layers
from sightline.registry import unknown

Rule: TypeAlias = Literal["substring", "clean"]
"""How an attribute finds its part: by a word anywhere in its name, or by a word of what it describes."""

Masks: TypeAlias = Literal["auto", "exact", "keypoints"]

Marks: TypeAlias = Callable[[int, int], Bool[Tensor, "h w"] | None]
"""From two classes to the pixels of a sample that tell them apart; None where none shows."""

PARTS = ("head", "back", "belly", "breast", "tail", "legs", "wings")
"""The seven parts, named as the creatures' are."""

WORDS: Mapping[str, str] = {
    **dict.fromkeys(("bill", "crown", "eye", "forehead", "head", "nape", "throat"), "head"),
    **{word: word for word in ("back", "belly", "breast", "tail")},
    "leg": "legs",
    "wing": "wings",
}
"""Word in the name of an attribute -> part."""

KEYPOINTS: Mapping[str, str] = {
    "back": "back", "beak": "head", "belly": "belly", "breast": "breast", "crown": "head", "forehead": "head",
    "left eye": "head", "left leg": "legs", "left wing": "wings", "nape": "head", "right eye": "head",
    "right leg": "legs", "right wing": "wings", "tail": "tail", "throat": "head",
}  # fmt: skip
"""Keypoint -> part, in the order of the rows of `Sample.keypoints` on CUB and on creatures."""

SCORE = 0.5
"""A class has the attributes that at least this share of the annotators saw."""


@runtime_checkable
class Comparing(Protocol):
    """A data set that knows in which parts its classes differ."""

    def differing(self, a: int, b: int, /) -> tuple[str, ...]: ...
    def close_pairs(self, distance: int, /) -> list[tuple[int, int]]: ...


@runtime_checkable
class Painted(Protocol):
    """A data set that knows the pixels that tell two classes apart."""

    def difference_mask(self, sample: Sample, a: int, b: int, /) -> Bool[Tensor, "h w"]: ...


@runtime_checkable
class Described(Protocol):
    """A data set in a folder with a share of every attribute for every class."""

    @property
    def root(self) -> Path: ...

    @property
    def attributes(self) -> Float[Tensor, "k a"]: ...


@dataclass(frozen=True, eq=False)
class Traits:
    """What each part of each class looks like: classes differ in a part where its numbers differ."""

    codes: Int[Tensor, "k 7"]

    def differing(self, a: int, b: int, /) -> tuple[str, ...]:
        """Return the parts in which two classes differ.

        Raises:
            ValueError: no such class.
        """
        if not (0 <= a < len(self.codes) and 0 <= b < len(self.codes)):
            raise ValueError(f"there are classes 0 to {len(self.codes) - 1}, got {a} and {b}")
        apart = self.codes[a] != self.codes[b]
        return tuple(part for part, is_apart in zip(PARTS, apart, strict=True) if is_apart)

    def close_pairs(self, distance: int, /) -> list[tuple[int, int]]:
        """Return the class pairs (a < b) that differ in exactly `distance` parts."""
        apart = (self.codes[:, None] != self.codes[None]).sum(2).triu(1)
        return [(a, b) for a, b in (apart == distance).nonzero().tolist() if a < b]


def traits(attributes: Float[Tensor, "k a"], names: Sequence[str], mapping: Rule = "substring") -> Traits:
    """Return what the classes' attributes say of their parts.

    S^A = {attributes of which class A has a share of at least one half}; P^{A,B} = the parts of the attributes in the
    symmetric difference of S^A and S^B. An attribute without a part (size, primary color) tells nothing.

    Raises:
        LookupError: an unknown mapping.
        ValueError: another number of names than of attributes.
    """
    if len(names) != attributes.shape[1]:
        raise ValueError(f"expected a name for each of {attributes.shape[1]} attributes, got {len(names)} names")
    has, parts = attributes >= SCORE, [part_of(name, mapping) for name in names]
    own = [has & torch.tensor([one == part for one in parts]) for part in PARTS]
    return Traits(torch.stack([torch.unique(table, dim=0, return_inverse=True)[1] for table in own], 1))


def part_of(attribute: str, mapping: Rule = "substring") -> str | None:
    """Return the part of an attribute called `has_<what>::<value>`; None where it has none.

    `substring`, as published, looks for the words anywhere, so that has_shape::long-legged-like is about the legs;
    `clean` looks at what is described alone.

    Raises:
        LookupError: an unknown mapping.
    """
    if mapping not in ("substring", "clean"):
        raise LookupError(unknown(mapping, ("substring", "clean"), "mapping of attributes"))
    text = attribute if mapping == "substring" else attribute.partition("::")[0]
    return next((part for word, part in WORDS.items() if word in text), None)


def attribute_names(root: Path) -> tuple[str, ...]:
    """Read the names of CUB's attributes: attributes.txt in the folder, in its attributes/, or beside it (official).

    Raises:
        FileNotFoundError: it is in none of them.
        ValueError: lines that are not a number and a name.
    """
    places = [root / "attributes.txt", root / "attributes" / "attributes.txt", root.parent / "attributes.txt"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no attributes.txt in {root}, in its attributes/ or in {root.parent}; it names the 312 attributes"
        )
    rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    if any(len(row) != 2 or row[0] != str(number) for number, row in enumerate(rows, 1)):
        raise ValueError(f"{file} is damaged; expected lines of a number, counted from 1, and a name")
    return tuple(name for _, name in rows)


@dataclass(frozen=True, eq=False)
class Cues:
    """The differences between the classes of a data set, in its own class numbers.

    `labels` says how its samples are labeled, class by class; None where the class is the label.
    """

    classes: Comparing
    painted: Painted | None
    keypoint_names: tuple[str, ...]
    labels: tuple[int, ...] | None

    def label(self, number: int) -> int:
        """Return the label of a class."""
        return number if self.labels is None else self.labels[number]

    def marking(self, masks: Masks, segmentation: bool) -> Callable[[Sample], Marks]:
        """Return the function that marks the cues of a sample; `segmentation` keeps keypoint masks on the animal.

        Raises:
            LookupError: unknown masks.
            ValueError: exact masks that the data set does not have.
        """
        if masks not in ("auto", "exact", "keypoints"):
            raise LookupError(unknown(masks, ("auto", "exact", "keypoints"), "kind of masks"))
        if masks != "keypoints" and self.painted is not None:
            return partial(self.exact, self.painted)
        if masks == "exact":
            raise ValueError("only creatures know the exact pixels of a cue; use masks='keypoints'")
        return self.within if segmentation else self.nearest

    def exact(self, painted: Painted, sample: Sample) -> Marks:
        """Mark the pixels that tell two classes apart."""

        def marks(a: int, b: int) -> Bool[Tensor, "h w"] | None:
            shown = painted.difference_mask(self.renumbered(sample, a, b), a, b)
            return shown if bool(shown.any()) else None

        return marks

    def renumbered(self, sample: Sample, a: int, b: int) -> Sample:
        """Return the sample with the two classes in its mask as the data set numbers them, and no others."""
        if self.labels is None or sample.mask is None:
            return sample
        mask = torch.zeros_like(sample.mask)
        for number in (a, b):
            mask[sample.mask == self.label(number) + 1] = number + 1
        return replace(sample, mask=mask)

    def nearest(self, sample: Sample) -> Marks:
        """Mark the pixels nearest to a part that tells two classes apart.

        Raises:
            ValueError: a sample without keypoints, or with another number than a multiple of their names.
        """
        if sample.keypoints is None:
            raise ValueError(f"masks='keypoints' need keypoints, and {sample.id!r} has none; CUB and creatures have")
        size = (sample.image.shape[1], sample.image.shape[2])
        parts = regions(sample.keypoints, size, self.keypoint_names)
        return lambda a, b: union(parts, self.classes.differing(a, b))

    def within(self, sample: Sample) -> Marks:
        """Mark the same pixels as `nearest`, but only those of the label's animal, where the sample has a mask."""
        marks, region = self.nearest(sample), None if sample.label is None else sample.region_of(sample.label)
        if region is None:
            return marks
        animal = region[0]

        def inside(a: int, b: int) -> Bool[Tensor, "h w"] | None:
            found = marks(a, b)
            return None if found is None else found & animal

        return inside


def cues_of(samples: object, mapping: Rule = "substring") -> Cues:
    """Return what the data set behind the samples knows, through whatever wraps it.

    Raises:
        FileNotFoundError: attributes without their names.
        LookupError: an unknown mapping.
        ValueError: a data set without parts or attributes of its classes.
    """
    for layer, labels in numbered_layers(samples):
        names = tuple(getattr(layer, "keypoint_names", KEYPOINTS))
        if isinstance(layer, Comparing):
            return Cues(layer, layer if isinstance(layer, Painted) else None, names, labels)
        if isinstance(layer, Described):
            return Cues(traits(layer.attributes, attribute_names(layer.root), mapping), None, names, labels)
    raise ValueError(
        f"cue_localization compares classes whose parts are known, and {type([*layers(samples)][-1]).__name__} "
        "knows none; use creatures, cub or cub_crops"
    )


def regions(
    keypoints: Float[Tensor, "p 3"], size: tuple[int, int], names: Sequence[str] = tuple(KEYPOINTS)
) -> dict[str, Bool[Tensor, "h w"]]:
    """Return the pixels of each visible part: those that lie nearest to one of its `points`.

    Distances are from the centers of the pixels, (column + .5, row + .5); of points equally near the first counts.
    Together the regions fill the image, empty where nothing is visible. *Differs:* the published code truncates the
    points to whole pixels and measures from the pixels' corners.

    Raises:
        ValueError: another number of keypoints than a multiple of the names'.
    """
    owners, places = points(keypoints, names)
    if not owners:
        return {}
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    x, y = places[:, 0, None, None], places[:, 1, None, None]
    nearest = ((columns - x) ** 2 + (rows[:, None] - y) ** 2).argmin(0)
    return {part: torch.tensor([one == part for one in owners])[nearest] for part in owners}


def union(parts: Mapping[str, Bool[Tensor, "h w"]], chosen: Sequence[str]) -> Bool[Tensor, "h w"] | None:
    """Return the pixels of the chosen parts; None where none of them is visible."""
    shown = [parts[part] for part in chosen if part in parts]
    return torch.stack(shown).any(0) if shown else None


def points(
    keypoints: Float[Tensor, "p 3"], names: Sequence[str] = tuple(KEYPOINTS)
) -> tuple[tuple[str, ...], Float[Tensor, "n 2"]]:
    """Return the parts and places of the visible points: the head is the mean of its keypoints, the others keep theirs.

    In the order of `PARTS`, left before right; several animals, each with a block of rows, one after the other. A
    keypoint of a name that CUB does not have is a part of its own.

    Raises:
        ValueError: another number of keypoints than a multiple of the names'.
    """
    if len(keypoints) % len(names):
        raise ValueError(f"expected blocks of {len(names)} keypoints, got {len(keypoints)} keypoints")
    own = [KEYPOINTS.get(name, name) for name in names]
    found: list[tuple[str, Tensor]] = []
    for block in keypoints.double().view(-1, len(names), 3):
        for part in dict.fromkeys([*PARTS, *own]):
            rows = block[[one == part for one in own]]
            shown = rows[rows[:, 2] > 0, :2]
            merged = shown.mean(0, keepdim=True) if part == "head" and len(shown) else shown
            found += [(part, place) for place in merged]
    places = [place for _, place in found]
    return tuple(part for part, _ in found), torch.stack(places) if places else keypoints.new_zeros((0, 2)).double()
