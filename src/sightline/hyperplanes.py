"""Hyperplanes. CAM and saliency as two cuts through one space of features, with the same normal.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, section 3 and figures 1 and 4.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, check_labels
from sightline.maps import by_maximum, check_shares, resize
from sightline.methods._cam import head
from sightline.methods._gradient import gradient
from sightline.types import Images, Labels, Saliency, Values


@dataclass(frozen=True, eq=False)
class Hyperplanes:
    """Where the pixels of images lie beside the hyperplanes of CAM and saliency, at the images' size, in float64.

    `cam` and `saliency` are divided by their maxima; `d_cam` and `d_sm` are the signed distances; `regions` numbers the
    pixels 0 HSR-DR, 1 LSR-DR, 2 HSR-NDR, 3 LSR-NDR, the order of `metrics._segmentation.REGIONS`.
    """

    cam: Float[Tensor, "b 1 h w"]
    saliency: Float[Tensor, "b 1 h w"]
    d_cam: Float[Tensor, "b 1 h w"]
    d_sm: Float[Tensor, "b 1 h w"]
    regions: Int[Tensor, "b h w"]


def signed_distances(
    classifier: Classifier, x: Images, y: Labels | None = None, *, tau_cam: float = 0.25, tau_sm: float = 0.15
) -> Hyperplanes:
    """Return how far each pixel is from the hyperplanes that part what CAM and saliency find from what they miss.

        CAM = w.A / Z,       Z = max_p w.A_p          d_cam = (CAM - tau_cam) / (|w| / Z)
        SM = |w.a'| / Z_sm,  Z_sm = max_p |w.a'_p|    d_sm = (SM - tau_sm) / (|w| / Z_sm)

    w is the class's row of the linear head (its bias does not enter), A_p the features, resized (bilinear) to the
    image, a'_p = dGAP(A) / dx_p at the color channel where |w.a'_p| is largest. So d_cam >= 0 in DR and nowhere else,
    d_sm >= 0 in HSR and nowhere else. Where a maximum is not above zero the map is zero and Z is 1: no DR, no HSR, and
    the distance is -tau / |w| everywhere. For a class without weights (the first of a network with one output) both
    are -inf.

    *Differs:* the paper speaks of signed distances and gives no formula; these are those of its hyperplanes (SPEC
    3.1). Its SM is not normalized where it is defined, and its thresholds ask for it (SPEC 11).

    Raises:
        UnsuitedError: the layer is not followed by global average pooling and one linear layer alone.
        ValueError: a threshold outside (0, 1].
    """
    check_shares(tau_cam=tau_cam, tau_sm=tau_sm)
    A, logits = classifier.features_and_logits(x)
    labels = check_labels(logits, y)
    w = head(classifier, A, logits)[labels].double()
    raw = torch.einsum("bk,bkij->bij", w, A.double())[:, None]
    cam, d_cam = cut(resize(raw, (x.shape[2], x.shape[3])), w.norm(dim=1), tau_cam)
    saliency, d_sm = cut(gradient(classifier, x, labels).double(), w.norm(dim=1), tau_sm)
    return Hyperplanes(cam, saliency, d_cam, d_sm, (2 * (d_cam < 0).long() + (d_sm < 0).long())[:, 0])


def cut(raw: Saliency, length: Values, tau: float) -> tuple[Saliency, Saliency]:
    """Return the map divided by its maximum Z, and (map - tau) / (length / Z)."""
    Z = raw.amax((1, 2, 3))
    scaled = by_maximum(raw[:, 0])[:, None]
    return scaled, (scaled - tau) / (length / torch.where(Z > 0, Z, 1)).view(-1, 1, 1, 1)
