"""Segmentation. Confusion matrices and what is read from them; the regions that a CAM finds and misses.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023. In a mask 0 is background, c + 1 is class c, 255 is ignored.
"""

from typing import Literal, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Average: TypeAlias = Literal["macro", "micro"]

REGIONS = ("hsr_dr", "lsr_dr", "hsr_ndr", "lsr_ndr")
"""High or low saliency (HSR, LSR) on what the CAM finds or misses (DR, NDR)."""


def confusion(
    predicted: Int[Tensor, "*size"], truth: Int[Tensor, "*size"], classes: int, ignore: int = 255
) -> Int[Tensor, "k k"]:
    """Count the pixels of each true class (rows) that are predicted as each class (columns).

    `classes` counts the background too. Pixels whose truth is `ignore` count nowhere; matrices of several images add.

    Raises:
        ValueError: a class below 0, or not below `classes`.
    """
    counted = truth != ignore
    rows, columns = truth[counted].long(), predicted[counted].long()
    for what, found in (("truth", rows), ("prediction", columns)):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
            given = f"{int(found.min())} to {int(found.max())}"
            raise ValueError(f"expected classes in 0..{classes - 1} in the {what}, got {given}")
    return (rows * classes + columns).bincount(minlength=classes * classes).view(classes, classes)


def mean_iou(matrix: Int[Tensor, "k k"]) -> float:
    """Return 100 mean_c |P_c and T_c| / |P_c or T_c|, in [0, 100], higher is better; the background is a class.

    P_c are the pixels predicted as c, T_c those that are c, over the whole data set. A class of neither is left out;
    NaN where no pixel counts.
    """
    hits, predicted, true = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return float(share(hits, predicted + true - hits))


def fg_precision(matrix: Int[Tensor, "k k"], average: Average = "macro") -> float:
    """Return 100 |correct foreground| / |predicted foreground|, in [0, 100], higher is better.

    "macro" is the mean over the classes (without the background) that are predicted somewhere, "micro" pools their
    pixels; NaN where everything is predicted as background. The paper does not say which (SPEC 3.8).

    Raises:
        ValueError: an unknown average.
    """
    return float(share(matrix.diagonal()[1:], matrix.sum(0)[1:], average))


def recall_on(
    region: Bool[Tensor, "*size"],
    predicted: Int[Tensor, "*size"],
    truth: Int[Tensor, "*size"],
    classes: int,
    average: Average = "macro",
    ignore: int = 255,
) -> float:
    """Return 100 |P_c and R_c| / |R_c|, R_c the pixels of foreground class c in a region; in [0, 100], higher better.

    With what a CAM finds of the object as region it is DR-Recall, with what it misses NDR-Recall. Give the pixels of a
    whole data set: they are pooled. "macro" is the mean over the classes that have pixels in the region, "micro" pools
    them; NaN where no class has any.

    *Differs:* the paper defines it for one class and does not say how classes are joined; as in the mean IoU, each
    counts the same.

    Raises:
        ValueError: a class out of range, or an unknown average.
    """
    matrix = confusion(predicted[region], truth[region], classes, ignore)
    return float(share(matrix.diagonal()[1:], matrix.sum(1)[1:], average))


def share(hits: Int[Tensor, "*t k"], whole: Int[Tensor, "*t k"], average: Average = "macro") -> Float[Tensor, "*t"]:
    """Return 100 hits / whole: the mean over classes of which there is something, or of the sums over classes.

    Raises:
        ValueError: an unknown average.
    """
    if average not in ("macro", "micro"):
        raise ValueError(f"expected average='macro' or average='micro', got {average!r}")
    if average == "micro":
        hits, whole = hits.sum(-1, keepdim=True), whole.sum(-1, keepdim=True)
    return (100 * hits.double() / whole).nanmean(-1)


def regions(
    cam: Float[Tensor, "*size"],
    saliency: Float[Tensor, "*size"],
    inside: Bool[Tensor, "*size"],
    tau_cam: float = 0.25,
    tau_sm: float = 0.15,
) -> Int[Tensor, "4"]:
    """Count the pixels of an object in HSR-DR, LSR-DR, HSR-NDR and LSR-NDR.

    DR = {CAM >= tau_cam}, NDR = {CAM < tau_cam}, HSR = {SM >= tau_sm}, LSR = {SM < tau_sm}, inside the object alone;
    both maps are normalized (see `maps.by_maximum`).
    """
    place = 2 * (cam < tau_cam).long() + (saliency < tau_sm).long()
    return place[inside].bincount(minlength=4)


def four_regions(
    cam: Float[Tensor, "*size"],
    saliency: Float[Tensor, "*size"],
    inside: Bool[Tensor, "*size"],
    tau_cam: float = 0.25,
    tau_sm: float = 0.15,
) -> Float[Tensor, "4"]:
    """Return the four regions (see `regions`) as shares of the object, in percent: they sum to 100.

    NaN for an object without pixels.
    """
    counts = regions(cam, saliency, inside, tau_cam, tau_sm)
    return 100 * counts.double() / counts.sum()
