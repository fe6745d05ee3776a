"""HiRes-CAM. Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations, 2020."""

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def hires_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the positive part of features times gradients, summed over the channels.

    S = ReLU(sum_k G^k A^k) (eq 3, with the ReLU that Opti-CAM's comparison applies); (b, 1, i, j), non-negative, at
    the layer's resolution. One forward. Where the layer is followed by global average pooling and a linear layer, it
    equals Grad-CAM and is proportional to ReLU(CAM).
    """
    A, G = classifier.features_and_gradient(x, y, score)
    return (G * A).sum(1, keepdim=True).relu()
