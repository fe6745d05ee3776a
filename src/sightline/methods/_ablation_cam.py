"""Ablation-CAM. Desai and Ramaswamy, Ablation-CAM, WACV 2020."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, check_labels, logit
from sightline.types import Images, Labels, Saliency, Score


def ablation_cam(
    classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit, chunk: int = 256
) -> Saliency:
    """Return the features weighted by the share of the score that is lost without each of them.

    S = ReLU(sum_k w_k A^k), w_k = (y_c - y_c^k) / y_c, y_c^k the score with channel k set to zero (eq 3); (b, 1, i, j),
    non-negative, at the layer's resolution. One forward an image and, for every channel, what lies behind the layer,
    `chunk` channels at a time. A score of exactly zero leaves the plain difference as weight.

    Raises:
        ValueError: a chunk below one.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk >= 1 channels at a time, got {chunk}")
    A, logits = classifier.features_and_logits(x)
    y = check_labels(logits, y)
    whole = score(logits, y)
    with torch.no_grad():
        rows = [without(classifier, x[i : i + 1], y[i], A[i], score, chunk) for i in range(len(x))]
    lost = whole[:, None] - torch.stack(rows)
    w = lost / torch.where(whole == 0, 1, whole)[:, None]
    return torch.einsum("bk,bkij->bij", w, A).relu()[:, None]


def without(
    classifier: Classifier, x: Images, y: Tensor, A: Float[Tensor, "c i j"], score: Score, chunk: int
) -> Float[Tensor, " c"]:
    """Return one image's score without each of its channels."""
    scores = []
    for start in range(0, len(A), chunk):
        channels = torch.arange(start, min(start + chunk, len(A)), device=A.device)
        ablated = A.repeat(len(channels), 1, 1, 1)
        ablated[torch.arange(len(channels), device=A.device), channels] = 0
        scores.append(score(classifier.logits_with(x, ablated), y.expand(len(channels))))
    return torch.cat(scores)
