"""Deconvnet. Zeiler and Fergus, Visualizing and understanding convolutional networks, ECCV 2014."""

from sightline.classifier import Classifier, logit
from sightline.methods._rectified import rectified_gradient, through_all
from sightline.types import Images, Labels, Saliency, Score


def deconvnet(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the largest absolute output of the deconvolutional network over the color channels.

    S = max_ch |R_ch|, R the gradient in which every ReLU a = max(z, 0) passes R_z = R_a 1[R_a > 0], whether its unit is
    active or not; max pooling goes back to its winners, the paper's switches. (b, 1, h, w), non-negative, at the
    input's resolution. What counts as a ReLU: see `guided_backprop`. One forward, one backward.

    *Differs:* Zeiler and Fergus start from one unit of a layer, here from the score; colors are reduced as in
    `gradient`.

    Raises:
        UnsuitedError: no ReLU ran, or no gradient came back.
    """
    return rectified_gradient(classifier, x, y, score, through_all).abs().amax(1, keepdim=True)
