"""Protocols. What needs more than one image at a time: whole data sets, several models, splits, classes or reruns.

Each is a function `(method, classifier, samples, *, settings) -> {part: Score}`, and is asked for like a metric.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.protocols._cue_localization import cue_localization as cue_localization
    from sightline.protocols._discriminative_truth import discriminative_truth as discriminative_truth
    from sightline.protocols._discs import fit_discs as fit_discs
    from sightline.protocols._label_permutation import label_permutation as label_permutation
    from sightline.protocols._multi_classifier_accuracy import multi_classifier_accuracy as multi_classifier_accuracy
    from sightline.protocols._part_ratio import part_ratio as part_ratio
    from sightline.protocols._randomization import randomization as randomization
    from sightline.protocols._segmentation import segmentation as segmentation
    from sightline.protocols._superset_depth import superset_depth as superset_depth
    from sightline.protocols._weak_localization import weak_localization as weak_localization


@dataclass(frozen=True)
class Entry:
    """What is known of a protocol without importing it; called, it runs."""

    load: str
    summary: str
    paper: str
    unit: str
    parts: Mapping[str, bool | None]
    """Name of each number -> whether higher is better (None: neither); more may come, named by the data."""
    needs: tuple[str, ...] = ()
    """Settings without which it does not run."""
    axis: str = ""
    """What the horizontal axis of its curves shows, where it has some."""

    @property
    def protocol(self) -> Callable[..., Any]:
        """The function."""
        found: Callable[..., Any] = load(self.load)
        return found

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Run it."""
        return self.protocol(*arguments, **settings)


PROTOCOLS: Mapping[str, Entry] = {
    "multi_classifier_accuracy": Entry(
        "sightline.protocols._multi_classifier_accuracy:multi_classifier_accuracy",
        "accuracy of other classifiers on what the map shows, hides, and hides with the hole painted over",
        "Zolna et al. 2020",
        "%",
        {"clean": None, "masked_in": True, "masked_out": False, "inpainted": False},
        ("classifiers",),
        "classifier",
    ),
    "weak_localization": Entry(
        "sightline.protocols._weak_localization:weak_localization",
        "share of images whose box misses, with three thresholds chosen on other images",
        "Fong and Vedaldi 2017",
        "%",
        {
            "value": False,
            "energy": False,
            "mean": False,
            "value_alpha": None,
            "energy_alpha": None,
            "mean_alpha": None,
        },
        ("held_out",),
        "threshold",
    ),
    "cue_localization": Entry(
        "sightline.protocols._cue_localization:cue_localization",
        "pixel average precision of the difference of two classes' maps on the parts that tell them apart",
        "Kim et al. 2021",
        "%",
        {"one": True, "two": True, "three": True, "mean": True},
    ),
    "superset_depth": Entry(
        "sightline.protocols._superset_depth:superset_depth",
        "how well maps summed over ever larger supersets of the label find the object",
        "Kim et al. 2021",
        "%",
        {"self": True, "all": True, "best": True, "best_depth": None, "class_best": True, "class_depth": None},
        ("hierarchy",),
        "depth",
    ),
    "part_ratio": Entry(
        "sightline.protocols._part_ratio:part_ratio",
        "how much more salient some parts are than others, a class and a group",
        "Fong and Vedaldi 2017, supplement",
        "",
        {"ratio": None, "ratio_standard_error": None, "numerator": None, "denominator": None},
        ("numerator", "denominator"),
        "class",
    ),
    "randomization": Entry(
        "sightline.protocols._randomization:randomization",
        "likeness of the map to that of the network with random parameters",
        "Adebayo et al. 2018",
        "",
        {"spearman": False, "spearman_absolute": False, "ssim": False, "hog": False},
        (),
        "stages randomized",
    ),
    "label_permutation": Entry(
        "sightline.protocols._label_permutation:label_permutation",
        "likeness of the map to that of a network trained on permuted labels",
        "Adebayo et al. 2018",
        "",
        {"spearman": False, "spearman_absolute": False, "ssim": False, "hog": False},
        ("permuted",),
    ),
    "segmentation": Entry(
        "sightline.protocols._segmentation:segmentation",
        "overlap of the segmentation that the maps give with the true one, and recall of what a CAM finds and misses",
        "Maruf et al. 2023",
        "%",
        {
            "miou": True,
            "fg_precision": True,
            "fg_precision_micro": True,
            "dr_recall": True,
            "ndr_recall": True,
            "dr_recall_micro": True,
            "ndr_recall_micro": True,
            "hsr_dr": None,
            "lsr_dr": None,
            "hsr_ndr": None,
            "lsr_ndr": None,
            "threshold": None,
        },
        (),
        "threshold",
    ),
    "discriminative_truth": Entry(
        "sightline.protocols._discriminative_truth:discriminative_truth",
        "whether what the map marks on an object are the pixels that truly tell its class from others",
        "after Maruf et al. 2023",
        "%",
        {
            "precision": True,
            "recall": True,
            "iou": True,
            "base": None,
            "precision_macro": True,
            "recall_macro": True,
            "iou_macro": True,
            "base_macro": None,
        },
    ),
}

_HOMES = {
    "fit_discs": "sightline.protocols._discs:fit_discs",
    **{name: entry.load for name, entry in PROTOCOLS.items()},
}

__all__ = ["PROTOCOLS", "Entry", "fit_discs", *PROTOCOLS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return load(_HOMES[name])
    raise AttributeError(f"module 'sightline.protocols' has no attribute {name!r}")
