"""Blocks of positions that fit the cache: exact, on any device, in memory that does not grow with N or M.

Nothing of the size of the inputs is allocated except what is returned. Every operator walks over blocks of positions
(ops/blocks.py), on memory that is used again for each (ops/pages.py). Factors of products are in the dtype of products,
everything else in that of sums (ops/precision.py).

Shapes: B batch and H heads (b and h of them at a time), N queries, M keys, n positions of a block, Dk key channels, Dv
value channels. ``key_mask`` is bool ``[B or 1, H or 1, M]``. Gradients, with P = rho_k(K) and A = rho_q(Q)::

    attend:     d_mean = A^T d_out;  G = d_out mean^T;  d_q = A * (G - sum_c A G)
    summarize:  d_v = P d_mean;      d_k = P * (V d_mean^T - sum_e d_mean mean + d_log_weight)

Under scaling A = Q and P = K / M have no softmax to correct for: d_q = G and d_k = V d_mean^T / M.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Blocks, Tile, add_weighted, divisor, exponentials, fold, walk
from .layout import empty_gradient, empty_output, is_channel_major, is_token_major
from .pages import Pages, product_by_head
from .precision import accumulation_dtype, product_dtype

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
    pages = Pages(key, tiles, key.shape[-1])
    if len(tiles) == 1:
        return _summarize_tile(key, value, key_mask, normalization, tiles[0].blocks, pages)
    dtype = accumulation_dtype(key.dtype)
    sizes = *key.shape[:2], key.shape[-1]
    mean = key.new_zeros(*sizes, value.shape[-1], dtype=dtype)
    log_weight, shift, total = (
        key.new_full(sizes, empty, dtype=dtype) for empty in (-torch.inf, 0.0, 0.0)
    )
    for rows, heads, blocks in tiles:
        at = rows, heads
        mean[at], log_weight[at], shift[at], total[at] = _summarize_tile(
            key[at], value[at], _mask_of(key_mask, *at), normalization, blocks, pages
        )
    return mean, log_weight, shift, total


def _summarize_tile(
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    normalization: str,
    blocks: Blocks,
    pages: Pages,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if normalization == "softmax":
        weighted, shift, total = _weigh_softmax(key, value, mask, blocks, pages)
    else:
        weighted, shift, total = _weigh_scaling(key, value, mask, blocks)
    mean = weighted.div_(divisor(total).unsqueeze(-1))
    return mean, total.log() + shift, shift, total


def _weigh_softmax(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks, pages: Pages
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m w v``, shift and ``sum_m w``, for ``w = exp(k - shift)``."""
    dtype = accumulation_dtype(key.dtype)
    lowest = torch.finfo(dtype).min

    def weigh(n: slice) -> tuple[Tensor, Tensor, Tensor]:
        k = _load(key, mask, n, -torch.inf)  # [b, h, n, Dk]
        # Where no key has any weight: -inf - -inf would be NaN.
        shift = k.amax(-2).to(dtype).clamp_(min=lowest)  # [b, h, Dk]
        weights = exponentials(k, shift.unsqueeze(-2), out=pages.like(0, k))
        total = weights.sum(-2)
        weighted = product_by_head(pages.narrowed(0, weights).mT, _load(value, mask, n))
        return weighted.to(dtype), shift, total

    return fold(add_weighted, weigh, blocks)


def _weigh_scaling(
    key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_m k v``, no shift, and the number of keys."""
    dtype = accumulation_dtype(key.dtype)
    weighted = fold(
        torch.Tensor.add_,
        lambda n: product_by_head(_load(key, mask, n).mT, _load(value, mask, n)).to(dtype),
        blocks,
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
    d_mean = (d_mean / total.unsqueeze(-1)).to(product_dtype(key.dtype, key.device))

    tiles = _walk(key, value.shape[-1])
    pages = Pages(key, tiles, key.shape[-1])
    for rows, heads, blocks in tiles:
        at = rows, heads
        k, v, mask = key[at], value[at], _mask_of(key_mask, *at)
        for n in blocks:
            weights = _load(k, mask, n, -torch.inf if softmax else 0)
            if softmax:
                by = shift[at].unsqueeze(-2)
                weights = exponentials(weights, by, out=pages.like(0, weights))
            if needs[1]:
                factor = pages.narrowed(0, weights) if softmax else weights
                product_by_head(factor, d_mean[at], d_value[*at, n])
            if needs[0]:
                goal = d_key[*at, n]
                slope = pages.product_by_head(1, _load(v, mask, n), d_mean[at].mT, goal)
                if softmax:
                    slope.sub_(correction[at]).mul_(weights)
                _settle(goal, slope)
    return d_key, d_value


def attend(
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    out: Tensor | None = None,
) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``; queries normalized within groups of channels.

    Under softmax ``out`` may be the query: a block is read before it is written.
    """
    output = empty_output(query, mean.shape[-1]) if out is None else out
    mean = mean.to(product_dtype(query.dtype, query.device))
    tiles = _walk(query, mean.shape[-1])
    pages = Pages(query, tiles, query.shape[-1])
    for rows, heads, blocks in tiles:
        for n in blocks:
            weights = query[rows, heads, n]
            if normalization == "softmax":
                weights = _softmax(weights, num_groups, pages.narrow_like(0, weights))
            product_by_head(weights.to(mean.dtype), mean[rows, heads], output[rows, heads, n])
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
    narrow = mean.to(product_dtype(query.dtype, query.device))
    tiles = _walk(query, mean.shape[-1])
    pages = Pages(query, tiles, query.shape[-1])
    for rows, heads, blocks in tiles:
        at = rows, heads
        part = _pull_back_tile(
            d_output[at],
            query[at],
            narrow[at],
            d_query[at] if needs[0] else d_query,
            normalization,
            num_groups,
            needs,
            blocks,
            pages,
        )
        if needs[1]:
            d_mean[at] = part
    return d_query, d_mean


def _pull_back_tile(
    d_output: Tensor,
    query: Tensor,
    mean: Tensor,
    d_query: Tensor,
    normalization: str,
    num_groups: int,
    needs: Sequence[bool],
    blocks: Blocks,
    pages: Pages,
) -> Tensor:
    """Fills ``d_query`` block by block; returns the sum over blocks of ``A^T d_out``, each empty if not needed."""
    dtype, softmax = accumulation_dtype(query.dtype), normalization == "softmax"

    def pull_back(n: slice) -> Tensor:
        weights, d_out = query[:, :, n], d_output[:, :, n].to(mean.dtype)
        if softmax:
            weights = _softmax(weights, num_groups, pages.like(0, weights))
        if needs[0]:
            goal = d_query[:, :, n]
            slope = pages.product_by_head(1, d_out, mean.mT, goal)  # [b, h, n, Dk]
            if softmax:
                _pull_back_softmax_(slope, weights, pages.like(2, slope), num_groups)
            _settle(goal, slope)
        if not needs[1]:
            return mean.new_empty(0)
        weights = pages.narrowed(0, weights) if softmax else weights.to(mean.dtype)
        return product_by_head(weights.mT, d_out).to(dtype)

    return fold(torch.Tensor.add_, pull_back, blocks)


def _pull_back_softmax_(slope: Tensor, weights: Tensor, free: Tensor, num_groups: int) -> None:
    """Turn dL/dA into dL/dQ in place for A = softmax(Q) over the channels of each group."""
    both = torch.mul(slope, weights, out=free)
    total = both.unflatten(-1, (num_groups, -1)).sum(-1, keepdim=True)
    slope.unflatten(-1, (num_groups, -1)).sub_(total)
    slope.mul_(weights)


def _softmax(query: Tensor, num_groups: int, page: Tensor) -> Tensor:
    """Softmax over the channels of each group, on a page and in its dtype."""
    # In the order of memory, and by hand over a few neighbours, for which PyTorch's is slow.
    if is_channel_major(query):
        groups, out = (x.mT.unflatten(-2, (num_groups, -1)) for x in (query, page))
        torch.softmax(groups, -2, dtype=page.dtype, out=out)
    elif num_groups == 1:
        torch.softmax(query, -1, dtype=page.dtype, out=page)
    else:
        groups = query.unflatten(-1, (num_groups, -1)).to(accumulation_dtype(query.dtype))
        weights = exponentials(groups, groups.amax(-1, keepdim=True))
        torch.div(weights, weights.sum(-1, keepdim=True), out=page.unflatten(-1, (num_groups, -1)))
    return page


def _settle(goal: Tensor, x: Tensor) -> None:
    """Bring a result to where it goes in the end, unless it was computed there."""
    if x.data_ptr() != goal.data_ptr():
        goal.copy_(x)


def _walk(x: Tensor, other_channels: int) -> list[Tile]:
    """Tiles of ``x [B, H, N, D]`` whose positions have as many other channels besides."""
    batch, heads, positions, channels = x.shape
    channels += other_channels
    itemsize = product_dtype(x.dtype, x.device).itemsize
    if not is_token_major(x):
        return walk(batch, heads, positions, channels, itemsize)
    # The heads of a position are neighbours.
    together = walk(batch, 1, positions, heads * channels, itemsize)
    return [tile._replace(heads=slice(0, heads)) for tile in together]


def _load(x: Tensor, mask: Tensor | None, positions: slice, fill: float = 0) -> Tensor:
    """A block in the dtype of products; masked positions may hold anything, NaN included, so they are replaced."""
    dtype = product_dtype(x.dtype, x.device)
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


def _mask_of(mask: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    if mask is None:
        return None
    return mask[
        rows if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)
    ]
