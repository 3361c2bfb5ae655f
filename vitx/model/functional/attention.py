"""Attention cores: queries, keys and values in, mixed values out. A mask is (b, j), True = visible.

An image whose tokens are all hidden gives zeros. `drop` is the dropout rate on the weights; it
draws from the device's global generator, since the fused kernel takes no other.
"""

from math import log

import torch
import torch.nn.functional as F
from einops import einsum, rearrange

from vitx.model.axes import Keys, Mask, Queries, Weights
from vitx.registry import Registry


def weights(q: Queries, k: Keys, *, mask: Mask | None = None) -> Weights:
    """softmax_j(q·k / √e): how much query i reads of key j.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    scores = einsum(q, k, "b heads i e, b heads j e -> b heads i j") * q.shape[-1] ** -0.5
    if mask is None:
        return scores.softmax(dim=-1)
    visible = rearrange(mask, "b j -> b 1 1 j")
    # A finite number, so that a line without a visible key has no NaN.
    hidden = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return hidden.softmax(dim=-1) * visible


def sdpa(q: Queries, k: Keys, v: Keys, *, mask: Mask | None = None, drop: float = 0.0) -> Queries:
    """softmax(q·k / √e)·v by PyTorch's fused kernel."""
    visible = None if mask is None else rearrange(mask, "b j -> b 1 1 j")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=drop)


def math(q: Queries, k: Keys, v: Keys, *, mask: Mask | None = None, drop: float = 0.0) -> Queries:
    """softmax(q·k / √e)·v in two lines: the readable twin of `sdpa`."""
    attention = F.dropout(weights(q, k, mask=mask), drop)
    return einsum(attention, v, "b heads i j, b heads j e -> b heads i e")


def sigmoid_weights(q: Queries, k: Keys, *, mask: Mask | None = None) -> Weights:
    """σ(q·k / √e - log n) of n visible keys (Ramapuram et al. 2024, arXiv:2409.04431, eq. 3)."""
    scores = einsum(q, k, "b heads i e, b heads j e -> b heads i j") * q.shape[-1] ** -0.5
    if mask is None:
        return (scores - log(k.shape[-2])).sigmoid()
    visible = rearrange(mask, "b j -> b 1 1 j")
    count = visible.sum(dim=-1, keepdim=True).clamp(min=1)
    return (scores - count.log().to(scores.dtype)).sigmoid() * visible


def sigmoid(
    q: Queries, k: Keys, v: Keys, *, mask: Mask | None = None, drop: float = 0.0
) -> Queries:
    """σ(q·k / √e - log n)·v: keys do not compete (ibid.)."""
    attention = F.dropout(sigmoid_weights(q, k, mask=mask), drop)
    return einsum(attention, v, "b heads i j, b heads j e -> b heads i e")


ATTENTION = Registry("model.attention", sdpa, math, sigmoid, given=("mask", "drop"))

WEIGHTS = {sdpa: weights, math: weights, sigmoid: sigmoid_weights}
"""The function that gives a core's attention maps from the same queries and keys."""
