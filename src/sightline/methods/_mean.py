"""Mean. The maps of several methods, put together on the larger grid."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.maps import resize
from sightline.methods._normalized import Normalize, normalization
from sightline.methods._perturbed import Chosen, called, complete
from sightline.types import Images, Labels, Saliency


def mean(*methods: Chosen, normalize: Normalize = "unit") -> Method:
    """Return the mean of several methods.

    S = mean_m n(M_m): maps of smaller grids are resized to the largest (bilinear). n, by `normalize`: `unit`
    (A - min A) / (max A - min A), because different methods have different scales; `max` A / max A, which keeps
    zero; or `none`. (b, 1, i, j) on the largest grid. Costs a map of each method.

    Raises:
        ValueError: no method.
        LookupError: an unknown normalization (when called) or method.
    """
    check_methods(methods)
    return partial(averaged, methods=tuple(map(complete, methods)), normalize=normalize)


@called("mean")
def averaged(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    methods: Sequence[Method],
    normalize: Normalize,
) -> Saliency:
    """Return the mean of the methods' maps, (b, 1, i, j) on the largest grid."""
    return torch.stack(together(classifier, x, y, methods, normalize)).mean(0)


def together(
    classifier: Classifier, x: Images, y: Labels | None, methods: Sequence[Method], normalize: Normalize
) -> list[Saliency]:
    """Return the map of each method, normalized and on the largest grid."""
    n = normalization(normalize)
    maps = [method(classifier, x, y) for method in methods]
    size = larger(maps)
    return [n(resize(one, size)) for one in maps]


def larger(maps: Sequence[Float[Tensor, "b n _i _j"]]) -> tuple[int, int]:
    """Return the largest height and the largest width of the maps."""
    return max(one.shape[2] for one in maps), max(one.shape[3] for one in maps)


def check_methods(methods: Sequence[Chosen]) -> None:
    """Check that there is something to put together.

    Raises:
        ValueError: no method.
    """
    if not methods:
        raise ValueError("expected one or more methods, got none")
