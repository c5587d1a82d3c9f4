"""The operators by the kernels of ``triton_kernels.py``: what is allocated, and how many programs run.

Signatures, gradients and shapes are those of ``blocked.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .layout import empty_gradient, empty_output
from .tiling import Tile, attend_tile, backward_tile, chunk_length, padded_groups, summarize_tile
from .triton_programs import (
    added,
    arithmetic,
    count,
    empty_contexts,
    launch,
    mask_bytes,
    merged,
)


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean ``[B, H, Dk, Dv]`` and log_weight, shift, total ``[B, H, Dk]``, as :func:`.blocked.summarize`."""
    batch, heads, keys, key_channels = key.shape
    value_channels = value.shape[-1]
    tile = summarize_tile(key.dtype, key_channels, value_channels)
    chunk, chunks = _chunks(key, value_channels)
    parts = empty_contexts(key, (batch, heads, chunks, key_channels), value_channels)
    tiles = count(key_channels, tile.key_channels) * count(value_channels, tile.value_channels)
    mask, mask_strides = mask_bytes(key_mask, (batch, heads, keys), key)
    launch(
        kernels.summarize_kernel,
        key,
        batch * heads * chunks * tiles,
        tile,
        *(key, value, mask, *parts),
        *(heads, keys, chunk, chunks),
        *(*key.stride(), *value.stride(), *mask_strides),
        BK=tile.key_channels,
        MASKED=key_mask is not None,
        **_sizes(key, value_channels, tile, normalization),
    )
    return merged(parts)


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
    batch, heads, keys, key_channels = key.shape
    value_channels = value.shape[-1]
    d_key, d_value = empty_gradient(key, needs[0]), empty_gradient(value, needs[1])
    tile = backward_tile(key.dtype, key_channels, value_channels)
    chunk, chunks = _chunks(key, value_channels)
    tiles = count(value_channels, tile.value_channels)
    mask, mask_strides = mask_bytes(key_mask, (batch, heads, keys), key)
    saved = (d_mean, d_log_weight if d_log_weight is not None else total, mean, shift, total)
    contexts = [x.contiguous() for x in saved]
    for needs_key, needs_value in _launches(needs, tiles):
        launch(
            kernels.summarize_backward_kernel,
            key,
            (batch * heads * chunks * (tiles if needs_value else 1)),
            tile,
            *(*contexts[:2], key, value, mask, *contexts[2:], d_key, d_value),
            *(heads, keys, chunk, chunks),
            *(*key.stride(), *value.stride(), *mask_strides),
            *(*_strides(d_key), *_strides(d_value)),
            BK=tile.key_channels,
            MASKED=key_mask is not None,
            WEIGHED=d_log_weight is not None,
            NEEDS_KEY=needs_key,
            NEEDS_VALUE=needs_value,
            **_sizes(key, value_channels, tile, normalization),
        )
    return d_key, d_value


def attend(query: Tensor, mean: Tensor, normalization: str, num_groups: int) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``, as :func:`.blocked.attend`."""
    batch, heads, queries, key_channels = query.shape
    value_channels = mean.shape[-1]
    output = empty_output(query, value_channels)
    groups, group_size = padded_groups(key_channels, num_groups)
    tile = attend_tile(query.dtype, groups * group_size, value_channels)
    chunk, chunks = _chunks(query, value_channels)
    launch(
        kernels.attend_kernel,
        query,
        batch * heads * chunks * count(value_channels, tile.value_channels),
        tile,
        *(query, mean.contiguous(), output),
        *(heads, queries, chunk, chunks),
        *(*query.stride(), *output.stride()),
        **_groups(num_groups, groups, group_size),
        **_sizes(query, value_channels, tile, normalization),
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
    batch, heads, queries, key_channels = query.shape
    value_channels = mean.shape[-1]
    d_query = empty_gradient(query, needs[0])
    groups, group_size = padded_groups(key_channels, num_groups)
    tile = backward_tile(query.dtype, groups * group_size, value_channels)
    chunk, chunks = _chunks(query, value_channels)
    tiles = count(value_channels, tile.value_channels)
    shape = (batch, heads, chunks, key_channels, value_channels)
    parts = mean.new_empty(shape if needs[1] else 0)
    for needs_query, needs_mean in _launches(needs, tiles):
        launch(
            kernels.attend_backward_kernel,
            query,
            batch * heads * chunks * (tiles if needs_mean else 1),
            tile,
            *(d_output, query, mean.contiguous(), d_query, parts),
            *(heads, queries, chunk, chunks),
            *(*d_output.stride(), *query.stride(), *_strides(d_query)),
            NEEDS_QUERY=needs_query,
            NEEDS_MEAN=needs_mean,
            **_groups(num_groups, groups, group_size),
            **_sizes(query, value_channels, tile, normalization),
        )
    if not needs[1]:
        return d_query, parts
    d_mean = added(parts.flatten(0, 1)).unflatten(0, (batch, heads))
    # In the layout of the context.
    return d_query, d_mean if mean.is_contiguous() else torch.empty_like(mean).copy_(d_mean)


def _launches(needs: Sequence[bool], tiles: int) -> list[tuple[bool, bool]]:
    """Which gradients are computed together: both in one pass, if one tile has all channels of the values."""
    first, second = needs
    launches = [(first, second)] if tiles == 1 else [(first, False), (False, second)]
    return [launch for launch in launches if any(launch)]


def _chunks(x: Tensor, value_channels: int) -> tuple[int, int]:
    """How long the chunks of ``x [B, H, N, Dk]`` are, and how many; one if it is empty, to write empty sums."""
    _, heads, positions, key_channels = x.shape
    length = chunk_length(x.dtype, heads, positions, key_channels, value_channels)
    return length, max(1, count(positions, length))


def _sizes(x: Tensor, value_channels: int, tile: Tile, normalization: str) -> dict[str, Any]:
    """What the kernels are compiled for, for queries or keys x."""
    channels = {"DK": x.shape[-1], "DV": value_channels, "BV": tile.value_channels}
    return channels | arithmetic(x, normalization)


def _groups(groups: int, padded: int, size: int) -> dict[str, Any]:
    """Groups of a query's channels, and how a block holds them."""
    return {"GROUPS": groups, "BG": padded, "BS": size}


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of ``[B, H, N, D]``; anything for the gradient that nobody asked for."""
    return x.stride() if x.dim() == 4 else (0, 0, 0, 0)
