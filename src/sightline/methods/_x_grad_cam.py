"""XGrad-CAM. Fu, Hu, Dong, Guo, Gao and Li, Axiom-based Grad-CAM, BMVC 2020."""

import torch

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def x_grad_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the features weighted by their activation-weighted mean gradients.

    S = ReLU(sum_k w_k A^k), w_k = sum_ij G^k A^k / sum_ij A^k (eq 8); (b, 1, i, j), non-negative, at the layer's
    resolution. A channel whose features sum to zero gets weight zero. One forward.
    """
    A, G = classifier.features_and_gradient(x, y, score)
    mass = A.sum((2, 3), keepdim=True)
    w = torch.where(mass == 0, 0, (G * A).sum((2, 3), keepdim=True) / mass)
    return (w * A).sum(1, keepdim=True).relu()
