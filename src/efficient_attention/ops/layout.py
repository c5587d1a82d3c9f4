"""Memory layouts that every implementation of the operators agrees on."""

from __future__ import annotations

import torch
from torch import Tensor

from .huge_pages import on_huge_pages


def is_channel_major(x: Tensor) -> bool:
    """Whether the positions of one channel are neighbours in memory, as in a flattened ``[B, C, H, W]`` map."""
    return x.shape[-1] != 1 and x.stride(-1) != 1 and x.stride(-2) == 1


def is_token_major(x: Tensor) -> bool:
    """Whether the heads of one position are neighbours in memory, as in ``[B, N, H * D]`` split into heads."""
    return x.shape[1] > 1 and x.stride(1) < x.stride(2) and not is_channel_major(x)


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are views of the same memory, of the same part of it or not."""
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def empty_output(query: Tensor, value_channels: int) -> Tensor:
    """Memory for ``[B, H, N, Dv]`` laid out as the query is, so that callers undo their views without a copy."""
    batch, heads, queries, _ = query.shape
    if is_channel_major(query):
        output = query.new_empty(batch, heads, value_channels, queries).transpose(-1, -2)
    elif is_token_major(query):
        output = query.new_empty(batch, queries, heads, value_channels).transpose(1, 2)
    else:
        output = query.new_empty(batch, heads, queries, value_channels)
    return on_huge_pages(output)


def empty_like(x: Tensor) -> Tensor:
    """Memory for a result that is laid out as ``x``."""
    return on_huge_pages(torch.empty_like(x))


def empty_gradient(x: Tensor, needed: bool) -> Tensor:
    """Memory for the gradient of ``x``, laid out as ``x``; none if nobody asked for it."""
    return empty_like(x) if needed else x.new_empty(0)
