"""Contrast. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch

from sightline.classifier import Classifier, Method, check_labels
from sightline.methods._normalized import Normalize, normalization
from sightline.methods._per_class import per_class
from sightline.methods._perturbed import Chosen, called, complete
from sightline.types import Images, Labels, Saliency

Against: TypeAlias = int | Mapping[int, int] | Callable[[int], int]
"""A class, or from a label to one."""


def contrast(method: Chosen, against: Against, *, normalize: Normalize = "none") -> Method:
    """Return what speaks for a class and not for another: the difference of their maps.

    S = n(M_y) - n(M_y'), y' the class `against`: one for all, or what a mapping or a function gives for the label. n,
    by `normalize`: `none`, `unit` (A - min A) / (max A - min A), or `max` A / max A. (b, 1, i, j) on the method's grid,
    signed; zero where both classes are the same. Costs 1 forward and 2 maps, 1 where the method has a form for several
    classes (`cam`).

    Raises:
        ValueError: a class that the network does not have (when called).
        LookupError: a label that the mapping lacks, an unknown choice (when called) or method.
    """
    return partial(contrasted, method=complete(method), against=against, normalize=normalize)


@called("contrast")
def contrasted(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    against: Against,
    normalize: Normalize,
) -> Saliency:
    """Return the difference of the maps of two classes, (b, 1, i, j) on the method's grid, signed."""
    n = normalization(normalize)
    with torch.no_grad():
        logits = classifier(x)
    y = check_labels(logits, y)
    others = check_labels(logits, [opposite(against, label) for label in y.tolist()])
    maps = n(per_class(method)(classifier, x, torch.stack([y, others], 1)))
    return maps[:, :1] - maps[:, 1:]


def opposite(against: Against, label: int) -> int:
    """Return the class that a label is set against.

    Raises:
        LookupError: the mapping does not say.
    """
    if isinstance(against, int):
        return against
    if callable(against):
        return int(against(label))
    if label not in against:
        raise LookupError(f"against says no class for label {label}; it knows {sorted(against)}")
    return int(against[label])
