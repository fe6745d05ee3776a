"""Per class. The maps of several classes of each image, in one call."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.methods._cam import cam, cams
from sightline.types import Images

PerClass: TypeAlias = Callable[[Classifier, Images, Int[Tensor, "b n"]], Float[Tensor, "b n _i _j"]]

ONE_PASS: Mapping[Method, PerClass] = {cam: cams}
"""Methods that give all classes at the price of one."""


def per_class(method: Method) -> PerClass:
    """Return the function (classifier, x, classes (b, n)) -> maps (b, n, i, j): map n of an image explains its class n.

    One call of the method a column of `classes`; a single one for methods with a one-pass form (`cam`).
    """

    def explain(classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n _i _j"]:
        return torch.cat([method(classifier, x, column) for column in classes.unbind(1)], 1)

    return ONE_PASS.get(method, explain)
