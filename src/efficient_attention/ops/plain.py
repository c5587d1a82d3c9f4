"""The equations in as few operators as they have, differentiated by PyTorch: faster than blocks unless inputs are long.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import is_channel_major, is_token_major


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalization: str,
    quadratic: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, products in ``dtype``; ``None`` if a channel has no weight."""
    batch, heads, queries, _ = query.shape
    softmax, order = normalization == "softmax", _quadratic if quadratic else _linear
    output = order(query, key, value, softmax, dtype)
    if _has_nan(output):
        return None
    return _laid_out(_cast(output.view(batch, heads, queries, value.shape[3]), query.dtype), query)


def _has_nan(output: Tensor) -> bool:
    """Softmax of a channel without any weight is NaN, at all positions, and so is what its map comes to."""
    if output.numel() == 0:
        return False
    of_each_map = output.detach().as_strided(output.shape[:1], output.stride()[:1])
    return math.isnan(of_each_map.sum().item())


def _linear(query: Tensor, key: Tensor, value: Tensor, softmax: bool, dtype: torch.dtype) -> Tensor:
    # Without names, so that the weights of keys are gone before the output is made.
    context = torch.bmm(_keys(key, softmax, dtype).mT, _maps(_cast(value, dtype)))
    attention = _queries(query, softmax, dtype)
    if is_channel_major(query):
        return torch.bmm(context.mT, attention.mT).mT
    return torch.bmm(attention, context)


def _quadratic(
    query: Tensor, key: Tensor, value: Tensor, softmax: bool, dtype: torch.dtype
) -> Tensor:
    attention = torch.bmm(_queries(query, softmax, dtype), _keys(key, softmax, dtype).mT)
    return torch.bmm(attention, _maps(_cast(value, dtype)))


def _keys(key: Tensor, softmax: bool, dtype: torch.dtype) -> Tensor:
    """``rho_k(K)``, ``[B * H, M, Dk]``; the softmax over positions in the order of memory, without a copy."""
    if not softmax:
        return _maps(_cast(key, dtype) / key.shape[2])
    if is_channel_major(key):
        return _maps(key.mT.softmax(3, dtype)).mT
    return _maps(key.softmax(2, dtype))


def _queries(query: Tensor, softmax: bool, dtype: torch.dtype) -> Tensor:
    """``rho_q(Q)`` alike, ``[B * H, N, Dk]``; the softmax over channels."""
    if not softmax:
        return _maps(_cast(query, dtype))
    if is_channel_major(query):
        return _maps(query.mT.softmax(2, dtype)).mT
    return _maps(query.softmax(3, dtype))


def _maps(x: Tensor) -> Tensor:
    """``[B * H, ., .]``: of four dimensions PyTorch would make three for each product."""
    return x.flatten(0, 1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _laid_out(output: Tensor, query: Tensor) -> Tensor:
    """As the query is, so that callers undo their views without a copy."""
    if is_channel_major(query):
        return output.mT.contiguous().mT
    return output.transpose(1, 2).contiguous().transpose(1, 2) if is_token_major(query) else output
