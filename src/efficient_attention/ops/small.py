"""Small problems, in as few operators as the equations have: where starting operators costs more than their arithmetic.

Serves plain tensors on a CPU that nobody watches: no mask, gradient, transform, tangent, autocast, recording or
dispatch mode. Whatever it does not serve, it leaves alone, errors included.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import is_channel_major, is_token_major
from .planner import is_small, quadratic_is_cheaper
from .precision import DTYPES


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether only the values count of what is computed from plain tensors on a CPU, not how, and no gradient."""
    recorded = torch.is_grad_enabled()
    for x in tensors:
        # A subclass or a parameter may be more than its values.
        if type(x) is not Tensor or not x.is_cpu or (recorded and x.requires_grad):
            return False
    return not _watched()


def _watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
    )


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, normalization: str, order: str
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, in the order named or with fewer multiply-adds; or ``None``."""
    if order not in ("auto", "linear") or not nobody_watches(query, key, value):
        return None
    if not _fits(query, key, value):
        return None
    stored = query.dtype
    dtype = None if stored.itemsize >= 4 else torch.float32
    if normalization == "softmax":
        weights = key.softmax(2, dtype=dtype)
        # Softmax of a channel without any weight is NaN, at all positions.
        if math.isnan(weights.select(2, 0).sum().item()):
            return None
        attention = query.softmax(3, dtype=dtype)
    elif normalization == "scaling":
        weights, attention = key.to(dtype or stored) / key.shape[2], query.to(dtype or stored)
    else:
        return None
    value = value if dtype is None else value.to(dtype)
    if order == "auto" and quadratic_is_cheaper(
        query.shape[2], key.shape[2], key.shape[3], value.shape[3]
    ):
        output = attention @ weights.mT @ value
    else:
        output = attention @ (weights.mT @ value)
    return output if dtype is None else output.to(stored)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the arguments are right, and few numbers in the order of the result."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return False
    batch, heads, queries, channels = query.shape
    keys, dtype = key.shape[2], query.dtype
    return (
        key.shape == (batch, heads, keys, channels)
        and value.shape[:3] == (batch, heads, keys)
        and keys > 0
        and is_small(batch * heads, queries, keys, channels, value.shape[3])
        and dtype in DTYPES
        and dtype == key.dtype == value.dtype
        and (query.is_contiguous() or not (is_channel_major(query) or is_token_major(query)))
    )
