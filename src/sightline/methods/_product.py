"""Product. Where all of several methods look, on the larger grid."""

from collections.abc import Sequence
from functools import partial

import torch

from sightline.classifier import Classifier, Method
from sightline.methods._mean import check_methods, together
from sightline.methods._normalized import Normalize
from sightline.methods._perturbed import Chosen, called, complete
from sightline.types import Images, Labels, Saliency


def product(*methods: Chosen, normalize: Normalize = "none") -> Method:
    """Return the product of several methods.

    S = prod_m n(M_m): maps of smaller grids are resized to the largest (bilinear). n, by `normalize`: `none`, because
    scales only multiply the product; `unit` (A - min A) / (max A - min A), which makes signed maps positive first (two
    negative values have a positive product); or `max` A / max A. (b, 1, i, j) on the largest grid. Costs a map of each
    method.

    Raises:
        ValueError: no method.
        LookupError: an unknown normalization (when called) or method.
    """
    check_methods(methods)
    return partial(multiplied, methods=tuple(map(complete, methods)), normalize=normalize)


@called("product")
def multiplied(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    methods: Sequence[Method],
    normalize: Normalize,
) -> Saliency:
    """Return the product of the methods' maps, (b, 1, i, j) on the largest grid."""
    return torch.stack(together(classifier, x, y, methods, normalize)).prod(0)
