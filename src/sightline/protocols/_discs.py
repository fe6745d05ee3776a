"""Discs. The distributions of variable occlusion, fitted on annotated images.

Fong and Vedaldi, Interpretable explanations of black boxes by meaningful perturbation, ICCV 2017, supplement.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.data import Sample
from sightline.methods._variable_occlusion import Discs, fit, of_boxes, of_instances


def fit_discs(samples: Iterable[Sample]) -> Discs:
    """Fit area and center of the objects of any samples with masks or boxes; images without are passed over.

    One draw an image and class: the mean area and the mean center row over the instances of the class (a class without
    instances counts as one; boxes without a mask are of one class). The areas are log-normal, the rows normal.

    Raises:
        ValueError: fewer than two annotated objects.
    """
    found = [draw for sample in samples for draw in objects(sample)]
    if len(found) < 2:
        raise ValueError(f"expected at least two annotated objects, got {len(found)}; give samples with masks or boxes")
    areas, heights = torch.stack(found).unbind(1)
    return fit(areas, heights)


def objects(sample: Sample) -> Iterator[Float[Tensor, "2"]]:
    """Yield mean area and center row, as shares of the image, of each class."""
    size = (sample.image.shape[1], sample.image.shape[2])
    if sample.mask is None:
        if sample.boxes is not None and len(sample.boxes):
            yield of_boxes(sample.boxes, size)
        return
    for label in torch.unique(sample.mask).tolist():
        if label not in (0, 255):
            whole = (sample.mask == label).int()
            known = whole if sample.instances is None else whole * sample.instances
            yield of_instances(known if bool(((known > 0) & (known != 255)).any()) else whole)
