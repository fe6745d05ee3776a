"""Attention. Reads the attention matrices of any network in one forward pass, and edits nothing.

After Vaswani et al.: Attention is all you need. NeurIPS 2017. A = softmax(Q K^T / sqrt(d) + mask), output A V. Fused
kernels never show A; while `read` runs the network, they are computed by that formula, and every softmax is watched.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import layers
from sightline.classifier import Classifier, UnsuitedError
from sightline.hooks import substituted
from sightline.layers import Tokens
from sightline.types import Images, Logits, Saliency, Values

Substitutes: TypeAlias = Mapping[Callable[..., Any], Callable[..., Any]]

SOFTMAXES: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)

INSTEAD = "use grad_cam, opti_cam or rise"


@dataclass(frozen=True, eq=False)
class Attention:
    """What a network attended to in one forward pass.

    `matrices` are the A of each block, first to last, as they stand in the graph; `rows` are the tokens that the
    network reads behind the last block: the class token, or all patches where it takes their mean.
    """

    matrices: tuple[Tensor, ...]
    logits: Logits
    tokens: Tokens
    rows: tuple[int, ...]

    @property
    def blocks(self) -> list[Float[Tensor, "b heads t t"]]:
        """The attention of each block, out of the graph."""
        return [self.by_head(matrix) for matrix in self.matrices]

    def by_head(self, matrix: Tensor) -> Float[Tensor, "b heads t t"]:
        """Return a matrix of the graph, or its gradient, with a dimension for the heads."""
        return matrix.detach().reshape(len(self.logits), -1, *matrix.shape[-2:]).to(self.logits.dtype)

    def gradients(self, values: Values) -> list[Float[Tensor, "b heads t t"]]:
        """Return the gradient of the values with respect to the attention of each block.

        Raises:
            UnsuitedError: no block reaches the values.
        """
        found = derivatives(values.sum(), self.matrices)
        if all(gradient is None for gradient in found):
            raise UnsuitedError(
                "the attention gets no gradient: it does not reach the logits, or the network detaches or runs under "
                "no_grad; use rollout, or another method without gradients, such as score_cam"
            )
        pairs = zip(found, self.matrices, strict=True)
        return [self.by_head(torch.zeros_like(A) if gradient is None else gradient) for gradient, A in pairs]

    def on_grid(self, R: Float[Tensor, "b t t"], x: Images) -> Saliency:
        """Return the mean of the rows that the network reads, over the patches, on their grid."""
        return self.tokens(R[:, list(self.rows)].mean(1)[:, :, None], x)


def read(classifier: Classifier, x: Images, rules: Substitutes | None = None) -> Attention:
    """Run the network once and read its attention; `rules` are more functions to call in place of torch's.

    Enter `differentiable` and `frozen` first: the matrices lie in the graph of the logits. It begins at the first of
    them, unless x asks for a gradient.

    Raises:
        UnsuitedError: the network computes no attention, or not of all tokens to all tokens in every block.
    """
    with watched(rules or {}) as found:
        logits = classifier(x)
    model = type(classifier.model).__name__
    matrices = tuple(A for A in found if A.ndim > 3 or A.shape[-1] == A.shape[-2])
    check_matrices(matrices, len(x), model)
    count = matrices[0].shape[-1]
    tokens = tokens_of(classifier, x, count)
    if tokens is None:
        h, w = x.shape[2:]
        raise UnsuitedError(
            f"the attention of {model} is over {count} tokens, which are no grid of patches on {h} x {w} images; "
            f"{INSTEAD}"
        )
    return Attention(matrices, logits, tokens, rows_read(logits, matrices[-1], tokens))


def rolled_out(blocks: Iterable[Float[Tensor, "b t t"]]) -> Float[Tensor, "b t t"]:
    """Return R - I, R = (I + A^B) ... (I + A^2) (I + A^1): from R = I, R <- R + A R block by block.

    Without I, which the patch part of the class token's row does not hold, and which drowns the rest of other rows.
    """
    first, *rest = blocks
    for A in rest:
        first = first + A + A @ first
    return first


def check_matrices(matrices: tuple[Tensor, ...], count: int, model: str) -> None:
    """Check that every matrix is (b, heads, t, t), or (b heads, t, t), of the same t.

    Raises:
        UnsuitedError: there is none, or one of another shape.
    """
    if not matrices:
        raise UnsuitedError(f"{model} computes no attention: no softmax over tokens ran in its forward pass; {INSTEAD}")
    sizes = {A.shape[-2:] for A in matrices}
    per_image = all(len(A) == count if A.ndim == 4 else A.ndim == 3 and len(A) % count == 0 for A in matrices)
    if not per_image or len(sizes) > 1 or matrices[0].shape[-1] != matrices[0].shape[-2]:
        shapes = ", ".join(dict.fromkeys(str(tuple(A.shape)) for A in matrices))
        raise UnsuitedError(
            f"the attention of {model} has shapes {shapes} for {count} images; expected ({count}, heads, t, t), from "
            f"all tokens to all tokens in every block (windows and attention pooling cannot be multiplied); {INSTEAD}"
        )


def tokens_of(classifier: Classifier, x: Images, count: int) -> Tokens | None:
    """Return how `count` tokens lie on the image: the classifier's own grid, or by the stride of its convolutions."""
    grid = classifier.to_grid
    if isinstance(grid, Tokens):
        i, j = grid.cells(x)
        if count == grid.prefix + i * j:
            return grid
    cuts = [m for m in classifier.model.modules() if isinstance(m, nn.Conv2d) and tuple(m.stride) == m.kernel_size]
    return layers.tokens(count, x, list(dict.fromkeys((m.stride[0], m.stride[1]) for m in cuts if m.stride[0] > 1)))


def rows_read(logits: Logits, last: Tensor, tokens: Tokens) -> tuple[int, ...]:
    """Return the rows of the last block's attention on which the logits depend.

    Where no gradient tells (an all-zero head, a network under no_grad): the first, or all where there are only patches.
    """
    weights = torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=logits.device)
    (gradient,) = derivatives((logits * weights).sum(), (last,))
    everything = range(last.shape[-2])
    if gradient is None or not bool(gradient.any()):
        return tuple(everything) if tokens.prefix == 0 else (0,)
    alive = gradient.transpose(0, -2).flatten(1).any(1).tolist()
    return tuple(row for row in everything if alive[row])


def derivatives(value: Tensor, matrices: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Return the derivative with respect to each matrix, None where there is none; the graph is kept."""
    if not value.requires_grad:
        return (None,) * len(matrices)
    return torch.autograd.grad(value, matrices, retain_graph=True, allow_unused=True)


@contextmanager
def watched(rules: Substitutes) -> Iterator[list[Tensor]]:
    """Collect what every softmax over the last of three or more dimensions gives; fused attention is made explicit."""
    found: list[Tensor] = []
    seen: Substitutes = {**rules, **{f: watch(rules.get(f, f), found) for f in SOFTMAXES}}

    def explicit(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with substituted(seen):
                return f(*args, **kwargs)

        return run

    fused: Substitutes = {
        F.scaled_dot_product_attention: explicit(scaled_dot_product_attention),
        F.multi_head_attention_forward: explicit(multi_head_attention_forward),
    }
    with substituted({**seen, **fused}):
        yield found


def watch(softmax: Callable[..., Any], found: list[Tensor]) -> Callable[..., Any]:
    """Return a softmax that appends what it gives to `found`, if it is over the last of at least three dimensions."""

    def run(*args: Any, **kwargs: Any) -> Any:
        A = softmax(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if A.ndim > 2 and dim in (-1, A.ndim - 1):
            A = A if A.requires_grad else A.detach().requires_grad_()
            found.append(A)
        return A

    return run


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(Q K^T scale + mask) V; nothing is dropped."""
    return attend(query, key, value, mask=attn_mask, causal=is_causal, scale=scale, grouped=enable_gqa)[1]


def attend(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return A = softmax(Q K^T scale + mask), and A V."""
    if grouped:
        K, V = (heads.repeat_interleave(Q.shape[-3] // heads.shape[-3], -3) for heads in (K, V))
    logits = Q @ K.transpose(-1, -2) * (1 / math.sqrt(Q.shape[-1]) if scale is None else scale)
    if causal and mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=Q.device).tril()
    if mask is not None:
        logits = logits + (additive(~mask, logits) if mask.dtype == torch.bool else mask)
    A = logits.softmax(-1)
    return A, A @ V


def additive(hidden: Tensor, like: Tensor) -> Tensor:
    """Return minus infinity where something is hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Do what torch's function of this name does, in evaluation mode, step by step.

    Raises:
        UnsuitedError: keys that are no tokens (`bias_k`, `add_zero_attn`, `static_k`), or no batch.
    """
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    unread = [name for name in ("bias_k", "bias_v", "static_k", "static_v") if getattr(given, name) is not None]
    unread += ["add_zero_attn"] if given.add_zero_attn else []
    if unread or given.query.ndim != 3:
        what = " and ".join(unread) if unread else "without a batch dimension"
        raise UnsuitedError(f"attention of nn.MultiheadAttention with {what} is not from tokens to tokens; {INSTEAD}")
    Q, K, V = (z.reshape(*z.shape[:2], given.num_heads, -1).permute(1, 2, 0, 3) for z in projections(given))
    A, mixed = attend(Q, K, V, mask=mask_of(given, Q))
    out = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), given.out_proj_weight, given.out_proj_bias)
    return out, (A.mean(1) if given.average_attn_weights else A) if given.need_weights else None


SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def projections(given: SimpleNamespace) -> list[Tensor]:
    """Return query, key and value, (t, b, heads d) each."""
    if given.use_separate_proj_weight:
        weights = given.q_proj_weight, given.k_proj_weight, given.v_proj_weight
    else:
        weights = given.in_proj_weight.chunk(3)
    biases = (None,) * 3 if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
    return [F.linear(*one) for one in zip((given.query, given.key, given.value), weights, biases, strict=True)]


def mask_of(given: SimpleNamespace, Q: Tensor) -> Tensor | None:
    """Return the sum of both masks, broadcastable to (b, heads, t, t); None without any."""
    masks: list[Tensor] = []
    if given.attn_mask is not None:
        images = len(Q) if given.attn_mask.ndim == 3 else 1
        masks.append(given.attn_mask.reshape(images, -1, *given.attn_mask.shape[-2:]))
    if given.key_padding_mask is not None:
        masks.append(given.key_padding_mask[:, None, None])
    added = [additive(mask, Q) if mask.dtype == torch.bool else mask for mask in masks]
    return sum(added[1:], added[0]) if added else None
