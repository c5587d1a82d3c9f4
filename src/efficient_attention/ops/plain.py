"""The equations in as few operators as they have, differentiated by PyTorch: faster than blocks unless inputs are long.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

import math

from torch import Tensor

from .layout import is_channel_major, is_token_major
from .precision import product_dtype


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, normalization: str, quadratic: bool
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``; ``None`` where a channel is without any weight."""
    order = _quadratic if quadratic else _linear
    output = order(query, key, value, normalization)
    # Softmax of a channel without any weight is NaN, at all positions; others know better.
    first = output.detach().narrow(2, 0, min(1, output.shape[2]))
    return None if math.isnan(first.sum().item()) else output


def _linear(query: Tensor, key: Tensor, value: Tensor, normalization: str) -> Tensor:
    # Without names, so that the weights of keys are gone before the output is made.
    context = _keys(key, normalization).mT @ value.to(product_dtype(key.dtype))
    attention = _queries(query, normalization)
    if is_channel_major(query):
        return (context.mT @ attention.mT).mT.to(query.dtype)
    return _laid_out(attention @ context, query).to(query.dtype)


def _quadratic(query: Tensor, key: Tensor, value: Tensor, normalization: str) -> Tensor:
    attention = _queries(query, normalization) @ _keys(key, normalization).mT  # [B, H, N, M]
    return _laid_out(attention @ value.to(attention.dtype), query).to(query.dtype)


def _keys(key: Tensor, normalization: str) -> Tensor:
    """``rho_k(K)`` in the dtype of products; the softmax over positions in the order of memory, without a copy."""
    dtype = product_dtype(key.dtype)
    if normalization == "scaling":
        return key.to(dtype) / key.shape[2]
    return key.mT.softmax(3, dtype).mT if is_channel_major(key) else key.softmax(2, dtype)


def _queries(query: Tensor, normalization: str) -> Tensor:
    """``rho_q(Q)`` alike; the softmax over channels."""
    dtype = product_dtype(query.dtype)
    if normalization == "scaling":
        return query.to(dtype)
    return query.mT.softmax(2, dtype).mT if is_channel_major(query) else query.softmax(3, dtype)


def _laid_out(output: Tensor, query: Tensor) -> Tensor:
    """As the query is, so that callers undo their views without a copy."""
    if is_channel_major(query):
        return output.mT.contiguous().mT
    return output.transpose(1, 2).contiguous().transpose(1, 2) if is_token_major(query) else output
