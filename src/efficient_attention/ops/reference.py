"""The oracle: the paper's equations in plain PyTorch, differentiable to any order and under any transform.

It shares no arithmetic with the fast implementations that are tested against it. Arguments arrive checked and
defaulted by functional.py. Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
``key_mask`` is bool, broadcastable to ``[B, H, M]``, True = attend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import accumulation_dtype, without_autocast


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    """``rho_k(K)^T V`` and the logarithm of its total weight: ``[B, H, Dk, Dv]``, ``[B, H, Dk]``."""
    weights = normalized_keys(key, key_mask, normalization)  # [B, H, M, Dk]
    mean = matmul(weights.transpose(-1, -2), _attended(_accumulable(value), key_mask))
    return mean, log_total_weight(key, key_mask, normalization)


def attend(query: Tensor, mean: Tensor, normalization: str, num_groups: int = 1) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``; queries normalized within groups of channels."""
    groups = query.unflatten(-1, (num_groups, -1))  # [B, H, N, groups, Dk / groups]
    weights = normalized_queries(groups, normalization).flatten(-2)
    return matmul(weights, mean).to(query.dtype)


def quadratic(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> Tensor:
    """The same map with the product taken in the other order, ``(rho_q(Q) rho_k(K)^T) V``: O(N M)."""
    weights = attention_weights(query, key, key_mask, normalization)
    return matmul(weights, _attended(_accumulable(value), key_mask)).to(query.dtype)


def attention_weights(
    query: Tensor, key: Tensor, key_mask: Tensor | None, normalization: str
) -> Tensor:
    """``rho_q(Q) rho_k(K)^T``: what every query takes from every position, ``[B, H, N, M]``."""
    keys = normalized_keys(key, key_mask, normalization)
    return matmul(normalized_queries(query, normalization), keys.transpose(-1, -2))


def module(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    normalization: str,
    num_heads: int,
    residual: bool,
) -> Tensor:
    """Attention between projections, with nothing folded: ``x [B, C, N]`` attends to ``source [B, S, M]`` or itself.

    ``weights`` and ``biases`` are of queries, keys, values and output, ``[out, in]`` and ``[out]``; ``key_mask`` is
    ``[B or 1, M]``.
    """
    attended = x if source is None else source

    def project(i: int, y: Tensor) -> Tensor:
        y, bias = matmul(weights[i].to(y.dtype), y), biases[i]
        return y if bias is None else y + bias.to(y.dtype).unsqueeze(-1)

    query, key, value = (
        project(i, y).unflatten(1, (num_heads, -1)).mT  # [B, h, positions, channels / h]
        for i, y in enumerate((x, attended, attended))
    )
    mask = None if key_mask is None else key_mask.unsqueeze(1)
    mean, _ = summarize(key, value, mask, normalization)
    y = project(3, attend(query, mean, normalization).mT.flatten(1, 2))
    return x + y if residual else y


def normalized_queries(query: Tensor, normalization: str) -> Tensor:
    """``rho_q(Q)``: softmax over the channels of a query, or Q itself (all the scaling is on the keys' side)."""
    query = _accumulable(query)
    return query.softmax(-1) if normalization == "softmax" else query


def normalized_keys(key: Tensor, key_mask: Tensor | None, normalization: str) -> Tensor:
    """``rho_k(K)``: softmax over positions, or K / M; 0 where nothing is attended to."""
    if normalization == "scaling":
        return _attended(_accumulable(key), key_mask) / _count(key, key_mask).clamp(min=1)
    logits, empty = _logits(key, key_mask)
    return logits.softmax(-2).masked_fill(empty, 0)


def log_total_weight(key: Tensor, key_mask: Tensor | None, normalization: str) -> Tensor:
    """The logarithm of what rho_k divides by, ``[B, H, Dk]``."""
    if normalization == "scaling":
        return _count(key, key_mask).log().squeeze(-2)
    logits, empty = _logits(key, key_mask)
    return logits.logsumexp(-2).masked_fill(empty.squeeze(-2), -torch.inf)


def _count(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """How many keys are attended to, ``[B, H, 1, Dk]``."""
    batch, heads, keys, channels = key.shape
    dtype = accumulation_dtype(key.dtype)
    if key_mask is None:
        return key.new_full((batch, heads, 1, channels), keys, dtype=dtype)
    return key_mask.sum(-1)[..., None, None].to(dtype).expand(batch, heads, 1, channels)


def _logits(key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys, -inf where masked; and the channels without any weight, ``[B, H, 1, Dk]``, whose logits are 0.

    Such a channel is empty, whether by the mask or by its keys: merged with others it changes nothing. Softmax of
    nothing but -inf has no value and no gradient.
    """
    logits = _attended(_accumulable(key), key_mask, -torch.inf)
    empty = (logits == -torch.inf).all(-2, keepdim=True)
    return logits.masked_fill(empty, 0), empty


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
) -> Tensor:
    """``rho(Q K^T) V``, the baseline, with the N x M map in memory: row softmax, or division by M."""
    scores = matmul(_accumulable(query), _attended(_accumulable(key), key_mask).transpose(-1, -2))
    attended = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        attended = key_mask.unsqueeze(-2).expand_as(scores)  # [B, H, N, M]
    if normalization == "scaling":
        weights = scores.masked_fill(~attended, 0) / attended.sum(-1, keepdim=True).clamp(min=1)
    else:
        some = attended.any(-1, keepdim=True)
        logits = (scores * scale).masked_fill(~attended, -torch.inf).masked_fill(~some, 0)
        weights = logits.softmax(-1).masked_fill(~attended, 0)
    return matmul(weights, _attended(_accumulable(value), key_mask)).to(query.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    # Explicit casts do not stop autocast from choosing low-precision products.
    with without_autocast(a.device):
        return a @ b.to(a.dtype)


def _accumulable(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _attended(x: Tensor, key_mask: Tensor | None, fill: float = 0) -> Tensor:
    # Masked positions may hold anything, NaN included: weight 0 alone would not silence them.
    return x if key_mask is None else x.masked_fill(~key_mask.unsqueeze(-1), fill)
