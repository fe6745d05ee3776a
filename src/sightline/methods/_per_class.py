"""Per class. The maps of several classes of each image, in one call."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, Method, PerClass
from sightline.explainers._saved import segmenter, segmenters
from sightline.methods._calm import (
    calm_attribution,
    calm_attributions,
    calm_class_given_location,
    calm_classes_given_location,
    calm_location_given_class,
    calm_locations_given_class,
)
from sightline.methods._cam import cam, cams
from sightline.methods._flip_and_scale import scaled, scaled_all
from sightline.methods._rise import rise, rises
from sightline.types import Images

ONE_PASS: Mapping[Callable[..., Any], PerClass] = {
    cam: cams,
    rise: rises,
    segmenter: segmenters,
    calm_attribution: calm_attributions,
    calm_class_given_location: calm_classes_given_location,
    calm_location_given_class: calm_locations_given_class,
}
"""Methods that give all classes at the price of one, and the functions that do; settings have the same names."""


def per_class(method: Method) -> PerClass:
    """Return the function (classifier, x, classes (b, n)) -> maps (b, n, i, j): map n of an image explains its class n.

    One call of the method a column of `classes`; a single one for methods with a one-pass form (`cam`, `rise`, CALM's
    maps, `flip_and_scale` of these), with settings too: `partial(rise, samples=100)`.
    """

    def explain(classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n _i _j"]:
        return torch.cat([method(classifier, x, column) for column in classes.unbind(1)], 1)

    return one_pass(method) or explain


def one_pass(method: Method) -> PerClass | None:
    """Return the form of a method that makes the maps of all classes of an image at the price of one, if it has one."""
    inner, settings = (method.func, method.keywords) if isinstance(method, partial) else (method, {})
    if inner is scaled:
        within = one_pass(settings["method"])
        return partial(scaled_all, **{**settings, "method": within}) if within else None
    together = next((maps for known, maps in ONE_PASS.items() if known is inner), None)
    return partial(together, **settings) if together else None
