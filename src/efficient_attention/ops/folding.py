"""Projections folded into a context: values and attended values never exist in memory.

The columns of ``rho_k(K)`` are weights over positions and the projections are linear, so they commute, exactly::

    context_h = rho_k(K_h)^T (X Wv_h + bv_h) = (rho_k(K_h)^T X) Wv_h + (column sums of rho_k(K_h)) bv_h
    Y         = sum_h rho_q(Q_h) context_h Wo_h + bo = rho_q(Q) [context_1 Wo_1; context_2 Wo_2; ...] + bo

Under softmax the column sums are one (zero where nothing was summarized). All in the precision of contexts.
Shapes: B batch, h heads, dk, dv key and value channels of all heads, S channels of the source, C of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def folded_context(
    pooled: Tensor,
    column_sums: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    num_heads: int,
    *,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """The context of values ``[B, h, dk / h, dv / h]``, and that of outputs ``[B, dk, C]``.

    ``weights`` and ``biases`` are those of values and of the output.
    """
    context = fold_values(pooled, column_sums, weights[0], biases[0], num_heads)
    return context, fold_output(context, weights[1], biases[1] if softmax else None)


def key_slopes(
    pooled: Tensor, total: Tensor, d_pooled: Tensor, d_sums: Tensor | None, *, softmax: bool
) -> tuple[Tensor, Tensor]:
    """``[B, dk, S]`` and ``[B, dk]``: with w the unnormalized weights, ``d_k = w * (slopes x + constant)``.

    Dividing by the total here, in the size of a context, spares dividing every weight.
    """
    by = total.clamp(min=1)
    if softmax:
        constant = -(d_pooled * pooled).sum(-1) / by
    else:
        constant = torch.zeros_like(by) if d_sums is None else d_sums / by
    return d_pooled / by.unsqueeze(-1), constant


def fold_values(
    pooled: Tensor, column_sums: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int
) -> Tensor:
    """The context of values ``[B, h, dk / h, dv / h]`` from that of X, ``[B, dk, S]``; weight ``[dv, S]``."""
    pooled = pooled.unflatten(1, (num_heads, -1))  # [B, h, dk / h, S]
    context = pooled @ _values_by_head(weight, num_heads, pooled).mT
    if bias is not None:
        sums = column_sums.unflatten(1, (num_heads, -1)).unsqueeze(-1)  # [B, h, dk / h, 1]
        context = context + sums * bias.to(context.dtype).view(num_heads, 1, -1)
    return context


def fold_output(context: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The context of outputs ``[B, dk, C]`` from that of values, ``[B, h, dk / h, dv / h]``; weight ``[C, dv]``.

    ``bias`` is for softmax queries alone: their weights sum to one in every head, so that ``bias / h`` added to
    every row adds ``bias`` to every output.
    """
    mean = context @ _outputs_by_head(weight, context)  # [B, h, dk / h, C]
    if bias is not None:
        mean = mean + bias.to(mean.dtype) / context.shape[1]
    return mean.flatten(1, 2)


def fold_values_backward(
    d_context: Tensor,
    pooled: Tensor,
    column_sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of :func:`fold_values` with respect to pooled, column_sums, weight and bias."""
    num_heads = d_context.shape[1]
    pooled = pooled.unflatten(1, (num_heads, -1))
    d_pooled = (d_context @ _values_by_head(weight, num_heads, pooled)).flatten(1, 2)
    d_weight = (d_context.mT @ pooled).sum(0).flatten(0, 1)  # [dv, S]
    if bias is None:
        return d_pooled, None, d_weight, None
    sums = column_sums.unflatten(1, (num_heads, -1)).unsqueeze(-1)
    d_sums = (d_context @ bias.to(d_context.dtype).view(num_heads, -1, 1)).flatten(1)  # [B, dk]
    return d_pooled, d_sums, d_weight, (sums * d_context).sum((0, 2)).flatten()


def fold_output_backward(
    d_mean: Tensor, context: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`fold_output` with respect to context, weight and bias."""
    num_heads = context.shape[1]
    by_head = d_mean.unflatten(1, (num_heads, -1))  # [B, h, dk / h, C]
    d_context = by_head @ _outputs_by_head(weight, context).mT
    d_weight = (by_head.mT @ context).sum(0)  # [h, C, dv / h]
    return d_context, d_weight.transpose(0, 1).flatten(1), d_mean.sum((0, 1)) / num_heads


def _values_by_head(weight: Tensor, num_heads: int, like: Tensor) -> Tensor:
    return weight.unflatten(0, (num_heads, -1)).to(like.dtype)  # [h, dv / h, S]


def _outputs_by_head(weight: Tensor, context: Tensor) -> Tensor:
    by_head = weight.unflatten(1, (context.shape[1], -1)).permute(1, 2, 0)  # [h, dv / h, C]
    return by_head.to(context.dtype)
