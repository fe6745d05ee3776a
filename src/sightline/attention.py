"""Attention in bfloat16 on the CPU, where torch's fused routine is slowest: on the way back, with few tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sightline.hooks import Substituted

FEW = 512**2
"""Pairs of tokens up to which it pays to keep all weights; the fused routine makes them again."""


class Attending(Substituted):
    """Call `attention` wherever a network calls torch's; entered by `with`."""

    def __init__(self) -> None:
        super().__init__({F.scaled_dot_product_attention: attention})


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(Q K^T scale) V as `F.scaled_dot_product_attention` does, by `Kept` where that is faster."""
    if attn_mask is not None or dropout_p > 0 or is_causal or enable_gqa or not keeps(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    apply: Callable[..., Tensor] = Kept.apply
    low = (z.to(torch.bfloat16) for z in (query, key, value))
    return apply(*low, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def keeps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether a gradient comes back in bfloat16, through the same heads of one batch, with few tokens."""
    asks = torch.is_grad_enabled() and any(z.requires_grad for z in (q, k, v))
    lowered = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    low = q.dtype == torch.bfloat16 or (lowered and q.dtype == torch.float32)
    alike = q.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    return q.device.type == "cpu" and low and asks and alike and q.shape[2] * k.shape[2] <= FEW


class Kept(torch.autograd.Function):
    """softmax(Q K^T scale) V that keeps its weights P for the way back: products in bfloat16, the softmax in float32.

    With G the gradient of the output: dV = P^T G, dP = G V^T, dS = P (dP - sum_j dP P), dQ = dS K scale,
    dK = dS^T Q scale.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the values' means, (b, heads, tokens, c)."""
        ctx.heads, ctx.scale = q.shape[:2], scale
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            P = product(q.float(), k.float().mT, scale).softmax(-1).to(q.dtype)
            ctx.save_for_backward(q, k, v, P)
            return torch.bmm(P, v).reshape(*ctx.heads, -1, v.shape[2])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of queries, keys and values."""
        q, k, v, P = ctx.saved_tensors
        G = gradients[0].flatten(0, 1)
        dV, dP = torch.bmm(P.mT, G), torch.bmm(G, v.mT)
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
        dQ, dK = product(dS, k, ctx.scale), product(dS.mT, q, ctx.scale)
        return *(z.reshape(*ctx.heads, -1, z.shape[2]) for z in (dQ, dK, dV)), None


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return a b scale, rounded once."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
