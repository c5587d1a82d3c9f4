"""The native kernels (native/module.c) as the folded module of ``streamed.py``: its signatures, gradients and shapes.

Sums are float32. Products take bfloat16 as it is where the processor can, as ``native_launch.py`` says. What has the
size of a context is computed by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import module_chunk_length
from .folding import fold_output_backward, fold_values_backward, folded_context, key_slopes
from .layout import empty_gradient, empty_like
from .native_calls import Argument, Sizes, address, mask_view, run, view

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
    output = empty_like(x)
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
    softmax = module.softmax()
    context, mean = folded_context(
        pooled, column_sums, weights[2:], biases[2:], num_heads, softmax=softmax
    )
    d_x = empty_gradient(x, needs[0])
    d_mean, d_query = _attend_backward(module, d_x, x, d_output, mean, needs)
    d_context, d_output_weight, d_output_bias = fold_output_backward(d_mean, context, weights[3])
    d_pooled, d_sums, *d_value = fold_values_backward(
        d_context, pooled, column_sums, weights[2], biases[2]
    )
    slopes, constant = key_slopes(pooled, total, d_pooled, d_sums, softmax=softmax)
    keys = _Keys(slopes.contiguous(), constant.contiguous(), shift.contiguous())
    if source is None:
        d_source = x.new_empty(0)
        d_key = _summarize_backward(module, d_x if needs[0] else None, x, keys, accumulate=True)
    else:
        d_source = empty_gradient(source, needs[1])
        target = d_source if needs[1] else None
        d_key = _summarize_backward(module, target, source, keys, accumulate=False)
    if not needs[2]:
        return d_x, d_source, *(x.new_empty(0) for _ in range(8))
    if softmax:
        d_key[1].zero_()
    elif biases[3] is not None:
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

    def softmax(self) -> bool:
        return self.normalization == "softmax"

    def projection(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of queries (0) or keys (1), as the kernels take them; softmax sees no key bias."""
        bias = None if i == 1 and self.softmax() else self.biases[i]
        return _wide(self.weights[i]), None if bias is None else _wide(bias)

    def mask(self, source: Tensor) -> Argument:
        mask = None if self.key_mask is None else self.key_mask.unsqueeze(1)
        return mask_view(mask, (len(source), 1, source.shape[2]))

    def sizes(self, x: Tensor) -> Sizes:
        """Of ``x [B, C, N]``, whose positions are values of one head."""
        (channels, positions), key_channels = x.shape[1:], len(self.weights[0])
        length = module_chunk_length(positions, key_channels)
        layers = key_channels, channels, self.normalization, self.num_heads
        return Sizes(x.mT.unsqueeze(1), length, *layers)


class _Keys(NamedTuple):
    """What gradients of keys follow from: ``slopes [B, dk, S]``, and ``constant``, ``shift [B, dk]``."""

    slopes: Tensor
    constant: Tensor
    shift: Tensor


def _summarize(module: _Module, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled inputs ``[B, dk, S]``, and shift, total, column sums ``[B, dk]``."""
    batch, channels, positions = source.shape
    weight, bias = module.projection(1)
    pooled = source.new_empty(batch, len(weight), channels, dtype=torch.float32)
    shift, sums = (source.new_empty(batch, len(weight), dtype=torch.float32) for _ in range(2))
    sizes = module.sizes(source)
    partial = sizes.sums()
    run(
        "module_summarize",
        *(sizes.problem(), _view(source), module.mask(source), address(weight), address(bias)),
        *(address(pooled), address(shift), address(sums), address(partial)),
    )
    total = sums
    if not module.softmax():
        total = torch.full_like(sums, positions)
        if module.key_mask is not None:
            total.copy_(module.key_mask.sum(-1, keepdim=True))
    # 1 where nothing has any weight: the heaviest key alone weighs 1, as does each that is counted.
    by = total.clamp(min=1)
    return pooled.div_(by.unsqueeze(-1)), shift, total, sums / by


def _attend(
    module: _Module, output: Tensor, x: Tensor, summary: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Writes ``X + M^T rho_q(Q)`` into output, which may be x."""
    pooled, _, _, column_sums = summary
    _, mean = folded_context(
        *(pooled, column_sums, module.weights[2:], module.biases[2:], module.num_heads),
        softmax=module.softmax(),
    )
    mean = mean.contiguous()
    weight, bias = module.projection(0)
    run(
        "module_attend",
        *(module.sizes(x).problem(), _view(x), address(weight), address(bias), address(mean)),
        *(_view(x if module.residual else None), _view(output)),
    )
    if module.biases[3] is not None and not module.softmax():
        output.add_(module.biases[3].unsqueeze(-1))


def _attend_backward(
    module: _Module, d_x: Tensor, x: Tensor, d_output: Tensor, mean: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Writes what comes through the queries into d_x; gradients of mean, and of weight and bias if they are needed."""
    weight, bias = module.projection(0)
    parts = 2 if needs[2] else 1
    sums = mean.new_empty(len(x), parts, *mean.shape[1:])
    totals = mean.new_empty(sums.shape[:3])
    mean = mean.contiguous()
    sizes = module.sizes(x)._replace(parts=parts)
    partial = sizes.sums()
    run(
        "module_attend_backward",
        *(sizes.problem(), _view(x), address(weight), address(bias), address(mean)),
        *(_view(d_output), _view(d_output if module.residual else None)),
        *(_view(d_x if needs[0] else None), c_int64(parts), address(sums), address(totals)),
        address(partial),
    )
    return sums[:, 0], (sums[:, -1].sum(0), totals[:, -1].sum(0))


def _summarize_backward(
    module: _Module, d_source: Tensor | None, source: Tensor, keys: _Keys, *, accumulate: bool
) -> tuple[Tensor, Tensor]:
    """Writes what comes through the keys into d_source, or adds it; gradients of weight and bias."""
    weight, bias = module.projection(1)
    d_weight, d_bias = torch.empty_like(keys.slopes), torch.empty_like(keys.constant)
    sizes = module.sizes(source)
    partial = sizes.sums()
    run(
        "module_summarize_backward",
        *(sizes.problem(), _view(source), module.mask(source), address(weight), address(bias)),
        *(address(keys.slopes), address(keys.shift), address(keys.constant)),
        *(_view(d_source if accumulate else None), _view(d_source)),
        *(address(d_weight), address(d_bias), address(partial)),
    )
    return d_weight.sum(0), d_bias.sum(0)


def _view(x: Tensor | None) -> Argument:
    """Positions of ``[B, C, N]`` as those of one head."""
    return view(None if x is None else x.mT.unsqueeze(1))


def _wide(x: Tensor) -> Tensor:
    return x.contiguous().float()
