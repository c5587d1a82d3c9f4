"""The operators by the kernels of ``triton_kernels.py``: what is allocated, and how many programs run.

Signatures, gradients and shapes are those of ``blocked.py``. Nothing here waits for the device or looks at a value,
and all memory comes from torch, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .layout import empty_gradient, empty_output
from .tiling import (
    OPERANDS,
    SUM_TILE,
    Tile,
    attend_tile,
    backward_tile,
    chunk_length,
    padded_groups,
    summarize_tile,
)


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean ``[B, H, Dk, Dv]`` and log_weight, shift, total ``[B, H, Dk]``, as :func:`.blocked.summarize`."""
    (*_, keys, key_channels), value_channels = key.shape, value.shape[-1]
    tile = summarize_tile(key.dtype, key_channels, value_channels)
    chunk, chunks = _chunks(key, value_channels)
    parts = _empty_contexts(key, value_channels, chunks)
    tiles = _count(key_channels, tile.key_channels) * _count(value_channels, tile.value_channels)
    mask, mask_strides = _mask_bytes(key_mask, key)
    _launch(
        kernels.summarize_kernel,
        (key, chunks * tiles),
        tile,
        *(key, value, mask, *parts),
        *(key.shape[1], keys, chunk, chunks),
        *(*key.stride(), *value.stride(), *mask_strides),
        DK=key_channels,
        DV=value_channels,
        BM=tile.positions,
        BK=tile.key_channels,
        BV=tile.value_channels,
        SOFTMAX=normalization == "softmax",
        MASKED=key_mask is not None,
        OPERANDS=OPERANDS[key.dtype],
    )
    return _merged(key, *parts)


def _merged(
    key: Tensor, mean: Tensor, log_weight: Tensor, shift: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The context of all chunks from those of each, ``[B, H, chunks, ...]``."""
    chunks, key_channels, value_channels = mean.shape[2:]
    whole = (mean, log_weight, shift, total)
    if chunks > 1:
        whole = _empty_contexts(key, value_channels, 1)
        _launch(
            kernels.merge_kernel,
            (key, key_channels * _count(value_channels, SUM_TILE.value_channels)),
            SUM_TILE,
            *(mean, shift, total, *whole, chunks),
            DK=key_channels,
            DV=value_channels,
            BC=SUM_TILE.positions,
            BV=SUM_TILE.value_channels,
        )
    mean, log_weight, shift, total = (x.squeeze(2) for x in whole)
    return mean, log_weight, shift, total


def _empty_contexts(
    key: Tensor, value_channels: int, chunks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for mean ``[B, H, chunks, Dk, Dv]`` and log_weight, shift, total ``[B, H, chunks, Dk]``."""
    batch, heads, _, key_channels = key.shape
    shape = (batch, heads, chunks, key_channels)
    mean = key.new_empty(*shape, value_channels, dtype=torch.float32)
    log_weight, shift, total = (key.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return mean, log_weight, shift, total


def summarize_backward(
    d_mean: Tensor,
    d_log_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    mean: Tensor,
    shift: Tensor,
    total: Tensor,
    normalization: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to key and value, in their dtypes and layouts, as :func:`.blocked.summarize_backward`."""
    (*_, keys, key_channels), value_channels = key.shape, value.shape[-1]
    d_key, d_value = empty_gradient(key, needs[0]), empty_gradient(value, needs[1])
    tile = backward_tile(key.dtype, key_channels, value_channels)
    chunk, chunks = _chunks(key, value_channels)
    tiles = _count(value_channels, tile.value_channels)
    mask, mask_strides = _mask_bytes(key_mask, key)
    weighed = d_log_weight is not None
    saved = (d_mean, d_log_weight if d_log_weight is not None else total, mean, shift, total)
    d_mean, d_log_weight, mean, shift, total = (x.contiguous() for x in saved)
    for needs_key, needs_value in _launches(needs, tiles):
        _launch(
            kernels.summarize_backward_kernel,
            (key, chunks * (tiles if needs_value else 1)),
            tile,
            *(d_mean, d_log_weight, key, value, mask, mean, shift, total, d_key, d_value),
            *(key.shape[1], keys, chunk, chunks),
            *(*key.stride(), *value.stride(), *mask_strides),
            *(*_strides(d_key), *_strides(d_value)),
            DK=key_channels,
            DV=value_channels,
            BM=tile.positions,
            BK=tile.key_channels,
            BV=tile.value_channels,
            SOFTMAX=normalization == "softmax",
            MASKED=key_mask is not None,
            WEIGHED=weighed,
            NEEDS_KEY=needs_key,
            NEEDS_VALUE=needs_value,
            OPERANDS=OPERANDS[key.dtype],
        )
    return d_key, d_value


def attend(query: Tensor, mean: Tensor, normalization: str, num_groups: int) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``, as :func:`.blocked.attend`."""
    (*_, queries, key_channels), value_channels = query.shape, mean.shape[-1]
    output = empty_output(query, value_channels)
    groups, group_size = padded_groups(key_channels, num_groups)
    tile = attend_tile(query.dtype, groups * group_size, value_channels)
    chunk, chunks = _chunks(query, value_channels)
    _launch(
        kernels.attend_kernel,
        (query, chunks * _count(value_channels, tile.value_channels)),
        tile,
        *(query, mean.contiguous(), output),
        *(query.shape[1], queries, chunk, chunks),
        *(*query.stride(), *output.stride()),
        DK=key_channels,
        DV=value_channels,
        BN=tile.positions,
        BV=tile.value_channels,
        GROUPS=num_groups,
        BG=groups,
        BS=group_size,
        SOFTMAX=normalization == "softmax",
        OPERANDS=OPERANDS[query.dtype],
    )
    return output


def attend_backward(
    d_output: Tensor,
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to query and the context's mean, as :func:`.blocked.attend_backward`."""
    (*_, queries, key_channels), value_channels = query.shape, mean.shape[-1]
    d_query = empty_gradient(query, needs[0])
    groups, group_size = padded_groups(key_channels, num_groups)
    tile = backward_tile(query.dtype, groups * group_size, value_channels)
    chunk, chunks = _chunks(query, value_channels)
    tiles = _count(value_channels, tile.value_channels)
    batch, heads = query.shape[:2]
    parts = mean.new_empty((batch, heads, chunks, *mean.shape[2:]) if needs[1] else 0)
    for needs_query, needs_mean in _launches(needs, tiles):
        _launch(
            kernels.attend_backward_kernel,
            (query, chunks * (tiles if needs_mean else 1)),
            tile,
            *(d_output, query, mean.contiguous(), d_query, parts),
            *(heads, queries, chunk, chunks),
            *(*d_output.stride(), *query.stride(), *_strides(d_query)),
            DK=key_channels,
            DV=value_channels,
            BN=tile.positions,
            BV=tile.value_channels,
            GROUPS=num_groups,
            BG=groups,
            BS=group_size,
            SOFTMAX=normalization == "softmax",
            NEEDS_QUERY=needs_query,
            NEEDS_MEAN=needs_mean,
            OPERANDS=OPERANDS[query.dtype],
        )
    return d_query, _added(query, parts, mean) if needs[1] else parts


def _added(query: Tensor, parts: Tensor, mean: Tensor) -> Tensor:
    """The sum over chunks of ``[B, H, chunks, Dk, Dv]``, in the layout of the context."""
    whole = parts[:, :, 0]
    if parts.shape[2] > 1:
        whole = parts.new_empty(mean.shape)
        size = mean.shape[-2] * mean.shape[-1]
        _launch(
            kernels.add_kernel,
            (query, _count(size, SUM_TILE.value_channels)),
            SUM_TILE,
            *(parts, whole, parts.shape[2], size),
            BC=SUM_TILE.positions,
            BV=SUM_TILE.value_channels,
        )
    return whole if mean.is_contiguous() else torch.empty_like(mean).copy_(whole)


def _launch(
    kernel: Any, programs: tuple[Tensor, int], tile: Tile, *arguments: Any, **sizes: Any
) -> None:
    """Run a kernel on the device of ``x [B, H, ...]``, with so many programs for every head of every sample."""
    x, each = programs
    count = x.shape[0] * x.shape[1] * each
    if count:
        with torch.cuda.device_of(x):
            kernel[(count,)](*arguments, **sizes, num_warps=tile.warps, num_stages=tile.stages)


def _launches(needs: Sequence[bool], tiles: int) -> list[tuple[bool, bool]]:
    """Which gradients are computed together: both in one pass, if one tile has all channels of the values."""
    first, second = needs
    launches = [(first, second)] if tiles == 1 else [(first, False), (False, second)]
    return [launch for launch in launches if any(launch)]


def _chunks(x: Tensor, value_channels: int) -> tuple[int, int]:
    """How long the chunks of ``x [B, H, N, Dk]`` are, and how many; one if it is empty, to write empty sums."""
    _, heads, positions, key_channels = x.shape
    length = chunk_length(x.dtype, heads, positions, key_channels, value_channels)
    return length, max(1, _count(positions, length))


def _count(whole: int, part: int) -> int:
    return -(-whole // part)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of ``[B, H, N, D]``; anything for the gradient that nobody asked for."""
    return x.stride() if x.dim() == 4 else (0, 0, 0, 0)


def _mask_bytes(key_mask: Tensor | None, key: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A mask ``[B or 1, H or 1, M]`` as bytes, with strides that repeat it; anything if there is none."""
    if key_mask is None:
        return key, (0, 0, 0)
    repeated = key_mask.expand(*key.shape[:2], -1).view(torch.uint8)
    return repeated, repeated.stride()
