"""Gradient. Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks, ICLR workshop 2014."""

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def gradient(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the largest absolute derivative of the score over the color channels.

    S = max_ch |dy_c / dx_ch|, (b, 1, h, w), non-negative, at the input's resolution. One forward, one backward.
    """
    return classifier.gradient(x, y, score).abs().amax(1, keepdim=True)
