"""Blocks of positions that fit the cache: exact, on any device, in memory that does not grow with N or M.

Nothing of the size of the inputs is allocated except what is returned. Every operator walks over blocks of positions
(ops/blocks.py).

Shapes: B batch (b of it at a time), H heads, N queries, M keys, n positions of a block, Dk key channels, Dv value
channels. ``key_mask`` is bool ``[B or 1, H or 1, M]``. Gradients, with P = rho_k(K) and A = rho_q(Q)::

    attend:     d_mean = A^T d_out;  G = d_out mean^T;  d_q = A * (G - sum_c A G)
    summarize:  d_v = P d_mean;      d_k = P * (V d_mean^T - sum_e d_mean mean + d_log_weight)

Under scaling A = Q and P = K / M have no softmax to correct for: d_q = G and d_k = V d_mean^T / M.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Blocks, add_weighted, divisor, exponentials, fold, walk
from .layout import empty_gradient, empty_output, is_channel_major, is_token_major
from .precision import accumulation_dtype

# Integers as wide as floating-point numbers of so many bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``rho_k(K)^T V`` and its weight, as mean ``[B, H, Dk, Dv]`` and log_weight, shift, total ``[B, H, Dk]``.

    The weights are ``w / total`` with ``w = exp(k - shift)``, shift the largest key of a channel (softmax), or
    ``w = k``, shift 0 (scaling). log_weight is their logarithm, too coarse to give the weights back: where keys are
    large, shift swallows the digits of total.
    """
    tiles = _walk(key, value.shape[-1])
    if len(tiles) == 1:
        return _summarize_rows(key, value, key_mask, normalization, tiles[0][1])
    dtype = accumulation_dtype(key.dtype)
    batch, heads, _, key_channels = key.shape
    mean = key.new_zeros(batch, heads, key_channels, value.shape[-1], dtype=dtype)
    log_weight, shift, total = (
        key.new_full((batch, heads, key_channels), empty, dtype=dtype)
        for empty in (-torch.inf, 0.0, 0.0)
    )
    for rows, blocks in tiles:
        mean[rows], log_weight[rows], shift[rows], total[rows] = _summarize_rows(
            key[rows], value[rows], _mask_rows(key_mask, rows), normalization, blocks
        )
    return mean, log_weight, shift, total


def _summarize_rows(
    key: Tensor, value: Tensor, mask: Tensor | None, normalization: str, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weigh = _weigh_softmax if normalization == "softmax" else _weigh_scaling
    weighted, shift, total = weigh(key, value, mask, blocks)
    mean = weighted.div_(divisor(total).unsqueeze(-1))
    return mean, total.log() + shift, shift, total


def _weigh_softmax(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m w v``, shift and ``sum_m w``, for ``w = exp(k - shift)``."""
    lowest = torch.finfo(accumulation_dtype(key.dtype)).min

    def weigh(n: slice) -> tuple[Tensor, Tensor, Tensor]:
        weights = _load(key, mask, n, -torch.inf)  # [b, H, n, Dk]
        # Where no key has any weight: -inf - -inf would be NaN.
        shift = weights.amax(-2).clamp_(min=lowest)  # [b, H, Dk]
        weights = exponentials(weights, shift.unsqueeze(-2))
        return weights.mT @ _load(value, mask, n), shift, weights.sum(-2)

    return fold(add_weighted, weigh, blocks)


def _weigh_scaling(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m k v``, no shift, and the number of keys."""
    weighted = fold(
        torch.Tensor.add_, lambda n: _load(key, mask, n).mT @ _load(value, mask, n), blocks
    )
    total = weighted.new_full(weighted.shape[:-1], key.shape[-2])
    if mask is not None:
        total.copy_(mask.sum(-1, keepdim=True))
    return weighted, torch.zeros_like(total), total


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
    """Gradients of mean and log_weight with respect to key and value, in their dtypes and layouts."""
    d_key, d_value = empty_gradient(key, needs[0]), empty_gradient(value, needs[1])
    softmax = normalization == "softmax"
    # Dividing d_mean by the total, of the size of a context, spares dividing every weight.
    total = divisor(total)
    correction = (d_mean * mean).sum(-1)  # [B, H, Dk]
    if d_log_weight is not None:
        correction = correction - d_log_weight
    correction = (correction / total).unsqueeze(-2)
    d_mean = d_mean / total.unsqueeze(-1)

    for rows, blocks in _walk(key, value.shape[-1]):
        k, v, mask = key[rows], value[rows], _mask_rows(key_mask, rows)
        for n in blocks:
            weights = _load(k, mask, n, -torch.inf if softmax else 0)
            if softmax:
                weights = exponentials(weights, shift[rows].unsqueeze(-2))
            if needs[1]:  # before d_key, so that only three blocks are alive at a time
                d_value[rows, :, n] = weights @ d_mean[rows]
            if needs[0]:
                slope = _load(v, mask, n) @ d_mean[rows].mT  # [b, H, n, Dk]
                if softmax:
                    slope.sub_(correction[rows]).mul_(weights)
                d_key[rows, :, n] = slope
    return d_key, d_value


def attend(query: Tensor, mean: Tensor, normalization: str, num_groups: int) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``; queries normalized within groups of channels."""
    channel_major = is_channel_major(query)
    tiles = _walk(query, mean.shape[-1])
    if [len(blocks) for _, blocks in tiles] == [1] and not is_token_major(query):
        weights = _normalized_queries(query, normalization, num_groups)
        return _product(weights, mean, channel_major).to(query.dtype)
    output = empty_output(query, mean.shape[-1])
    for rows, blocks in tiles:
        for n in blocks:
            # Without names, so that the weights of a block are gone before those of the next are made.
            output[rows, :, n] = _product(
                _normalized_queries(query[rows, :, n], normalization, num_groups),
                mean[rows],
                channel_major,
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
    """Gradients of :func:`attend` with respect to query (its dtype and layout) and the context's mean."""
    d_query, d_mean = empty_gradient(query, needs[0]), empty_gradient(mean, needs[1]).zero_()
    for rows, blocks in _walk(query, mean.shape[-1]):
        d_mean[rows] = _pull_back_rows(
            d_output[rows],
            query[rows],
            mean[rows],
            d_query[rows],
            normalization,
            num_groups,
            needs,
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
    needs: Sequence[bool],
    blocks: Blocks,
) -> Tensor:
    """Fills ``d_query`` block by block; returns the sum over blocks of ``A^T d_out``, each empty if not needed."""
    channel_major = is_channel_major(query)

    def pull_back(n: slice) -> Tensor:
        weights = _normalized_queries(query[:, :, n], normalization, num_groups)
        d_out = d_output[:, :, n].to(mean.dtype)
        if needs[0]:
            slope = _product(d_out, mean.mT, channel_major)  # [b, H, n, Dk]
            if normalization == "softmax":
                _pull_back_softmax_(slope, weights, num_groups)
            d_query[:, :, n] = slope
        return weights.mT @ d_out if needs[1] else mean.new_empty(0)

    return fold(torch.Tensor.add_, pull_back, blocks)


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
    """Rows of the batch, and for each the blocks of positions of ``x [B, H, N, D]``."""
    batch, heads, positions, channels = x.shape
    return walk(batch, heads, positions, channels + other_channels)


def _load(x: Tensor, mask: Tensor | None, positions: slice, fill: float = 0) -> Tensor:
    """A block in the dtype of sums; masked positions may hold anything, NaN included, so they are replaced."""
    dtype = accumulation_dtype(x.dtype)
    block = _block(x, positions)
    if mask is None:
        return block.to(dtype)
    attended = _block(mask, positions).unsqueeze(-1)  # [b, H, n, 1]
    # As bits: 0 * NaN is NaN, and a conditional copy takes four times as long on a CPU.
    bits = _BITS[x.itemsize]
    block = (block.view(bits) & attended.to(bits).neg_()).view(x.dtype).to(dtype)
    if fill:
        block += torch.zeros_like(attended, dtype=dtype).masked_fill_(~attended, fill)
    return block


def _block(x: Tensor, positions: slice) -> Tensor:
    # Views are cheap, and short inputs are cheaper still.
    return x if positions.start == 0 and positions.stop >= x.shape[2] else x[:, :, positions]


def _mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[rows]
