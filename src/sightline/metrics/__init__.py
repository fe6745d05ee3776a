"""Metrics. How true a saliency map is, by name; each is a function from settings to a `Measure`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.metrics._average import average_drop as average_drop
    from sightline.metrics._average import average_gain as average_gain
    from sightline.metrics._average import average_increase as average_increase
    from sightline.metrics._insertion import deletion as deletion
    from sightline.metrics._insertion import insertion as insertion
    from sightline.metrics._mass import mass as mass
    from sightline.metrics._measure import Case as Case
    from sightline.metrics._measure import Measure as Measure
    from sightline.metrics._minimality import minimality as minimality
    from sightline.metrics._representativeness import representativeness as representativeness


@dataclass(frozen=True)
class Entry:
    """What is known of a metric without importing it; called, it gives the metric with its settings."""

    load: str
    summary: str
    paper: str
    unit: str
    higher_is_better: bool
    axis: str = ""
    """What the horizontal axis of its curve shows, where it has a curve."""

    @property
    def metric(self) -> "Callable[..., Measure]":
        """The function from settings to a measure."""
        found: Callable[..., Measure] = load(self.load)
        return found

    def __call__(self, **settings: Any) -> "Measure":
        """Return the metric with its settings."""
        return self.metric(**settings)


METRICS: Mapping[str, Entry] = {
    "average_drop": Entry(
        "sightline.metrics._average:average_drop",
        "how much probability is lost when only the map's pixels are seen",
        "Chattopadhay et al. 2018",
        "%",
        False,
    ),
    "average_increase": Entry(
        "sightline.metrics._average:average_increase",
        "share of images whose probability rises when only the map's pixels are seen",
        "Chattopadhay et al. 2018",
        "%",
        True,
    ),
    "average_gain": Entry(
        "sightline.metrics._average:average_gain",
        "how much of the missing probability is gained when only the map's pixels are seen",
        "Zhang et al. 2024",
        "%",
        True,
    ),
    "insertion": Entry(
        "sightline.metrics._insertion:insertion",
        "area under the probability while the most salient pixels are put in",
        "Petsiuk et al. 2018",
        "",
        True,
        "fraction of pixels inserted",
    ),
    "deletion": Entry(
        "sightline.metrics._insertion:deletion",
        "area under the probability while the most salient pixels are taken out",
        "Petsiuk et al. 2018",
        "",
        False,
        "fraction of pixels deleted",
    ),
    "mass": Entry(
        "sightline.metrics._mass:mass",
        "share of the map on the object, on what tells its class, or near its parts",
        "Wang et al. 2020",
        "%",
        True,
    ),
    "minimality": Entry(
        "sightline.metrics._minimality:minimality",
        "share of the image in the smallest box around the map's peaks that hides the class",
        "Fong and Vedaldi 2017",
        "",
        False,
    ),
    "representativeness": Entry(
        "sightline.metrics._representativeness:representativeness",
        "score left while the map's region is deleted from its peaks on",
        "Fong and Vedaldi 2017",
        "",
        False,
        "threshold on the mask",
    ),
}

_TYPES = {"Measure": "sightline.metrics._measure:Measure", "Case": "sightline.metrics._measure:Case"}

__all__ = ["METRICS", "Case", "Entry", "Measure", *METRICS]


def __getattr__(name: str) -> Any:
    if name in METRICS:
        return METRICS[name].metric
    if name in _TYPES:
        return load(_TYPES[name])
    raise AttributeError(f"module 'sightline.metrics' has no attribute {name!r}")
