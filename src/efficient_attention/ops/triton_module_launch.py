"""The folded module by the kernels of ``triton_module_kernels.py``: what is allocated, and how many programs run.

Signatures, gradients and shapes are those of ``streamed.py``. What has the size of a context is computed by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import triton_module_kernels as kernels
from .folding import fold_output_backward, fold_values_backward, folded_context, key_slopes
from .layout import empty_gradient
from .tiling import (
    heads_of_tile,
    input_gradient_tile,
    module_chunk_length,
    output_tile,
    padded_groups,
    pool_tile,
    sum_tile,
)
from .triton_programs import added, arithmetic, count, empty_contexts, launch, mask_bytes, merged

Biases = Sequence[Tensor | None]


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
    """The output, and pooled inputs, shift, total and column sums, as :func:`.streamed.folded`."""
    module = _Module(key_mask, weights, biases, normalization, num_heads, residual)
    summary = _summarize(module, x if source is None else source)
    output = torch.empty_like(x)
    _attend(module, output, x, summary)
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
    module = _Module(key_mask, weights, biases, normalization, num_heads, residual)
    _attend(module, x, x, _summarize(module, x if source is None else source))


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
    """Gradients of x, of source, of the four weights, of the four biases, as :func:`.streamed.folded_backward`."""
    module = _Module(key_mask, weights, biases, normalization, num_heads, residual)
    softmax, attended = normalization == "softmax", x if source is None else source
    context, mean = folded_context(
        pooled, column_sums, weights[2:], biases[2:], num_heads, softmax=softmax
    )
    d_mean, _ = _sums(module, "context", x, d_output, mean)
    d_context, d_output_weight, d_output_bias = fold_output_backward(d_mean, context, weights[3])
    d_pooled, d_sums, *d_value = fold_values_backward(
        d_context, pooled, column_sums, weights[2], biases[2]
    )
    slopes, constant = key_slopes(pooled, total, d_pooled, d_sums, softmax=softmax)
    keys = _Keys(slopes, constant, shift)
    d_x, d_source = empty_gradient(x, needs[0]), x.new_empty(0)
    own = keys if source is None else None
    if needs[0]:
        _input_gradient(module, d_x, x, (d_output, mean), own)
    if source is not None and needs[1]:
        d_source = empty_gradient(source, needed=True)
        _input_gradient(module, d_source, source, None, keys)
    if not needs[2]:
        return d_x, d_source, *(x.new_empty(0) for _ in range(8))
    d_query = [part.sum(0) for part in _sums(module, "queries", x, d_output, mean)]
    d_key = [part.sum(0) for part in _sums(module, "keys", attended, None, slopes, keys)]
    if softmax:
        d_key[1].zero_()
    else:
        d_output_bias = d_output.sum((0, 2), dtype=torch.float32)
    d_weights = (d_query[0], d_key[0], d_value[0], d_output_weight)
    d_biases = (d_query[1], d_key[1], d_value[1], d_output_bias)
    return (
        d_x,
        d_source,
        *(
            x.new_empty(0) if like is None or d is None else d.to(x.dtype)
            for d, like in zip((*d_weights, *d_biases), (*weights, *biases), strict=True)
        ),
    )


class _Module(NamedTuple):
    """What a module is, beside its inputs."""

    key_mask: Tensor | None
    weights: Sequence[Tensor]
    biases: Biases
    normalization: str
    num_heads: int
    residual: bool

    def groups(self) -> tuple[int, int]:
        """Heads of queries as a block holds them: their number and size, padded."""
        return padded_groups(self.weights[0].shape[0], self.num_heads)

    def weight(self, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection; anything if there is no bias."""
        bias = self.biases[i]
        return self.weights[i].contiguous(), like if bias is None else bias.contiguous()


class _Keys(NamedTuple):
    """What gradients of keys follow from: ``slopes [B, dk, S]``, and ``constant``, ``shift [B, dk]``."""

    slopes: Tensor
    constant: Tensor
    shift: Tensor


def _summarize(module: _Module, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled inputs ``[B, dk, S]``, and shift, total, column sums ``[B, dk]``."""
    batch, channels, positions = source.shape
    weight, bias = module.weight(1, source)
    key_channels, softmax = weight.shape[0], module.normalization == "softmax"
    tile = pool_tile(source.dtype, key_channels, channels)
    chunk, chunks = _chunks(source, key_channels)
    shape = (batch, 1, chunks, key_channels)
    pooled, sums, shift, total = empty_contexts(source, shape, channels)
    tiles = count(key_channels, tile.key_channels) * count(channels, tile.value_channels)
    mask, mask_strides = mask_bytes(module.key_mask, (batch, positions), source)
    launch(
        kernels.pool_kernel,
        source,
        batch * chunks * tiles,
        tile,
        *(source, mask, weight, bias, pooled, shift, total, sums),
        *(positions, chunk, chunks),
        *(*source.stride(), *mask_strides),
        DK=key_channels,
        C=channels,
        BK=tile.key_channels,
        BV=tile.value_channels,
        BC=tile.depth,
        MASKED=module.key_mask is not None,
        BIASED=not softmax and module.biases[1] is not None,
        **arithmetic(source, module.normalization),
    )
    column_sums = None if softmax else sums.sum((1, 2))
    pooled, _, shift, total = (part.squeeze(1) for part in merged((pooled, sums, shift, total)))
    by = total.clamp(min=1)
    return pooled, shift, total, (total if column_sums is None else column_sums) / by


def _attend(
    module: _Module, output: Tensor, x: Tensor, summary: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Writes ``X + M^T rho_q(Q)`` into output, which may be x."""
    softmax, (weight, bias) = module.normalization == "softmax", module.weight(0, x)
    pooled, _, _, column_sums = summary
    _, mean = folded_context(
        *(pooled, column_sums, module.weights[2:], module.biases[2:], module.num_heads),
        softmax=softmax,
    )
    constant = None if softmax else module.biases[3]
    groups, size = module.groups()
    tile = output_tile(x.dtype, groups * size, x.shape[1])
    launch(
        kernels.output_kernel,
        x,
        lambda tile: x.shape[0] * count(x.shape[2], tile.positions),
        tile,
        *(x, weight, bias, _narrow(mean, x), bias if constant is None else constant, output),
        *(x.shape[2], *x.stride(), *output.stride()),
        DK=weight.shape[0],
        C=x.shape[1],
        BC=tile.depth,
        GROUPS=module.num_heads,
        BG=groups,
        BS=size,
        BIASED=module.biases[0] is not None,
        SHIFTED=constant is not None,
        repeatable=output is not x,
        RESIDUAL=module.residual,
        **arithmetic(x, module.normalization),
    )


def _sums(
    module: _Module,
    of: str,
    x: Tensor,
    d_output: Tensor | None,
    context: Tensor,
    keys: _Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients that are sums over positions, ``[B, dk, C]``, and of the bias, ``[B, dk]``."""
    batch, channels, positions = x.shape
    weight, bias = module.weight(1 if keys else 0, x)
    key_channels = weight.shape[0]
    # Keys of all heads are alike: any number of them is a tile.
    heads, (groups, size) = module.num_heads, module.groups()
    if keys:
        heads, groups, size = key_channels, max(16, groups * size), 1
    groups = heads_of_tile(groups, size)
    tile = sum_tile(x.dtype, groups * size, channels)
    chunk, chunks = _chunks(x, key_channels)
    sums = x.new_empty(batch, chunks, key_channels, channels, dtype=torch.float32)
    bias_sums = x.new_empty(batch, chunks, key_channels, dtype=torch.float32)
    masked = keys is not None and module.key_mask is not None
    mask, mask_strides = mask_bytes(module.key_mask if masked else None, (batch, positions), x)
    slope = x if d_output is None else d_output
    launch(
        kernels.sum_gradient_kernel,
        x,
        batch * chunks * count(heads, groups) * count(channels, tile.value_channels),
        tile,
        *(x, slope, mask, weight, bias, _narrow(context, x)),
        *(keys[1:] if keys else (bias, bias)),
        *(sums, bias_sums, positions, chunk, chunks),
        *(*x.stride(), *slope.stride(), *mask_strides),
        DK=key_channels,
        C=channels,
        BV=tile.value_channels,
        BC=tile.depth,
        GROUPS=heads,
        BG=groups,
        BS=size,
        OF=of,
        MASKED=masked,
        BIASED=module.biases[1 if keys else 0] is not None,
        **arithmetic(x, module.normalization),
    )
    return added(sums), bias_sums.sum(1)


def _input_gradient(
    module: _Module,
    d_x: Tensor,
    x: Tensor,
    queries: tuple[Tensor, Tensor] | None,
    keys: _Keys | None,
) -> None:
    """Writes d_x: what comes through queries, of which there are slopes of the output and its context; through keys."""
    batch, channels, positions = x.shape
    groups, size = module.groups()
    tile = input_gradient_tile(x.dtype, groups * size, channels)
    masked = keys is not None and module.key_mask is not None
    mask, mask_strides = mask_bytes(module.key_mask if masked else None, (batch, positions), x)
    d_output, context = queries or (x, x)
    slopes, constant, shift = keys or (x, x, x)
    launch(
        kernels.input_gradient_kernel,
        x,
        lambda tile: batch * count(positions, tile.positions),
        tile,
        *(x, d_output, mask, *module.weight(0, x), _narrow(context, x)),
        *(*module.weight(1, x), _narrow(slopes, x), constant, shift, d_x),
        positions,
        *(*x.stride(), *d_output.stride(), *mask_strides, *d_x.stride()),
        DK=module.weights[0].shape[0],
        C=channels,
        BC=tile.depth,
        GROUPS=module.num_heads,
        BG=groups,
        BS=size,
        ATTENDS=queries is not None,
        ATTENDED=keys is not None,
        MASKED=masked,
        QUERY_BIASED=module.biases[0] is not None,
        KEY_BIASED=module.biases[1] is not None,
        RESIDUAL=module.residual,
        **arithmetic(x, module.normalization),
    )


def _narrow(context: Tensor, x: Tensor) -> Tensor:
    """A context as products take it: half the bytes in bfloat16; in float16 it might not fit."""
    return context.to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


def _chunks(x: Tensor, key_channels: int) -> tuple[int, int]:
    """How long the chunks of ``x [B, C, N]`` are, and how many; one if it is empty, to write empty sums."""
    length = module_chunk_length(x.dtype, x.shape[2], key_channels)
    return length, max(1, count(x.shape[2], length))
