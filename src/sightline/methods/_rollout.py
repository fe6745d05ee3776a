"""Attention rollout. Abnar and Zuidema, Quantifying attention flow in transformers, ACL 2020."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, check_labels
from sightline.hooks import differentiable, frozen
from sightline.methods._attention import read
from sightline.registry import unknown
from sightline.types import Images, Labels, Saliency

Fusion: TypeAlias = Literal["mean", "max", "min"]


def rollout(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    start: int = 0,
) -> Saliency:
    """Return what the class token gets of each patch when attention is followed through all blocks.

    R = N(A^B) ... N(A^2) N(A^1), N(A) = (A + I) / 2 with rows scaled to sum to one (section 3: the identity is the
    shortcut), A the attention fused over the heads; S = R_class, its patches on their grid. `start` is the first block
    that counts. *Differs:* `fusion` by maximum or minimum instead of the paper's mean, and `discard`, the share of each
    image's lowest attentions that are set to zero in every block (never those to the class token), are later practice;
    the defaults are the paper. The label is checked and changes nothing. Networks that read several tokens (class and
    distillation, or the mean of the patches): the mean of their rows. (b, 1, i, j), in [0, 1], on the grid of the
    patches. One forward.

    Raises:
        UnsuitedError: a network without attention of all tokens to all tokens.
        ValueError: `discard` outside [0, 1); no such block.
        LookupError: an unknown fusion.
    """
    if not 0 <= discard < 1:
        raise ValueError(f"expected 0 <= discard < 1, the share of the attention that is set to zero, got {discard}")
    if fusion not in FUSIONS:
        raise LookupError(unknown(fusion, FUSIONS, "fusion"))
    with differentiable(), frozen(classifier.model):
        seen = read(classifier, x)
        check_labels(seen.logits, y)
        if not 0 <= start < len(seen.matrices):
            raise ValueError(f"expected 0 <= start < {len(seen.matrices)}, the number of blocks, got {start}")
        kept = 1 if seen.tokens.prefix else 0
        blocks = [without_lowest(FUSIONS[fusion](A), discard, kept) for A in seen.blocks[start:]]
        return seen.on_grid(reduce(lambda R, A: with_shortcut(A) @ R, blocks[1:], with_shortcut(blocks[0])), x)


def with_shortcut(A: Float[Tensor, "b t t"]) -> Float[Tensor, "b t t"]:
    """Return (A + I) / 2, its rows scaled to sum to one."""
    N = (A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)) / 2
    return N / N.sum(-1, keepdim=True)


def without_lowest(A: Float[Tensor, "b t t"], discard: float, kept: int) -> Float[Tensor, "b t t"]:
    """Return A with its `discard` lowest share set to zero, image by image, but for its first `kept` columns."""
    flat = A.flatten(1)
    lowest = flat.argsort(dim=1, stable=True)[:, : int(discard * flat.shape[1])]
    thinned = flat.scatter(1, lowest, 0).view_as(A)
    return torch.cat([A[..., :kept], thinned[..., kept:]], -1)


FUSIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda A: A.mean(1),
    "max": lambda A: A.amax(1),
    "min": lambda A: A.amin(1),
}
