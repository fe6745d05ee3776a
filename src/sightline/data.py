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
    mask: Int[Tensor, "h w"] | None = None
    instances: Int[Tensor, "h w"] | None = None
    parts: Mapping[str, Bool[Tensor, "h w"]] = field(default_factory=dict[str, Tensor])
    cue: Bool[Tensor, "h w"] | None = None
    """What tells the label from the classes nearest to it, where that is known exactly."""
    keypoints: Float[Tensor, "p 3"] | None = None
    attributes: Float[Tensor, " a"] | None = None
    size: tuple[int, int] | None = None
    """Height and width of the original picture, before any resizing."""


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
