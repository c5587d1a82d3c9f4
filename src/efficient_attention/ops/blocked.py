"""Blocks of positions that fit the cache: exact, on any device, in memory that does not grow with N or M.

Nothing of the size of the inputs is allocated except what is returned. Every operator walks over blocks of
positions; sums over blocks are taken pairwise, so that their rounding grows with the logarithm of the length.
The length of a block does not depend on the batch: what one sample gets never depends on its batch mates.

Shapes: B batch (b of it at a time), H heads, N queries, M keys, n positions of a block, Dk key channels, Dv value
channels. ``key_mask`` is bool ``[B or 1, H or 1, M]``. Gradients, with P = rho_k(K) and A = rho_q(Q)::

    attend:     d_mean = A^T d_out;  G = d_out mean^T;  d_q = A * (G - sum_c A G)
    summarize:  d_v = P d_mean;      d_k = P * (V d_mean^T - sum_e d_mean mean + d_log_weight)

Under scaling A = Q and P = K / M have no softmax to correct for: d_q = G and d_k = V d_mean^T / M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .layout import accumulation_dtype, empty_output, is_channel_major
from .planner import block_length, rows_per_block

Blocks = Sequence[slice]
T = TypeVar("T")


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor]:
    """``rho_k(K)^T V`` and the logarithm of its total weight: ``[B, H, Dk, Dv]``, ``[B, H, Dk]``."""
    tiles = _walk(key, value.shape[-1])
    if len(tiles) == 1:
        return _summarize_rows(key, value, key_mask, normalization, tiles[0][1])
    dtype = accumulation_dtype(key.dtype)
    batch, heads, _, key_channels = key.shape
    mean = key.new_zeros(batch, heads, key_channels, value.shape[-1], dtype=dtype)
    log_weight = key.new_full((batch, heads, key_channels), -torch.inf, dtype=dtype)
    for rows, blocks in tiles:
        mean[rows], log_weight[rows] = _summarize_rows(
            key[rows], value[rows], _mask_rows(key_mask, rows), normalization, blocks
        )
    return mean, log_weight


def _summarize_rows(
    key: Tensor, value: Tensor, mask: Tensor | None, normalization: str, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    weigh = _weigh_softmax if normalization == "softmax" else _weigh_scaling
    weighted, total, log_weight = weigh(key, value, mask, blocks)
    if mask is not None:
        total = total.masked_fill(total == 0, 1)
    return weighted.div_(total.unsqueeze(-1)), log_weight


def _weigh_softmax(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m w v`` and ``sum_m w`` for w = exp(k - s), s the largest key of a channel; and the log weight."""
    shift = _fold(torch.maximum, lambda n: _load(key, mask, n, -torch.inf).amax(-2), blocks)
    if mask is not None:
        # Where every key is masked: -inf - -inf would be NaN.
        shift = shift.masked_fill(shift == -torch.inf, 0)  # [b, H, Dk]
    at_zero = shift.unsqueeze(-2)

    def weigh(n: slice) -> tuple[Tensor, Tensor]:
        weights = (_load(key, mask, n, -torch.inf) - at_zero).exp_()  # [b, H, n, Dk]
        return weights.mT @ _load(value, mask, n), weights.sum(-2)

    weighted, total = _fold(_add_both, weigh, blocks)
    return weighted, total, total.log() + shift


def _weigh_scaling(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m k v``, the number of keys, and its logarithm."""
    weighted = _fold(
        torch.Tensor.add_, lambda n: _load(key, mask, n).mT @ _load(value, mask, n), blocks
    )
    total = _count_keys(key, mask, weighted.dtype)  # [1 or b, 1 or H, 1]
    return weighted, total, total.log().expand(weighted.shape[:-1]).contiguous()


def summarize_backward(
    d_mean: Tensor,
    d_log_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    mean: Tensor,
    log_weight: Tensor,
    normalization: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`summarize` with respect to key and value, in their dtypes and layouts."""
    d_key, d_value = torch.empty_like(key), torch.empty_like(value)
    softmax = normalization == "softmax"
    shift = log_weight.masked_fill(log_weight == -torch.inf, 0).unsqueeze(-2)  # [B, H, 1, Dk]
    correction = (d_mean * mean).sum(-1)  # [B, H, Dk]
    if d_log_weight is not None:
        correction = correction - d_log_weight
    correction = correction.unsqueeze(-2)

    for rows, blocks in _walk(key, value.shape[-1]):
        k, v, mask = key[rows], value[rows], _mask_rows(key_mask, rows)
        count = _count_keys(k, mask, mean.dtype).clamp(min=1).unsqueeze(-1)
        for n in blocks:
            if softmax:
                weights = (_load(k, mask, n, -torch.inf) - shift[rows]).exp_()
            else:
                weights = _load(k, mask, n) / count
            # Written before d_key so that only three blocks are alive at a time.
            d_value[rows, :, n] = weights @ d_mean[rows]
            slope = _load(v, mask, n) @ d_mean[rows].mT  # [b, H, n, Dk]
            if softmax:
                d_key[rows, :, n] = slope.sub_(correction[rows]).mul_(weights)
            else:
                d_key[rows, :, n] = slope.div_(count)
    return d_key, d_value


def attend(query: Tensor, mean: Tensor, normalization: str, num_groups: int) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``; queries normalized within groups of channels."""
    output = empty_output(query, mean.shape[-1])
    channel_major = is_channel_major(query)
    for rows, blocks in _walk(query, mean.shape[-1]):
        for n in blocks:
            weights = _normalized_queries(query[rows, :, n], normalization, num_groups)
            output[rows, :, n] = _product(weights, mean[rows], channel_major)
    return output


def attend_backward(
    d_output: Tensor, query: Tensor, mean: Tensor, normalization: str, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`attend` with respect to query (its dtype and layout) and the context's mean."""
    d_query = torch.empty_like(query)
    d_mean = torch.zeros_like(mean)
    for rows, blocks in _walk(query, mean.shape[-1]):
        d_mean[rows] = _pull_back_rows(
            d_output[rows],
            query[rows],
            mean[rows],
            d_query[rows],
            normalization,
            num_groups,
            blocks,
        )
    return d_query, d_mean


def _pull_back_rows(
    d_output: Tensor,
    query: Tensor,
    mean: Tensor,
    d_query: Tensor,
    normalization: str,
    num_groups: int,
    blocks: Blocks,
) -> Tensor:
    """Fills ``d_query`` block by block; returns the sum over blocks of ``A^T d_out``."""
    channel_major = is_channel_major(query)

    def pull_back(n: slice) -> Tensor:
        weights = _normalized_queries(query[:, :, n], normalization, num_groups)
        d_out = d_output[:, :, n].to(mean.dtype)
        slope = _product(d_out, mean.mT, channel_major)  # [b, H, n, Dk]
        if normalization == "softmax":
            _pull_back_softmax_(slope, weights, num_groups)
        d_query[:, :, n] = slope
        return weights.mT @ d_out

    return _fold(torch.Tensor.add_, pull_back, blocks)


def _pull_back_softmax_(slope: Tensor, weights: Tensor, num_groups: int) -> None:
    """Turn dL/dA into dL/dQ in place for A = softmax(Q) over the channels of each group."""
    grouped, weights = (x.unflatten(-1, (num_groups, -1)) for x in (slope, weights))
    grouped.sub_((grouped * weights).sum(-1, keepdim=True)).mul_(weights)


def _normalized_queries(query: Tensor, normalization: str, num_groups: int) -> Tensor:
    query = query.to(accumulation_dtype(query.dtype))
    if normalization == "scaling":
        return query
    if num_groups == 1 and not is_channel_major(query):
        return query.softmax(-1)
    # The softmax is taken in the order of memory: over the last dimension it would copy a channel-major block.
    if is_channel_major(query):
        return query.mT.unflatten(-2, (num_groups, -1)).softmax(-2).flatten(-3, -2).mT
    return query.unflatten(-1, (num_groups, -1)).softmax(-1).flatten(-2)


def _product(a: Tensor, b: Tensor, channel_major: bool) -> Tensor:
    """``a @ b`` in the memory order of what it will be written to."""
    return (b.mT @ a.mT).mT if channel_major else a @ b


def _walk(x: Tensor, other_channels: int) -> list[tuple[slice, Blocks]]:
    """Rows of the batch, and for each the blocks of positions of ``x [B, H, N, D]``; nothing if it is empty."""
    batch, heads, positions, channels = x.shape
    length = block_length(heads, channels + other_channels)
    rows = rows_per_block(heads, min(length, positions), channels + other_channels)
    blocks = [slice(start, start + length) for start in range(0, positions, length)]
    starts = range(0, batch if blocks else 0, rows)
    return [(slice(start, start + rows), blocks) for start in starts]


def _fold(combine: Callable[[T, T], T], part: Callable[[slice], T], blocks: Blocks) -> T:
    """``combine`` of ``part`` of every block, pairwise as a balanced tree."""
    if len(blocks) == 1:
        return part(blocks[0])
    half = len(blocks) // 2
    return combine(_fold(combine, part, blocks[:half]), _fold(combine, part, blocks[half:]))


def _add_both(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a[0].add_(b[0]), a[1].add_(b[1])


def _load(x: Tensor, mask: Tensor | None, positions: slice, fill: float = 0) -> Tensor:
    """A block in the dtype of sums; masked positions may hold anything, NaN included, so they are replaced."""
    block = x[:, :, positions].to(accumulation_dtype(x.dtype))
    return block if mask is None else block.masked_fill(~mask[:, :, positions, None], fill)


def _mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[rows]


def _count_keys(key: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """How many keys attend: ``[1 or b, 1 or H, 1]``."""
    if mask is None:
        return torch.full((1, 1, 1), key.shape[-2], dtype=dtype, device=key.device)
    return mask.sum(-1, keepdim=True, dtype=dtype)
