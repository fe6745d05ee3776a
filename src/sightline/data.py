"""Samples and batches. One image with all that is known of it, and several of them stacked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Indexed(Protocol[T_co]):
    """A data set: a length, and an item for every index below it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> T_co: ...


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its annotations; what a data set does not know is None.

    Geometry is in pixels of `image`. Boxes are half-open `x0 y0 x1 y1`; in `mask` 0 is background, 255 is ignored; a
    keypoint is `x y visible`.
    """

    id: str
    image: Float[Tensor, "ch h w"]
    label: int | None = None
    labels: Int[Tensor, " k"] | None = None
    boxes: Float[Tensor, "n 4"] | None = None
    box_labels: Int[Tensor, " n"] | None = None
    """The class of each box; None where all are of the label."""
    difficult: Bool[Tensor, " n"] | None = None
    """Which boxes the data set itself calls difficult (Pascal VOC)."""
    mask: Int[Tensor, "h w"] | None = None
    instances: Int[Tensor, "h w"] | None = None
    parts: Mapping[str, Bool[Tensor, "h w"]] = field(default_factory=dict[str, Tensor])
    cue: Bool[Tensor, "h w"] | None = None
    """What tells the label from the classes nearest to it, where that is known exactly."""
    keypoints: Float[Tensor, "p 3"] | None = None
    attributes: Float[Tensor, " a"] | None = None
    size: tuple[int, int] | None = None
    """Height and width of the original picture, before any resizing."""

    def boxes_of(self, label: int) -> Float[Tensor, "n 4"] | None:
        """Return the boxes of a class; where only a mask is known, the tightest one around the class's pixels.

        Boxes without `box_labels` are those of the label. None where neither is known; (0, 4) where the class is not
        there.
        """
        if self.boxes is not None:
            labels = torch.tensor([self.label] * len(self.boxes)) if self.box_labels is None else self.box_labels
            return self.boxes[labels == label]
        if self.mask is None:
            return None
        check_mask(label)
        rows, columns = ((self.mask == label + 1).any(axis).nonzero().flatten() for axis in (1, 0))
        found = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if len(rows) else []
        return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)

    def region_of(self, label: int) -> tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]] | None:
        """Return the pixels of a class in the mask, and those that count (all but 255); None without a mask.

        Raises:
            ValueError: a class above 253, for which a mask has no value.
        """
        if self.mask is None:
            return None
        check_mask(label)
        return self.mask == label + 1, self.mask != 255


def check_mask(label: int) -> None:
    """Check that a mask has a value for a class: class + 1 below 255, which is ignored.

    Raises:
        ValueError: it has none.
    """
    if label > 253:
        raise ValueError(f"masks hold classes 0 to 253, as 1 to 254; class {label} has no value there")


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one image size: images and labels stacked, ragged fields as tuples, one entry an image."""

    ids: tuple[str, ...]
    x: Float[Tensor, "b ch h w"]
    y: Int[Tensor, " b"] | None
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Move images and labels; the samples stay where they are."""
        return Batch(self.ids, self.x.to(device), None if self.y is None else self.y.to(device), self.samples)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal image size.

    Raises:
        ValueError: no sample, or images of different shapes.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample, got none")
    shapes = {tuple(sample.image.shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"a batch needs images of one shape, got {sorted(shapes)}; resize them in the data set (size=...)"
        )
    labels = [sample.label for sample in samples]
    y = None if any(label is None for label in labels) else torch.tensor(labels, dtype=torch.long)
    return Batch(tuple(s.id for s in samples), torch.stack([s.image for s in samples]), y, tuple(samples))


def batches(dataset: Indexed[Sample], size: int, indices: Iterable[int] | None = None) -> Iterator[Batch]:
    """Yield the data set in order, `size` samples at a time (the last batch may be smaller).

    Raises:
        ValueError: a size below one.
    """
    if size < 1:
        raise ValueError(f"a batch holds at least one image, got size={size}")
    chosen = list(range(len(dataset)) if indices is None else indices)
    for start in range(0, len(chosen), size):
        yield collate([dataset[index] for index in chosen[start : start + size]])


@runtime_checkable
class Dataset(Indexed[Sample], Protocol):
    """Samples with the names of their classes and a record of what could not be read."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def skipped(self) -> Mapping[str, str]:
        """File -> why it was skipped; empty where nothing was."""
        ...


def layers(samples: object) -> Iterator[object]:
    """Yield the samples, then what they wrap, layer by layer."""
    layer: object | None = samples
    while layer is not None:
        yield layer
        inside = (getattr(layer, name, None) for name in ("samples", "source", "dataset"))
        layer = next((one for one in inside if one is not None), None)


def numbered_layers(samples: object) -> Iterator[tuple[object, tuple[int, ...] | None]]:
    """Yield what `layers` does, each with the numbers that its classes have outside; None where those are its own."""
    numbers: tuple[int, ...] | None = None
    for layer in layers(samples):
        found: tuple[int, ...] | None = getattr(layer, "numbers", None)
        if found is not None:
            numbers = found if numbers is None else tuple(numbers[one] for one in found)
        yield layer, numbers
