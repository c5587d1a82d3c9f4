"""Short problems on a CPU, where starting operators is what costs: few of them, or one kernel, past the dispatcher.

Serves plain tensors that nobody watches, but for gradients. What it does not serve it leaves alone, errors included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native_launch, native_short, plain, reference
from .arguments import canonical_mask
from .differentiation import pull_back
from .planner import plain_is_cheaper, quadratic_is_cheaper
from .precision import DTYPES, product_dtype, without_autocast
from .watching import are_plain, nobody_watches, records


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    order: str,
    backend: str,
    *,
    fresh: bool = True,
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, in the order named or with fewer multiply-adds; or ``None``.

    ``fresh``: whether the caller wants new memory. Where he has his own, the kernels of long inputs write into it.
    """
    given = (query, key, value) if key_mask is None else (query, key, value, key_mask)
    if order not in ("auto", "linear") or normalization not in ("softmax", "scaling"):
        return None
    if not (are_plain(*given) and _are_right(query, key, value)):
        return None
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    quadratic = order == "auto" and quadratic_is_cheaper(queries, keys, channels, value.shape[3])
    recorded = records(query, key, value)
    if _goes_to_kernels(query, backend):
        if max(queries, keys) > native_short.LONGEST or not fresh:
            return None
        arguments = query, key, value, canonical_mask(key_mask, key), normalization, quadratic
        run = _Kernels.apply if recorded else native_short.efficient_attention
        return run(*arguments)
    if backend == "native" or key_mask is not None:
        return None
    itemsize = product_dtype(query.dtype).itemsize
    if plain_is_cheaper(batch * heads, queries, keys, channels, itemsize, kept=recorded):
        return plain.efficient_attention(query, key, value, normalization, quadratic)
    return None


class _Kernels(torch.autograd.Function):
    """The kernels, and theirs for the gradients."""

    @staticmethod
    def forward(ctx, query, key, value, key_mask, normalization, quadratic):
        ctx.save_for_backward(query, key, value, key_mask)
        ctx.normalization = normalization
        return native_short.efficient_attention(
            query, key, value, key_mask, normalization, quadratic
        )

    @staticmethod
    def backward(ctx, d_output):
        # Of inputs that nobody had cast, whatever is active by now.
        with without_autocast(d_output.device):
            return _Kernels._gradients(ctx, d_output)

    @staticmethod
    def _gradients(ctx, d_output):
        query, key, value, key_mask = ctx.saved_tensors
        inputs = query, key, value
        needs = ctx.needs_input_grad[:3]
        if nobody_watches(d_output, *inputs):
            gradients = native_short.efficient_attention_backward(
                d_output, *inputs, key_mask, ctx.normalization, needs
            )
        else:  # the gradient itself will be differentiated, or is one of many
            rest = key_mask, ctx.normalization
            gradients = pull_back(
                lambda q, k, v: reference.attend(q, reference.summarize(k, v, *rest)[0], rest[1]),
                inputs,
                d_output,
                needs,
            )
        return *gradients, None, None, None


def _goes_to_kernels(query: Tensor, backend: str) -> bool:
    if backend == "native":
        return native_launch.why_not(query) is None
    return native_launch.is_preferred(query)


def _are_right(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the arguments are what they must be, and there are keys."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return False
    batch, heads, _, channels = query.shape
    keys, dtype = key.shape[2], query.dtype
    return (
        key.shape == (batch, heads, keys, channels)
        and value.shape[:3] == (batch, heads, keys)
        and keys > 0
        and dtype in DTYPES
        and dtype == key.dtype == value.dtype
    )
