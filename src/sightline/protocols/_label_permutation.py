"""Label permutation. A map that explains what a network has learned changes when it has learned nothing of use.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, Sanity checks for saliency maps, NeurIPS 2018: the data
randomization test.
"""

import torch

from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches
from sightline.evaluation import cases
from sightline.metrics import Scored
from sightline.protocols._randomization import likeness, scores
from sightline.runs import Score


def label_permutation(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    permuted: Classifier,
    scored: Scored = "label",
    batch: int = 16,
) -> dict[str, Score]:
    """Compare each map with that of a network of the same kind that was trained on permuted labels.

    The four numbers of `randomization` (Spearman's rank correlation, that of the absolute values, SSIM, and the rank
    correlation of histograms of gradients), for the label (`scored`: or the class that `classifier` predicts). Lower is
    better: 1 means that the map shows the same whatever the network has learned. An image of which a map is constant or
    not finite is NaN and does not count. `sightline train classifier --set permute=0` makes such a network, best with
    another --seed than the first: two networks with the same start stay alike. It should fit its training labels, or it
    is hardly more than an untrained one.

    Raises:
        ValueError: no image, one without a label, or a class that the other network does not have.
    """
    found = [
        likeness(case, [permuted])[:, 0] for case in cases(method, classifier, batches(samples, batch), scored=scored)
    ]
    if not found:
        raise ValueError("no image was measured; the data set is empty")
    return scores(torch.cat(found))
