"""Score-CAM. Wang, Wang, Du, Yang, Zhang, Ding, Mardziel and Hu, Score-CAM, CVPR workshop 2020."""

import torch
from torch import Tensor

from sightline.classifier import Classifier, check_labels, logit
from sightline.erase import Eraser, mix, resolve
from sightline.maps import Mode, resize, unit
from sightline.types import Erase, Features, Images, Labels, Saliency, Score


def score_cam(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    score: Score = logit,
    erase: Eraser = "black",
    mode: Mode = "bilinear",
    chunk: int = 64,
) -> Saliency:
    """Return the features weighted by the score of the image seen through each of them.

    S = ReLU(sum_k w_k A^k), w = softmax_k(u), u_k = f(x * n(up A^k))_c - f(x_b)_c (Algorithm 1); the score of the
    baseline image x_b is the same for every k and drops out of the softmax. (b, 1, i, j), non-negative, at the layer's
    resolution. One forward a channel, `chunk` masked images at a time.

    Raises:
        ValueError: a chunk below one.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk >= 1 masked images at a time, got {chunk}")
    A, logits = classifier.features_and_logits(x)
    y, filling = check_labels(logits, y), resolve(erase, classifier.mean)
    with torch.no_grad():
        u = torch.cat([scores(classifier, x, y, A, pairs, score, filling, mode) for pairs in chunks(A, chunk)])
        w = u.view(A.shape[:2]).softmax(1)
    return torch.einsum("bk,bkij->bij", w, A).relu()[:, None]


def chunks(A: Features, chunk: int) -> list[Tensor]:
    """Return the numbers of all (image, channel) pairs, `chunk` at a time."""
    pairs = torch.arange(A.shape[0] * A.shape[1], device=A.device)
    return [pairs[start : start + chunk] for start in range(0, len(pairs), chunk)]


def scores(
    classifier: Classifier, x: Images, y: Labels, A: Features, pairs: Tensor, score: Score, erase: Erase, mode: Mode
) -> Tensor:
    """Return the score of each pair's image through its channel."""
    image, channel = pairs // A.shape[1], pairs % A.shape[1]
    size = (x.shape[2], x.shape[3])
    masks = unit(resize(A[image, channel][:, None], size, mode)).to(x.dtype)
    return score(classifier(mix(x[image], masks, erase)), y[image])
