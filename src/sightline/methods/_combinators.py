"""Combinators. What makes a method of methods, by name, loaded when first used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sightline.registry import load


@dataclass(frozen=True, eq=False)
class Combinator:
    """What is known of a combinator without importing it.

    `takes`: one method, or several. `needs`: the settings without a default. `cost`: passes an image, M those of one
    map. `signed`: its maps are, whatever the method's are. `quick`: settings for smoke runs.
    """

    load: str
    summary: str
    paper: str = ""
    takes: Literal["one", "many"] = "one"
    needs: tuple[str, ...] = ()
    cost: str = "M"
    signed: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def combinator(self) -> Callable[..., Any]:
        """The function itself: methods in, with keyword-only settings; a method out."""
        found: Callable[..., Any] = load(self.load)
        return found


COMBINATORS: Mapping[str, Combinator] = {
    "smooth": Combinator(
        "sightline.methods._smooth:smooth",
        "the mean, variance or mean square of the maps of noisy copies",
        paper="Smilkov et al. 2017",
        cost="1 forward, 50 M",
        quick={"samples": 3},
    ),
    "binary_mask": Combinator(
        "sightline.methods._binary_mask:binary_mask",
        "the mean map of copies that miss random pixels",
        paper="Maruf et al. 2023",
        cost="1 forward, 50 M",
        quick={"samples": 3},
    ),
    "random_patch": Combinator(
        "sightline.methods._patches:random_patch",
        "the mean map of copies that miss random patches",
        paper="Maruf et al. 2023",
        cost="1 forward, 50 M",
        quick={"samples": 3, "patch": 8},
    ),
    "disc_patch": Combinator(
        "sightline.methods._patches:disc_patch",
        "the mean map of copies that miss patches, the discriminative ones above all",
        paper="Maruf et al. 2023",
        cost="2 forwards, 50 M",
        quick={"samples": 3, "patch": 8},
    ),
    "random_crop": Combinator(
        "sightline.methods._crops:random_crop",
        "the maps of random crops, put back where they lie",
        paper="Maruf et al. 2023",
        cost="141 forwards, 140 M",
        quick={"samples": 4},
    ),
    "disc_crop": Combinator(
        "sightline.methods._crops:disc_crop",
        "the maps of random crops, the least discriminative ones above all",
        paper="Maruf et al. 2023",
        cost="at most 52 forwards, 50 M",
        quick={"samples": 12, "beta": 1.5},
    ),
    "flip_and_scale": Combinator(
        "sightline.methods._flip_and_scale:flip_and_scale",
        "the mean map of enlarged, reduced and mirrored copies",
        paper="Ahn et al. 2019",
        cost="1 forward, 8 M of other sizes",
        quick={"scales": (1.0, 2.0)},
    ),
    "over": Combinator(
        "sightline.methods._over:over",
        "the sum of the maps of several classes",
        paper="Kim et al. 2021",
        needs=("classes",),
        cost="1 forward, M a class",
        quick={"classes": {0: (0, 1), 2: (1, 2, 3)}},
    ),
    "contrast": Combinator(
        "sightline.methods._contrast:contrast",
        "the map of a class minus that of another",
        paper="Kim et al. 2021",
        needs=("against",),
        cost="1 forward, 2 M",
        signed=True,
        quick={"against": 1},
    ),
    "mean": Combinator(
        "sightline.methods._mean:mean",
        "the mean of the maps of several methods",
        takes="many",
        cost="M of each",
    ),
    "product": Combinator(
        "sightline.methods._product:product",
        "the product of the maps of several methods",
        takes="many",
        cost="M of each",
    ),
}
