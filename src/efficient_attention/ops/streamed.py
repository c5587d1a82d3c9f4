"""The folded module in blocks of positions: queries, keys, values and attended values never exist as a whole.

Two passes over X, one that summarizes and one that attends, in memory that does not grow with N or M; the backward
pass keeps X and numbers of the size of a context, and computes queries and keys again, block by block. With
P = rho_k(K), A = rho_q(Q), G the pooled inputs and M the folded context (ops/folding.py)::

    K = Wk X;      G = P X^T;         Q = Wq X + bq;     Y = X + M^T A
    d_A = M d_Y;   d_M = A d_Y^T;     d_Q = A * (d_A - sum_c A d_A);          d_X = d_Y + Wq^T d_Q
    d_P = d_G X;                      d_K = P * (d_P - sum_s G d_G);          d_X += d_G^T P + Wk^T d_K

Under softmax the key bias is left out: softmax over positions does not see it. Factors of products are in the dtype of
products, everything else in that of sums (ops/precision.py). Blocks are channel-major, ``[b, channels, n]``, which is
the faster order for softmaxes of a few channels; X and Y are read and written where they lie, in either order.

Shapes: B batch (b of it at a time), C channels of X and Y, S of the source, N, M positions, n of a block, dk, dv key
and value channels of all heads, h heads. ``weights`` and ``biases`` are of queries, keys, values and output,
``[out, in]`` and ``[out]``. ``key_mask`` is bool ``[B or 1, M]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Tile, add_weighted, divisor, exponentials, fold, walk
from .folding import fold_output_backward, fold_values_backward, folded_context, key_slopes
from .layout import empty_gradient, empty_like
from .pages import Pages, product
from .precision import accumulation_dtype, is_widened, product_dtype

Biases = Sequence[Tensor | None]


class Summary(NamedTuple):
    """What the first pass leaves: ``pooled [B, dk, S]``, and ``shift``, ``total``, ``column_sums [B, dk]``.

    ``pooled`` is ``sum_m w x / total`` for ``w = exp(k - shift)`` (softmax) or ``w = k`` over the number of keys
    (scaling); the column sums are ``sum_m w / total``.
    """

    pooled: Tensor
    shift: Tensor
    total: Tensor
    column_sums: Tensor


def folded(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The module's output ``[B, C, N]`` for ``x [B, C, N]`` attending to ``source [B, S, M]``, None: to itself.

    And the four parts of the :class:`Summary`, for the backward pass.
    """
    attended = x if source is None else source
    summary = _summarize(attended, key_mask, weights[1], biases[1], normalization)
    output = empty_like(x)
    _attend(output, x, summary, weights, biases, normalization, num_heads, residual)
    return output, *summary


def folded_(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
) -> None:
    """:func:`folded`, written over x."""
    attended = x if source is None else source
    summary = _summarize(attended, key_mask, weights[1], biases[1], normalization)
    _attend(x, x, summary, weights, biases, normalization, num_heads, residual)


def _summarize(
    source: Tensor,
    key_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    normalization: str,
) -> Summary:
    batch, channels, positions = source.shape
    dtype, key_channels = accumulation_dtype(source.dtype), weight.shape[0]
    pooled = source.new_zeros(batch, key_channels, channels, dtype=dtype)
    shift, total, sums = (source.new_zeros(batch, key_channels, dtype=dtype) for _ in range(3))
    softmax = normalization == "softmax"
    lowest = torch.finfo(dtype).min
    tiles = _walk(source, key_channels, product_dtype(source.dtype, source.device))
    pages = Pages(source, tiles, key_channels)
    weight = pages.factor(weight)
    for rows, _, blocks in tiles:

        def weigh(n: slice, rows: slice = rows) -> tuple[Tensor, Tensor, Tensor]:
            x, mask = _attended(source[rows, :, n], key_mask, rows, n)
            x = pages.factor(x)
            keys = pages.product(0, weight, x)  # [b, dk, n]
            _mask_keys_(keys, mask, bias, softmax)
            largest = keys.new_zeros(keys.shape[:2])
            if softmax:
                # Where no key has any weight: -inf - -inf would be NaN.
                largest = keys.amax(-1).clamp_(min=lowest)
                exponentials(keys, largest.unsqueeze(-1), out=keys)
            weights = pages.narrowed(0, keys)
            # The sum of what is multiplied: in low precision the weights of a mean add up to one.
            return product(weights, x.mT).to(dtype), largest, weights.sum(-1, dtype=dtype)

        weighted, shift[rows], summed = fold(add_weighted, weigh, blocks)
        total[rows] = summed if softmax else _count(key_mask, rows, positions)
        sums[rows] = summed
        pooled[rows] = weighted
    by = divisor(total)
    return Summary(pooled.div_(by.unsqueeze(-1)), shift, total, sums.div_(by))


def _attend(
    output: Tensor,
    x: Tensor,
    summary: Summary,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
) -> None:
    """Writes ``X + M^T rho_q(Q)`` into output, which may be x."""
    softmax, key_channels = normalization == "softmax", weights[0].shape[0]
    tiles = _walk(x, key_channels, product_dtype(x.dtype, x.device))
    pages = Pages(x, tiles, key_channels)
    weight = pages.factor(weights[0])
    for rows, _, blocks in tiles:
        # Folded for these rows alone, so that no rounding of a long sample depends on its batch mates.
        sums = summary.pooled[rows], summary.column_sums[rows]
        _, mean = folded_context(*sums, weights[2:], biases[2:], num_heads, softmax=softmax)
        mean = pages.factor(mean)  # [b, dk, C]
        for n in blocks:
            block, out = pages.factor(x[rows, :, n]), output[rows, :, n]
            attention = _queries(pages, block, weight, biases[0], num_heads, softmax)
            narrow, onto = pages.narrowed(0, attention), block if residual else None
            pages.write_product(out, mean.mT, narrow, onto, None if softmax else biases[3])


def folded_backward(
    d_output: Tensor,
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
    pooled: Tensor,
    shift: Tensor,
    total: Tensor,
    column_sums: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of :func:`folded`: of x, of source, of the four weights, of the four biases.

    ``needs`` says whether those of x, of source and of the parameters are asked for; others are empty, as are those of
    a source and of biases that are None. That of the key bias is zero under softmax.
    """
    softmax = normalization == "softmax"
    context, mean = folded_context(
        pooled, column_sums, weights[2:], biases[2:], num_heads, softmax=softmax
    )
    d_x = empty_gradient(x, needs[0])
    d_mean, *d_query, d_constant = _attend_backward(
        d_x, d_output, x, mean, weights[0], biases[0], num_heads, softmax, residual, needs
    )
    d_context, d_output_weight, d_output_bias = fold_output_backward(d_mean, context, weights[3])
    d_pooled, d_sums, *d_value = fold_values_backward(
        d_context, pooled, column_sums, weights[2], biases[2]
    )
    slopes, constant = key_slopes(pooled, total, d_pooled, d_sums, softmax=softmax)
    d_source = empty_gradient(x if source is None else source, source is not None and needs[1])
    d_key = _summarize_backward(
        d_x if source is None else d_source,
        x if source is None else source,
        key_mask,
        shift,
        (slopes, constant.unsqueeze(-1)),
        weights[1],
        biases[1],
        softmax,
        accumulate=source is None,
        needs=(needs[0 if source is None else 1], needs[2]),
    )
    d_output_bias = d_output_bias if softmax else d_constant
    d_weights = (d_query[0], d_key[0], d_value[0], d_output_weight)
    d_biases = (d_query[1], d_key[1], d_value[1], d_output_bias)
    return (
        d_x,
        d_source,
        *(
            x.new_empty(0) if like is None or d is None or not needs[2] else d.to(x.dtype)
            for d, like in zip((*d_weights, *d_biases), (*weights, *biases), strict=True)
        ),
    )


def _attend_backward(
    d_x: Tensor,
    d_output: Tensor,
    x: Tensor,
    mean: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    softmax: bool,
    residual: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes what comes through the queries into d_x; gradients of mean, weight, bias and of a bias of the output."""
    dtype, channels = mean.dtype, x.shape[1]
    d_mean = torch.zeros_like(mean)
    d_weight = mean.new_zeros(weight.shape)
    d_bias, d_output_bias = mean.new_zeros(weight.shape[0]), mean.new_zeros(channels)
    tiles = _walk(x, weight.shape[0], dtype)
    pages = Pages(x, tiles, weight.shape[0])
    narrow, weight = pages.factor(mean), pages.factor(weight)
    for rows, _, blocks in tiles:

        def pull_back(n: slice, rows: slice = rows) -> tuple[Tensor, ...]:
            block, d_out = (pages.factor(each[rows, :, n]) for each in (x, d_output))
            attention = _queries(pages, block, weight, bias, num_heads, softmax)
            d_mean = product(pages.narrowed(0, attention), d_out.mT).to(dtype)
            slope = pages.product(1, narrow[rows], d_out)  # [b, dk, n]
            if softmax:
                _pull_back_softmax_(slope, attention, pages.wide(2, slope.shape), num_heads)
            d_query = pages.narrowed(1, slope)
            if needs[0]:
                onto = d_out if residual else None
                pages.write_product(d_x[rows, :, n], weight.mT, d_query, onto)
            if not needs[2]:
                return (d_mean,)
            d_weight = product(d_query, block.mT).sum(0, dtype=dtype)
            # Under softmax the output's bias is a part of the mean.
            d_constant = d_output_bias if softmax else d_out.sum(2).sum(0, dtype=dtype)
            return d_mean, d_weight, slope.sum((0, 2)), d_constant

        d_mean[rows], *sums = fold(_add_each, pull_back, blocks)
        for whole, part in zip((d_weight, d_bias, d_output_bias), sums, strict=False):
            whole += part
    return d_mean, d_weight, d_bias, d_output_bias


def _summarize_backward(
    d_source: Tensor,
    source: Tensor,
    key_mask: Tensor | None,
    shift: Tensor,
    slopes: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    softmax: bool,
    *,
    accumulate: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Writes what comes through the keys into d_source, or adds it; gradients of weight and bias."""
    (slope, constant), dtype, key_channels = slopes, shift.dtype, weight.shape[0]
    tiles = _walk(source, key_channels, dtype)
    pages = Pages(source, tiles, 2 * key_channels)
    slope, weight = pages.factor(slope), pages.factor(weight)
    # Keys and their slopes come from one product, and go back by another.
    there = torch.cat((weight.expand_as(slope), slope), dim=1)  # [B, 2 dk, S]
    back = torch.cat((slope, weight.expand_as(slope)), dim=1).mT
    d_weight, d_bias = (constant.new_zeros(x) for x in (weight.shape, key_channels))
    for rows, _, blocks in tiles:

        def pull_back(n: slice, rows: slice = rows) -> tuple[Tensor, ...]:
            x, mask = _attended(source[rows, :, n], key_mask, rows, n)
            x = pages.factor(x)
            both = pages.product(0, there[rows], x)
            keys, d_keys = both.split(key_channels, dim=1)  # [b, dk, n]
            _mask_keys_(keys, mask, bias, softmax)
            d_keys.add_(constant[rows])
            if softmax:
                d_keys.mul_(exponentials(keys, shift[rows].unsqueeze(-1), out=keys))
            elif mask is not None:
                d_keys.masked_fill_(~mask, 0)
            narrow = pages.narrowed(0, both)
            if needs[0]:
                d_x = d_source[rows, :, n]
                onto = pages.factor(d_x) if accumulate else None
                pages.write_product(d_x, back[rows], narrow, onto)
            if not needs[1]:
                return ()
            d_weight = product(narrow[:, key_channels:], x.mT).sum(0, dtype=dtype)
            return d_weight, d_keys.sum((0, 2))

        sums = fold(_add_each, pull_back, blocks)
        for whole, part in zip((d_weight, d_bias), sums, strict=False):
            whole += part
    return d_weight, d_bias.zero_() if softmax else d_bias


def _queries(
    pages: Pages, x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, softmax: bool
) -> Tensor:
    """``rho_q(Q)`` of a block, ``[b, dk, n]`` in the dtype of sums, on page 0."""
    queries = pages.product(0, weight, x)
    if bias is not None:
        queries.add_(bias.unsqueeze(-1))
    if softmax:
        heads = queries.unflatten(1, (num_heads, -1))  # [b, h, dk / h, n]
        exponentials(heads, heads.amax(2, keepdim=True), out=heads)
        heads.div_(heads.sum(2, keepdim=True))
    return queries


def _pull_back_softmax_(slope: Tensor, attention: Tensor, free: Tensor, num_heads: int) -> None:
    """Turn dL/dA into dL/dQ in place for A = softmax(Q) over the channels of each head."""
    total = torch.mul(slope, attention, out=free).unflatten(1, (num_heads, -1)).sum(2, keepdim=True)
    slope.unflatten(1, (num_heads, -1)).sub_(total)
    slope.mul_(attention)


def _walk(x: Tensor, key_channels: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles of ``x [B, C, N]``, as long as fit the cache in a dtype: in that of sums where there are many pages."""
    batch, channels, positions = x.shape
    # Widened, a block of X is there twice and more.
    channels *= 1 + is_widened(x)
    return walk(batch, 1, positions, key_channels + channels, dtype.itemsize)


def _attended(
    x: Tensor, key_mask: Tensor | None, rows: slice, n: slice
) -> tuple[Tensor, Tensor | None]:
    """A block of what is attended to, 0 where it is masked, and its mask ``[b or 1, 1, n]``."""
    if key_mask is None:
        return x, None
    mask = _mask_rows(key_mask, rows)[:, n].unsqueeze(1)
    # Masked positions may hold anything, NaN included: weight 0 alone would not silence them.
    return x.masked_fill(~mask, 0), mask


def _mask_keys_(keys: Tensor, mask: Tensor | None, bias: Tensor | None, softmax: bool) -> None:
    """Logits from projected keys, in place: -inf where they are masked; or keys, 0 there."""
    if bias is not None and not softmax:
        keys.add_(bias.unsqueeze(-1))
    if mask is not None:
        keys.masked_fill_(~mask, -torch.inf if softmax else 0)


def _count(key_mask: Tensor | None, rows: slice, positions: int) -> Tensor | int:
    if key_mask is None:
        return positions
    return _mask_rows(key_mask, rows).sum(-1, keepdim=True)


def _mask_rows(key_mask: Tensor, rows: slice) -> Tensor:
    return key_mask if key_mask.shape[0] == 1 else key_mask[rows]


def _add_each(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for x, y in zip(a, b, strict=True):
        x += y
    return a
