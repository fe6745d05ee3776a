"""Over classes. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from sightline import supersets
from sightline.classifier import Classifier, Method, check_labels
from sightline.methods._normalized import Normalize, normalization
from sightline.methods._per_class import per_class
from sightline.methods._perturbed import Chosen, called, complete
from sightline.registry import chosen
from sightline.types import Images, Labels, Logits, Saliency

Listed: TypeAlias = Sequence[int] | Mapping[int, Sequence[int]] | Callable[[int], Sequence[int]]
"""Several classes for all, or from a label to its own."""

Members: TypeAlias = str | Listed
"""Those, or the name of supersets, see `supersets.members`."""

Reduce: TypeAlias = Literal["sum", "mean"]


def over(method: Chosen, classes: Members, *, normalize: Normalize = "none", reduce: Reduce = "sum") -> Method:
    """Return the method summed over several classes of each image: a superset's map.

    S = sum_{c in Y(y)} n(M_c): Y(y) is `classes` for every label, or what a mapping or a function gives for the label;
    a label that a mapping lacks stands for itself alone. A name stands for supersets of the classifier's own classes:
    "all", "creatures", "pets", or the path of a JSON file (see `supersets.members`). n, by `normalize`: `none`, `unit`
    (A - min A) / (max A - min A), as CALM's authors do for CAM, or `max` A / max A. `reduce` = "mean" divides by the
    number of classes.
    (b, 1, i, j) on the method's grid. Costs 1 forward and a map a class; all classes at the price of one where the
    method has that form (`cam`, `rise`).

    Raises:
        ValueError: no class for a label, one that the network does not have, or names of classes that do not go with
            the supersets (when called).
        LookupError: an unknown choice or supersets (when called), or method.
        FileNotFoundError: no such file (when called).
    """
    return partial(added, method=complete(method), classes=classes, normalize=normalize, reduce=reduce)


@called("over")
def added(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    method: Method,
    classes: Members,
    normalize: Normalize,
    reduce: Reduce,
) -> Saliency:
    """Return the sum or mean of the classes' maps, (b, 1, i, j) on the method's grid."""
    n, together = normalization(normalize), chosen(reduce, REDUCTIONS, "reduction")
    with torch.no_grad():
        logits = classifier(x)
    named = supersets.members(classes, classifier.classes, logits.shape[1]) if isinstance(classes, str) else classes
    sets = [members(named, label, logits) for label in check_labels(logits, y).tolist()]
    found: dict[int, Saliency] = {}
    for count in {len(one) for one in sets}:
        on = [i for i, one in enumerate(sets) if len(one) == count]
        maps = n(per_class(method)(classifier, x[on], torch.stack([sets[i] for i in on])))
        found.update(zip(on, together(maps), strict=True))
    return torch.stack([found[i] for i in range(len(x))])


def members(classes: Listed, label: int, logits: Logits) -> Int[Tensor, " n"]:
    """Return the checked classes that a label stands for.

    Raises:
        ValueError: none, or one that the network does not have.
    """
    if isinstance(classes, Mapping):
        found = classes.get(label, (label,))
    else:
        found = classes if isinstance(classes, Sequence) else classes(label)
    if len(found) == 0:
        raise ValueError(f"expected one or more classes for label {label}, got none")
    return check_labels(logits[:1].expand(len(found), -1), torch.as_tensor(found))


REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda maps: maps.sum(1, keepdim=True),
    "mean": lambda maps: maps.mean(1, keepdim=True),
}
