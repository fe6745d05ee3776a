"""Discriminative truth. Whether a map marks the pixels that truly tell a class from others.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, define the discriminative region of an object by a CAM. Where the pixels that
tell classes apart are known, that can be checked.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from sightline.backgrounds import IGNORE
from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches
from sightline.evaluation import Maps, checked_batch
from sightline.maps import check_shares
from sightline.metrics._segmentation import Average, share
from sightline.protocols._segmentation import Scene, marked, suited, telling_of
from sightline.runs import Choice, Score

DIRECTIONS = {"precision": True, "recall": True, "iou": True, "base": None}


def discriminative_truth(
    method: Method, classifier: Classifier, samples: Indexed[Sample], /, *, tau_cam: float = 0.25, batch: int = 16
) -> dict[str, Score]:
    """Measure how well the discriminative region that a map defines is the true one; percent, higher is better.

    DR_c are the pixels of class c in the mask where the map, resized to the image and divided by its maximum, is at
    least `tau_cam`; T_c those of its parts that tell it from the classes nearest to it. With the method `cam` this asks
    about the paper's own definition, with another one about that method.

        precision   |DR and T| / |DR|
        recall      |DR and T| / |T|
        iou         |DR and T| / |DR or T|
        base        |T| / |object|, the precision of a region that is blind to T

    Pixels of all images and classes are pooled; `_macro` is the mean over classes, each pooled by itself. Every class
    in the mask is asked about. What is divided by no pixel is NaN; a map that is not finite has no DR. *Differs:* the
    paper has no such measure.

    Raises:
        ValueError: `tau_cam` outside (0, 1], a data set that does not know its parts, an image without a mask or with
            one of another size, a class that the network does not have, or no image.
    """
    check_shares(tau_cam=tau_cam)
    seen, telling = Maps.of_method(method), telling_of(samples)
    counts: Int[Tensor, "k 4"] | None = None
    images = 0
    for part in batches(samples, batch):
        part = checked_batch(part, classifier)
        if counts is None:
            counts = torch.zeros(classifier(part.x[:1]).shape[1], 4).long()
        scenes = [Scene.of(sample, len(counts)) for sample in part.samples]
        there = [scene.there for scene in scenes]
        D = suited([seen], None, tau_cam, classifier, part, there, batch)
        for scene, dr, true in zip(scenes, D, marked(telling, classifier, part, there, batch), strict=True):
            mask = scene.mask.to(dr.device)
            own = mask == torch.tensor(scene.there, device=dr.device)[:, None, None] + 1
            sizes = [one.flatten(1).sum(1) for one in (dr & true, dr & own, true, own)]
            counts[list(scene.there)] += torch.stack(sizes, 1).cpu()
            images += bool((mask != IGNORE).any())
    if counts is None:
        raise ValueError("no image was measured; the data set is empty")
    return outcome(counts, images)


def outcome(counts: Int[Tensor, "k 4"], images: int) -> dict[str, Score]:
    """Return all numbers from |DR and T|, |DR|, |T| and |object| of each class."""
    both, found, true, whole = counts.unbind(1)
    shares = {"precision": (both, found), "recall": (both, true), "iou": (both, found + true - both)}
    scores: dict[str, Score] = {}
    averages: dict[str, Average] = {"": "micro", "_macro": "macro"}
    for end, average in averages.items():
        for name, (part, all_of_it) in {**shares, "base": (true, whole)}.items():
            value = float(share(part, all_of_it, average))
            scores[f"{name}{end}"] = Score(Choice(f"{name}{end}"), value, DIRECTIONS[name], count=images)
    return scores
