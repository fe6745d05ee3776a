"""Coverage. How much of the object a map shows: the recall of F1, on masks instead of boxes.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, CVIU 2020 (section 2, the two copies of an object).
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from sightline.data import Sample
from sightline.metrics._localization import in_pixels
from sightline.metrics._measure import Case, Measure


def coverage(*, instance: int | None = None, normalize: bool = True) -> Measure:
    """Measure 100 sum_R S / |R|, in percent, higher is better; R are the object's pixels.

    S in [0, 1] is the map at the image's resolution, scaled as for pictures, or as it is without `normalize`. R is the
    label's object in the sample's mask; with `instance` the n-th one of the sample's instances, from 1, whatever its
    class. An image without a pixel in R does not count.

    Raises:
        ValueError: an instance below 1, an image without the annotation, or a map outside [0, 1] that is not to be
            normalized.
    """
    if instance is not None and instance < 1:
        raise ValueError(f"expected instance >= 1, the number of one of a sample's instances, got {instance}")

    def score(case: Case) -> Tensor:
        S = in_pixels(case, normalize=normalize)[:, 0]
        R = torch.stack([region(sample, instance) for sample in case.batch.samples]).to(S.device)
        count = R.sum((1, 2))
        return torch.where(count > 0, 100 * (S * R).sum((1, 2)) / count.clamp(min=1), torch.nan)

    return Measure(score, higher_is_better=True)


def region(sample: Sample, instance: int | None) -> Bool[Tensor, "h w"]:
    """Return the pixels of the label's object, or of an instance.

    Raises:
        ValueError: the sample has no such annotation.
    """
    if instance is not None and sample.instances is not None:
        return sample.instances == instance
    found = None if sample.label is None or instance is not None else sample.region_of(sample.label)
    if found is None:
        needed = "a mask and a label" if instance is None else "instances"
        raise ValueError(f"coverage needs {needed}, and {sample.id!r} has none")
    return found[0]
