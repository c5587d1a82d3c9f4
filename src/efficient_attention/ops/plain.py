"""The equations in as few operators as they have, differentiated by PyTorch: faster than blocks unless inputs are long.

Serves plain tensors on a CPU that nobody watches: no mask, transform, tangent, autocast, recording or dispatch mode.
Whatever it does not serve, it leaves alone, errors included.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import native_launch
from .layout import is_channel_major, is_token_major
from .planner import plain_is_cheaper, quadratic_is_cheaper
from .precision import DTYPES, product_dtype


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether only the values count of what is computed from plain tensors on a CPU, not how, and no gradient."""
    return _are_plain(*tensors) and not _records(*tensors)


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, normalization: str, order: str
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, in the order named or with fewer multiply-adds; or ``None``."""
    if order not in ("auto", "linear") or not _are_plain(query, key, value):
        return None
    if not _fits(query, key, value):
        return None
    if normalization not in ("softmax", "scaling"):
        return None
    sizes = query.shape[2], key.shape[2], key.shape[3], value.shape[3]
    if order == "auto" and quadratic_is_cheaper(*sizes):
        output = _quadratic(query, key, value, normalization)
    else:
        output = _linear(query, key, value, normalization)
    # Softmax of a channel without any weight is NaN, at all positions; others know better.
    return None if math.isnan(output.detach()[:, :, :1].sum().item()) else output


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


def _are_plain(*tensors: Tensor) -> bool:
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
    )
    # A subclass or a parameter may be more than its values, and a negative view is other than what is in memory.
    return not watched and all(type(x) is Tensor and x.is_cpu and not x.is_neg() for x in tensors)


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the arguments are right, and not long."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return False
    batch, heads, queries, channels = query.shape
    keys, dtype = key.shape[2], query.dtype
    return (
        key.shape == (batch, heads, keys, channels)
        and value.shape[:3] == (batch, heads, keys)
        and keys > 0
        and dtype in DTYPES
        and dtype == key.dtype == value.dtype
        and plain_is_cheaper(
            batch * heads,
            queries,
            keys,
            channels,
            product_dtype(dtype).itemsize,
            kept=_records(query, key, value),
            fused=native_launch.is_preferred(query),
        )
    )


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
