"""Fake-CAM. Poppi et al., Revisiting the evaluation of class activation mapping, CVPR workshop 2021."""

import torch

from sightline.classifier import Classifier
from sightline.types import Images, Labels, Saliency


def fake_cam(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return a map that says nothing: 1 everywhere, 0 at the top left pixel; (b, 1, h, w).

    A control: it deceives average drop and average increase. No forward.
    """
    saliency = torch.ones_like(x[:, :1])
    saliency[:, :, 0, 0] = 0
    return saliency
