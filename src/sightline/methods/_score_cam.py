"""Score-CAM. Wang, Wang, Du, Yang, Zhang, Ding, Mardziel and Hu, Score-CAM, CVPR workshop 2020."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, check_labels, logit
from sightline.erase import Eraser, mix, resolve
from sightline.maps import Mode, scaled
from sightline.memory import at_once
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
    chunk: int | None = None,
) -> Saliency:
    """Return the features weighted by the score of the image seen through each of them.

    S = ReLU(sum_k w_k A^k), w = softmax_k(u), u_k = f(x * n(up A^k))_c - f(x_b)_c (Algorithm 1); the score of the
    baseline image x_b is the same for every k and drops out of the softmax. (b, 1, i, j), non-negative, at the layer's
    resolution. One forward a channel, `chunk` masked images at a time (None: as many as the device likes); channels
    that are the same everywhere hide the whole image and share one forward.

    Raises:
        ValueError: a chunk below one.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected chunk >= 1 masked images at a time, got {chunk}")
    A, logits = classifier.features_and_logits(x)
    y, filling = check_labels(logits, y), resolve(erase, classifier.mean)
    with torch.no_grad():
        u = through_each(classifier, x, y, A, score=score, erase=filling, mode=mode, chunk=chunk)
    return torch.einsum("bk,bkij->bij", u.softmax(1), A).relu()[:, None]


def through_each(
    classifier: Classifier,
    x: Images,
    y: Labels,
    A: Features,
    *,
    score: Score,
    erase: Erase,
    mode: Mode,
    chunk: int | None,
) -> Float[Tensor, "b c"]:
    """Return the score of each image through each of its channels; those that are the same everywhere ask once."""
    h, w = x.shape[2:]
    flat = A.amin((2, 3)) == A.amax((2, 3))
    asked = ~flat | (flat.cumsum(1) == 1)
    pairs = asked.flatten().nonzero()[:, 0]
    parts = torch.split(pairs, chunk or at_once(h, w, x.device.type))
    values = torch.cat([scores(classifier, x, y, A, some, score, erase, mode) for some in parts])
    u = values.new_zeros(A.shape[:2])
    u[asked] = values
    once = u.gather(1, flat.int().argmax(1)[:, None])
    return torch.where(flat, once, u)


def scores(
    classifier: Classifier, x: Images, y: Labels, A: Features, pairs: Tensor, score: Score, erase: Erase, mode: Mode
) -> Tensor:
    """Return the score of each pair's image through its channel."""
    image, channel = pairs // A.shape[1], pairs % A.shape[1]
    masks = scaled(A[image, channel][:, None], (x.shape[2], x.shape[3]), mode).to(x.dtype)
    return score(classifier(mix(x[image], masks, erase)), y[image])
