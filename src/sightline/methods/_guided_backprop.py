"""Guided backpropagation.

Springenberg, Dosovitskiy, Brox and Riedmiller, Striving for simplicity: the all convolutional net, ICLR workshop 2015.
"""

from sightline.classifier import Classifier, logit
from sightline.methods._rectified import rectified_gradient, through_active
from sightline.types import Images, Labels, Saliency, Score


def guided_backprop(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the largest absolute guided derivative of the score over the color channels.

    S = max_ch |R_ch|, R the gradient in which every ReLU a = max(z, 0) passes R_z = R_a 1[R_a > 0] 1[a > 0]; (b, 1, h,
    w), non-negative, at the input's resolution. Modules and functions count as ReLUs, in place or not, ReLU6 too; leaky
    and smooth ones do not and pass the plain gradient. One forward, one backward.

    *Differs:* Springenberg et al. show the three colors of R; the map is reduced as that of `gradient`.

    Raises:
        UnsuitedError: no ReLU ran, or no gradient came back.
    """
    return rectified_gradient(classifier, x, y, score, through_active).abs().amax(1, keepdim=True)
