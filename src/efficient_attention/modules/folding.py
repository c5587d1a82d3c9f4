"""Projections folded into the contexts of a module: when nobody would notice, and how; see ops/folding.py."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import Context, folding
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
        mean = folding.fold_values(
            pooled.mean.squeeze(1), column_sums.squeeze(1), weight.flatten(1), bias, num_heads
        )
    return Context(mean, pooled.log_weight.squeeze(1).unflatten(1, (num_heads, -1)))


def fold_output(context: Context, weight: Tensor, bias: Tensor | None) -> Context:
    """The context of outputs from that of values: ``[B, h, dk / h, dv / h]`` to ``[B, 1, dk, C]``."""
    with without_autocast(weight.device):
        mean = folding.fold_output(context.mean, weight.flatten(1), bias).unsqueeze(1)
    return Context(mean, context.log_weight.flatten(1, 2).unsqueeze(1))
