"""Edge. A control: an edge detector knows the image and nothing of the classifier (Adebayo et al., NeurIPS 2018)."""

import torch
from torch.nn import functional as F

from sightline.classifier import Classifier
from sightline.types import Images, Labels, Saliency


def edge(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return the Sobel gradient's length of the gray image (mean of the channels); (b, 1, h, w), non-negative."""
    across = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    gray = F.pad(x.detach().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(gray, kernels).square().sum(1, keepdim=True).sqrt()
