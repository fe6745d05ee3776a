"""Metrics. How true a saliency map is, by name; each is a function from settings to a `Measure`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.metrics._adcc import adcc as adcc
    from sightline.metrics._adcc import coherency as coherency
    from sightline.metrics._adcc import complexity as complexity
    from sightline.metrics._aopc import aopc as aopc
    from sightline.metrics._average import average_drop as average_drop
    from sightline.metrics._average import average_gain as average_gain
    from sightline.metrics._average import average_increase as average_increase
    from sightline.metrics._box_accuracy import box_accuracy as box_accuracy
    from sightline.metrics._box_accuracy import max_box_accuracy as max_box_accuracy
    from sightline.metrics._box_accuracy import max_box_accuracy_v2 as max_box_accuracy_v2
    from sightline.metrics._coverage import coverage as coverage
    from sightline.metrics._dead_cells import dead_cells as dead_cells
    from sightline.metrics._infidelity import infidelity as infidelity
    from sightline.metrics._insertion import deletion as deletion
    from sightline.metrics._insertion import insertion as insertion
    from sightline.metrics._localization import f1 as f1
    from sightline.metrics._localization import f1_union as f1_union
    from sightline.metrics._localization import localization_error as localization_error
    from sightline.metrics._localization import localization_error_continuous as localization_error_continuous
    from sightline.metrics._localization import official_metric as official_metric
    from sightline.metrics._localization import official_metric_continuous as official_metric_continuous
    from sightline.metrics._mask_statistics import area as area
    from sightline.metrics._mask_statistics import area_deviation as area_deviation
    from sightline.metrics._mask_statistics import entropy as entropy
    from sightline.metrics._mask_statistics import total_variation as total_variation
    from sightline.metrics._mass import mass as mass
    from sightline.metrics._max_sensitivity import max_sensitivity as max_sensitivity
    from sightline.metrics._measure import Case as Case
    from sightline.metrics._measure import Measure as Measure
    from sightline.metrics._measure import Scored as Scored
    from sightline.metrics._measure import check_scored as check_scored
    from sightline.metrics._measure import finite as finite
    from sightline.metrics._minimality import minimality as minimality
    from sightline.metrics._pointing_game import energy_pointing_game as energy_pointing_game
    from sightline.metrics._pointing_game import pointing_game as pointing_game
    from sightline.metrics._pxap import pxap as pxap
    from sightline.metrics._remove_and_classify import remove_and_classify as remove_and_classify
    from sightline.metrics._representativeness import representativeness as representativeness
    from sightline.metrics._road import road as road
    from sightline.metrics._saliency_metric import saliency_metric as saliency_metric
    from sightline.metrics._selectivity import selectivity as selectivity


@dataclass(frozen=True)
class Entry:
    """What is known of a metric without importing it; called, it gives the metric with its settings."""

    load: str
    summary: str
    paper: str
    unit: str
    higher_is_better: bool | None
    """None where a number is neither good nor bad."""
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
    "coverage": Entry(
        "sightline.metrics._coverage:coverage",
        "share of the object that the map shows",
        "Zolna et al. 2020",
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
    "localization_error": Entry(
        "sightline.metrics._localization:localization_error",
        "share of images whose box of the map misses every true box",
        "Zolna et al. 2020",
        "%",
        False,
    ),
    "official_metric": Entry(
        "sightline.metrics._localization:official_metric",
        "share of images that are misclassified, or whose box of the map misses every true box",
        "Zolna et al. 2020",
        "%",
        False,
    ),
    "f1": Entry(
        "sightline.metrics._localization:f1",
        "harmonic mean of the map's precision and recall on the true box that fits best",
        "Zolna et al. 2020",
        "%",
        True,
    ),
    "localization_error_continuous": Entry(
        "sightline.metrics._localization:localization_error_continuous",
        "one minus the best overlap of the map's box with a true box",
        "Zhang et al. 2024",
        "%",
        False,
    ),
    "official_metric_continuous": Entry(
        "sightline.metrics._localization:official_metric_continuous",
        "one minus the best overlap of the map's box with a true box, one if misclassified",
        "Zhang et al. 2024",
        "%",
        False,
    ),
    "f1_union": Entry(
        "sightline.metrics._localization:f1_union",
        "harmonic mean of the map's precision and recall on all true boxes together",
        "Zhang et al. 2024",
        "%",
        True,
    ),
    "box_accuracy": Entry(
        "sightline.metrics._box_accuracy:box_accuracy",
        "share of images whose box of the map at one threshold meets a true box",
        "Choe et al. 2020",
        "%",
        True,
    ),
    "max_box_accuracy": Entry(
        "sightline.metrics._box_accuracy:max_box_accuracy",
        "share of images whose largest box meets a true box, at the best threshold for the whole data set",
        "Choe et al. 2020",
        "%",
        True,
        "threshold",
    ),
    "max_box_accuracy_v2": Entry(
        "sightline.metrics._box_accuracy:max_box_accuracy_v2",
        "share of images of which any contour's box meets a true box, at the best threshold for three overlaps",
        "Choe et al. 2022",
        "%",
        True,
        "threshold",
    ),
    "pxap": Entry(
        "sightline.metrics._pxap:pxap",
        "area under precision and recall of the pixels of all images",
        "Choe et al. 2020",
        "%",
        True,
        "recall",
    ),
    "pointing_game": Entry(
        "sightline.metrics._pointing_game:pointing_game",
        "share of images whose peak lies on the object, averaged over classes",
        "Zhang et al. 2016",
        "%",
        True,
    ),
    "energy_pointing_game": Entry(
        "sightline.metrics._pointing_game:energy_pointing_game",
        "share of the map inside the true boxes",
        "Wang et al. 2020",
        "%",
        True,
    ),
    "saliency_metric": Entry(
        "sightline.metrics._saliency_metric:saliency_metric",
        "logarithm of the box's area minus that of the probability inside the box",
        "Dabkowski and Gal 2017",
        "",
        False,
    ),
    "aopc": Entry(
        "sightline.metrics._aopc:aopc",
        "mean drop of the score while the most salient patches are erased",
        "Samek et al. 2017",
        "",
        True,
        "patches erased",
    ),
    "selectivity": Entry(
        "sightline.metrics._selectivity:selectivity",
        "a masking metric with the map raised to several powers",
        "Zhang et al. 2024",
        "%",
        False,
        "exponent",
    ),
    "road": Entry(
        "sightline.metrics._road:road",
        "accuracy while the most salient pixels are replaced from their neighbors",
        "Rong et al. 2022",
        "%",
        False,
        "share of pixels removed",
    ),
    "remove_and_classify": Entry(
        "sightline.metrics._remove_and_classify:remove_and_classify",
        "accuracy without the most salient pixels, relative to random ones",
        "Kim et al. 2021",
        "",
        False,
        "share of pixels removed",
    ),
    "max_sensitivity": Entry(
        "sightline.metrics._max_sensitivity:max_sensitivity",
        "the largest change of the map under small noise",
        "Yeh et al. 2019",
        "",
        False,
    ),
    "infidelity": Entry(
        "sightline.metrics._infidelity:infidelity",
        "how far the map is from predicting what perturbations do to the score",
        "Yeh et al. 2019",
        "",
        False,
    ),
    "adcc": Entry(
        "sightline.metrics._adcc:adcc",
        "harmonic mean of coherency, brevity and kept probability",
        "Poppi et al. 2021",
        "%",
        True,
    ),
    "coherency": Entry(
        "sightline.metrics._adcc:coherency",
        "correlation of the map with that of the image seen through it",
        "Poppi et al. 2021",
        "%",
        True,
    ),
    "complexity": Entry(
        "sightline.metrics._adcc:complexity",
        "mean of the map",
        "Poppi et al. 2021",
        "%",
        False,
    ),
    "total_variation": Entry(
        "sightline.metrics._mask_statistics:total_variation",
        "how much the map changes from pixel to pixel",
        "Zolna et al. 2020",
        "",
        None,
    ),
    "entropy": Entry(
        "sightline.metrics._mask_statistics:entropy",
        "how far the map's pixels are from zero and one",
        "Zolna et al. 2020",
        "bits",
        None,
    ),
    "area": Entry(
        "sightline.metrics._mask_statistics:area",
        "mean of the map",
        "Zolna et al. 2020",
        "%",
        None,
    ),
    "area_deviation": Entry(
        "sightline.metrics._mask_statistics:area_deviation",
        "standard deviation of the maps' means",
        "Zolna et al. 2020",
        "%",
        None,
    ),
    "dead_cells": Entry(
        "sightline.metrics._dead_cells:dead_cells",
        "share of the explained layer's cells in which nothing is active",
        "Maruf et al. 2023",
        "%",
        None,
    ),
}

_TYPES = {
    "Measure": "sightline.metrics._measure:Measure",
    "Case": "sightline.metrics._measure:Case",
    "Scored": "sightline.metrics._measure:Scored",
    "check_scored": "sightline.metrics._measure:check_scored",
    "finite": "sightline.metrics._measure:finite",
}

__all__ = ["METRICS", "Case", "Entry", "Measure", "Scored", "check_scored", "finite", *METRICS]


def __getattr__(name: str) -> Any:
    if name in METRICS:
        return METRICS[name].metric
    if name in _TYPES:
        return load(_TYPES[name])
    raise AttributeError(f"module 'sightline.metrics' has no attribute {name!r}")
