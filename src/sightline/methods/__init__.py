"""Methods. Every post-hoc explainer by name, loaded when first used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.classifier import Classifier, Method
    from sightline.methods._ablation_cam import ablation_cam as ablation_cam
    from sightline.methods._cam import cam as cam
    from sightline.methods._center import center as center
    from sightline.methods._edge import edge as edge
    from sightline.methods._fake_cam import fake_cam as fake_cam
    from sightline.methods._grad_cam import grad_cam as grad_cam
    from sightline.methods._grad_cam_pp import grad_cam_pp as grad_cam_pp
    from sightline.methods._gradient import gradient as gradient
    from sightline.methods._hires_cam import hires_cam as hires_cam
    from sightline.methods._input_x_gradient import input_x_gradient as input_x_gradient
    from sightline.methods._layer_cam import layer_cam as layer_cam
    from sightline.methods._opti_cam import opti_cam as opti_cam
    from sightline.methods._per_class import per_class as per_class
    from sightline.methods._random import random as random
    from sightline.methods._score_cam import score_cam as score_cam
    from sightline.methods._x_grad_cam import x_grad_cam as x_grad_cam
    from sightline.types import Images, Labels, Saliency


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of a method without importing it; called, it is the method with its defaults.

    `needs`: what the classifier must offer. `cost`: passes through the network an image. `class_specific`: the label
    changes the map. `signed`: values below zero speak against the class. `quick`: arguments for smoke runs. `control`:
    knows nothing of the classifier and belongs in every table.
    """

    load: str
    summary: str
    paper: str = ""
    needs: tuple[str, ...] = ()
    cost: str = "none"
    class_specific: bool = True
    signed: bool = False
    control: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def method(self) -> "Method":
        """The function itself."""
        found: Method = load(self.load)
        return found

    def __call__(self, classifier: "Classifier", x: "Images", y: "Labels | None" = None, /) -> "Saliency":
        """Explain with the paper's defaults."""
        return self.method(classifier, x, y)


def _entry(name: str, summary: str, **rest: Any) -> Entry:
    return Entry(f"sightline.methods._{name}:{name}", summary, **rest)


METHODS: Mapping[str, Entry] = {
    "gradient": _entry(
        "gradient",
        "the largest absolute derivative over the colors",
        paper="Simonyan et al. 2014",
        needs=("gradients",),
        cost="1 forward, 1 backward",
    ),
    "input_x_gradient": _entry(
        "input_x_gradient",
        "each pixel's first-order share in the score",
        paper="Shrikumar et al. 2016",
        needs=("gradients",),
        cost="1 forward, 1 backward",
        signed=True,
    ),
    "cam": _entry(
        "cam",
        "features weighted by the linear head",
        paper="Zhou et al. 2016",
        needs=("layer", "linear head"),
        cost="1 forward",
        signed=True,
    ),
    "grad_cam": _entry(
        "grad_cam",
        "features weighted by their mean gradients",
        paper="Selvaraju et al. 2017",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "grad_cam_pp": _entry(
        "grad_cam_pp",
        "features weighted by their positive gradients",
        paper="Chattopadhay et al. 2018",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "x_grad_cam": _entry(
        "x_grad_cam",
        "features weighted by activation-weighted gradients",
        paper="Fu et al. 2020",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "layer_cam": _entry(
        "layer_cam",
        "features weighted cell by cell with positive gradients",
        paper="Jiang et al. 2021",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "hires_cam": _entry(
        "hires_cam",
        "features times gradients",
        paper="Draelos and Carin 2020",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "score_cam": _entry(
        "score_cam",
        "features weighted by the image's score through each",
        paper="Wang et al. 2020",
        needs=("layer",),
        cost="1 forward a channel",
    ),
    "ablation_cam": _entry(
        "ablation_cam",
        "features weighted by what the score loses without each",
        paper="Desai and Ramaswamy 2020",
        needs=("layer",),
        cost="1 forward, the head once a channel",
    ),
    "opti_cam": _entry(
        "opti_cam",
        "features mixed so that the masked image scores highest",
        paper="Zhang et al. 2024",
        needs=("layer", "gradients"),
        cost="100 forwards, 100 backwards",
        quick={"steps": 5},
    ),
    "fake_cam": _entry(
        "fake_cam",
        "control: everything but one pixel",
        paper="Poppi et al. 2021",
        class_specific=False,
        control=True,
    ),
    "center": _entry(
        "center",
        "control: a bell in the middle",
        class_specific=False,
        control=True,
    ),
    "random": _entry(
        "random",
        "control: noise",
        class_specific=False,
        control=True,
    ),
    "edge": _entry(
        "edge",
        "control: an edge detector",
        paper="Adebayo et al. 2018",
        class_specific=False,
        control=True,
    ),
}

__all__ = ["METHODS", "Entry", "per_class", *METHODS]


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name].method
    if name == "per_class":
        return load("sightline.methods._per_class:per_class")
    raise AttributeError(f"module 'sightline.methods' has no attribute {name!r}")
