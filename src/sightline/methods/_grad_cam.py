"""Grad-CAM. Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, Grad-CAM, ICCV 2017."""

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def grad_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the features weighted by their mean gradients.

    S = ReLU(sum_k w_k A^k), w_k = mean_ij G^k (eqs 1 and 2), G = dy_c / dA; (b, 1, i, j), non-negative, at the layer's
    resolution. One forward: the backward pass ends at the layer.
    """
    A, G = classifier.features_and_gradient(x, y, score)
    w = G.mean((2, 3), keepdim=True)
    return (w * A).sum(1, keepdim=True).relu()
