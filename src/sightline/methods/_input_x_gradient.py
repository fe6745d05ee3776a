"""Input x gradient. Shrikumar, Greenside and Kundaje, Not just a black box, 2016."""

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def input_x_gradient(
    classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit
) -> Saliency:
    """Return the first-order share of each pixel in the score.

    S = sum_ch x_ch dy_c / dx_ch, (b, 1, h, w), signed, at the input's resolution; x is in [0, 1], so a black pixel has
    no share. One forward, one backward.
    """
    return (x.detach() * classifier.gradient(x, y, score)).sum(1, keepdim=True)
