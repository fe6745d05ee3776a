"""Accumulation. The one torchmetrics.Metric: it sums a measure's numbers over a data set.

Processes meet through what each `held`, added up in the order of the images: the same bits, however many they are.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from sightline.metrics import Measure


class Accumulate(Metric):
    """Sum (b, width) numbers in float64, those of images with NaN left out; keep what else the measure asks for."""

    higher_is_better: bool | None = None
    full_state_update = False

    total: Tensor
    count: Tensor
    values: list[Tensor]
    places: list[Tensor]

    def __init__(self, measure: Measure) -> None:
        super().__init__(sync_on_compute=False)
        self.measure = measure
        self.set_dtype(torch.float64)
        self.add_state("total", torch.zeros(measure.width or (), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, numbers: Float[Tensor, "b width"], places: Int[Tensor, " b"]) -> None:
        """Add one batch; `places` are the images' positions in the data set."""
        numbers = numbers.double()
        counted = numbers.isnan().any(1).logical_not()
        self.total = self.total + numbers[counted].sum(0)
        self.count = self.count + counted.sum()
        if self.measure.state == "per_image":
            self.values.append(torch.where(counted, self.finished(numbers), torch.nan))
            self.places.append(places)
        if self.measure.state == "pool":
            self.values.append(numbers[counted])
            self.places.append(places[counted])

    def compute(self) -> tuple[Float[Tensor, " width"], Float[Tensor, "n ..."], Int[Tensor, ""]]:
        """Return the mean numbers, what is kept of each image in the order of the data set, how many images count.

        Nothing kept is an empty tensor. Mean numbers are NaN where no image counts, and so is the finished number of an
        image that does not.

        Raises:
            ValueError: nothing was added.
        """
        if not self.update_called:
            raise ValueError("no image was measured; the data set is empty")
        values, places = gathered(self.values, torch.float64), gathered(self.places, torch.long)
        return self.total / self.count, values[places.argsort()], self.count.clone()

    def held(self) -> dict[str, Tensor]:
        """Return what was added so far, on the CPU: sum, count, what is kept of each image, the places of those."""
        kept = {"values": gathered(self.values, torch.float64), "places": gathered(self.places, torch.long)}
        return {name: one.cpu() for name, one in {"total": self.total, "count": self.count, **kept}.items()}

    def add(self, held: Mapping[str, Tensor]) -> None:
        """Add what another one of the same measure held."""
        lists = {name: [held[name]] for name in ("values", "places") if len(held[name])}
        self.merge_state({"total": held["total"], "count": held["count"], "values": [], "places": [], **lists})
        self._update_count += 1

    def finished(self, numbers: Float[Tensor, "*b width"]) -> Float[Tensor, "*b"]:
        """Return what is reported of `width` numbers."""
        return self.measure.finish(numbers[..., 0] if self.measure.width == 1 else numbers)


def gathered(state: list[Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
    """Return a list state as one tensor; torchmetrics has joined it already where processes met."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.empty(0, dtype=dtype)
