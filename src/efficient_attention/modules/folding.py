"""Projections folded into the context: values and attended values never exist in memory.

The columns of ``rho_k(K)`` are weights over positions and the projections are linear, so they commute, exactly::

    context_h = rho_k(K_h)^T (X Wv_h + bv_h) = (rho_k(K_h)^T X) Wv_h + (column sums of rho_k(K_h)) bv_h
    Y         = sum_h rho_q(Q_h) context_h Wo_h + bo = rho_q(Q) [context_1 Wo_1; context_2 Wo_2; ...] + bo

Under softmax the column sums are one (zero where nothing was summarized). Weights are ``[out, in, ...]``.
Shapes: B batch, h heads, dk, dv key and value channels of all heads, C channels of X or Y.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import Context
from ..ops.precision import without_autocast

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def obstacle(projection: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why the weights of a projection may not be used without calling it, or ``None`` if nobody would notice."""
    if type(projection) is not expected or "forward" in vars(projection):
        return f"it is a {type(projection).__name__}, not a plain {expected.__name__}"
    if isinstance(projection, _Convolution) and not _is_pointwise(projection):
        return "its convolution is not pointwise"
    # Global hooks are for profilers, which should see the computation as it is.
    if (
        projection._forward_hooks
        or projection._forward_pre_hooks
        or projection._backward_hooks
        or projection._backward_pre_hooks
    ):
        return "it has hooks, which would not run"
    return None


def _is_pointwise(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    ones = (1,) * len(convolution.kernel_size)
    return (
        convolution.kernel_size == convolution.stride == ones
        and not any(convolution.padding)
        and convolution.groups == 1
    )


def fold_values(
    pooled: Context, column_sums: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int
) -> Context:
    """The context of values from that of X: ``[B, 1, dk, C]`` to ``[B, h, dk / h, dv / h]``."""
    with without_autocast(weight.device):
        mean = pooled.mean.squeeze(1).unflatten(1, (num_heads, -1))  # [B, h, dk / h, C]
        weight = weight.flatten(1).unflatten(0, (num_heads, -1)).to(mean.dtype)  # [h, dv / h, C]
        mean = mean @ weight.mT
        if bias is not None:
            sums = column_sums.squeeze(1).unflatten(1, (num_heads, -1, 1))  # [B, h, dk / h, 1]
            mean = mean + sums * bias.to(mean.dtype).view(num_heads, 1, -1)
    return Context(mean, pooled.log_weight.squeeze(1).unflatten(1, (num_heads, -1)))


def fold_output(context: Context, weight: Tensor, bias: Tensor | None) -> Context:
    """The context of outputs from that of values: ``[B, h, dk / h, dv / h]`` to ``[B, 1, dk, C]``.

    ``bias`` is for softmax queries alone: their weights sum to one in every head, so that ``bias / h`` added to
    every row adds ``bias`` to every output.
    """
    num_heads = context.mean.shape[1]
    with without_autocast(weight.device):
        weight = weight.flatten(1).unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # [h, dv / h, C]
        mean = context.mean @ weight.to(context.mean.dtype)  # [B, h, dk / h, C]
        if bias is not None:
            mean = mean + bias.to(mean.dtype) / num_heads
    return Context(mean.flatten(1, 2).unsqueeze(1), context.log_weight.flatten(1, 2).unsqueeze(1))
