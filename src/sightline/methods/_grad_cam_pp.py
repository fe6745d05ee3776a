"""Grad-CAM++. Chattopadhay, Sarkar, Howlader and Balasubramanian, Grad-CAM++, WACV 2018."""

import torch

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def grad_cam_pp(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the features weighted by their positive gradients, each cell with its own share.

    S = ReLU(sum_k w_k A^k), w_k = sum_ij a^k ReLU(G^k), a^k = (G^k)^2 / (2 (G^k)^2 + (sum_ij A^k) (G^k)^3) (eq 19),
    which is 1 / (2 + (sum_ij A^k) G^k) wherever G is not zero; (b, 1, i, j), non-negative, at the layer's resolution.
    One forward.

    *Differs:* the cancelled form needs no epsilon; libraries that add 1e-6 to the uncancelled denominator change the
    weights wherever (G^k)^2 is not far above 1e-6.
    """
    A, G = classifier.features_and_gradient(x, y, score)
    share = 2 + A.sum((2, 3), keepdim=True) * G
    w = torch.where(share == 0, 0, G.relu() / share).sum((2, 3), keepdim=True)
    return (w * A).sum(1, keepdim=True).relu()
