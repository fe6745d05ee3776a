"""Integrated gradients, as CALM's official code has them.

Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021, and its official code.
"""

import torch

from sightline.classifier import Classifier, logit
from sightline.erase import Eraser
from sightline.methods._integrated_gradients import baseline, check_path, path_gradients
from sightline.types import Images, Labels, Saliency, Score


def calm_integrated_gradients(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    steps: int = 50,
    erase: Eraser = "mean",
    score: Score = logit,
    chunk: int = 16,
) -> Saliency:
    """Return the gradient maps on the straight path from a baseline to the image, summed.

    S = 1/m sum_{j=0..m} max_ch |dy_c / dx_ch (x' + j/m (x - x'))|, m = `steps`: m + 1 points divided by m, and no
    factor x - x', so this is not `integrated_gradients` and nothing sums to the score. (b, 1, h, w), non-negative, at
    the input's resolution. x' is the mean color: the official code starts from zero in normalized space. m + 1 forwards
    and backwards, `chunk` images (at least the batch) at a time.

    *Differs:* the derivative is that with respect to x in [0, 1], as in `gradient`; the official code's is with respect
    to the normalized image, so its channels weigh as their deviations.

    Raises:
        ValueError: fewer than one step or image at a time.
        UnsuitedError: no gradient came back.
    """
    check_path(steps, chunk)
    origin = baseline(classifier, x, erase)
    alphas = [j / steps for j in range(steps + 1)]
    total = torch.zeros_like(origin[:, :1])
    for gradients in path_gradients(classifier, x, y, origin, alphas, score, chunk):
        total += gradients.abs().amax(2, keepdim=True).sum(0)
    return total / steps
