"""Short problems on a CPU, where starting operators is what costs: few of them, or one kernel, past the dispatcher.

Serves plain tensors that nobody watches, but for gradients. What it does not serve it leaves alone, errors included.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor, is_grad_enabled

from . import native_build, native_short, plain, reference
from .arguments import canonical_mask
from .differentiation import pull_back
from .planner import plain_is_cheaper, quadratic_is_cheaper
from .precision import DTYPES, product_dtype, without_autocast
from .watching import Recent, are_plain, is_followed, nobody_watches, records

_Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]
_Run = Callable[..., Tensor | None]

# How the last calls were computed.
_lately: Recent[_Run] = Recent()


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
    if is_followed():
        return None
    options = normalization, order, backend, fresh, is_grad_enabled(), native_build.is_preferred()
    known = None if key_mask is not None else _lately.find(options, query, key, value)
    if known is not None:
        return known(query, key, value, None)
    if order not in ("auto", "linear") or normalization not in ("softmax", "scaling"):
        return None
    if not are_plain(query, key, value) or (key_mask is not None and not are_plain(key_mask)):
        return None
    recorded = records(query, key, value)
    run = _way(
        *(_library(backend, query, key, value), normalization, order, backend, fresh, recorded),
        (query.dtype, query.shape, query.stride()),
        (key.dtype, key.shape, key.stride()),
        (value.dtype, value.shape, value.stride()),
        key_mask if key_mask is None else (key_mask.dtype, key_mask.shape, key_mask.stride()),
    )
    if run is None:
        return None
    if key_mask is None:
        _lately.add(run, options, query, key, value)
    return run(query, key, value, key_mask)


def _library(backend: str, *inputs: Tensor) -> ctypes.CDLL | None:
    """The kernels, if the call may be theirs: they are preferred, or somebody named them and the machine has them."""
    named = backend == "native"
    if native_build.is_built() if named else native_build.is_preferred():
        return native_build.load()
    # Nothing is compiled for what they do not serve.
    served = named and inputs[0].dtype in native_short.DTYPES and _are_right(*inputs)
    return native_build.load() if served and native_build.why_not() is None else None


@functools.lru_cache(maxsize=4096)
def _way(
    library: ctypes.CDLL | None,
    normalization: str,
    order: str,
    backend: str,
    fresh: bool,
    recorded: bool,
    query_layout: _Layout,
    key_layout: _Layout,
    value_layout: _Layout,
    mask_layout: _Layout | None,
) -> _Run | None:
    """What computes queries, keys, values and a mask of such dtypes, shapes and strides, if it is done here.

    A call is too short to ask all of this each time.
    """
    query, key, value = map(_like, (query_layout, key_layout, value_layout))
    if not _are_right(query, key, value):
        return None
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    sizes = queries, keys, channels, value.shape[3]
    if library is not None and query.dtype in native_short.DTYPES:
        if max(queries, keys) > native_short.LONGEST or not fresh:
            return None
        key_mask = None if mask_layout is None else canonical_mask(_like(mask_layout), key)
        run = native_short.Attention(
            *(query, key, value, key_mask, normalization),
            linear=order == "linear",
            library=library,
        )
        return functools.partial(_differentiable, run) if recorded else run
    dtype = product_dtype(query.dtype, torch.device("cpu"))
    served = plain_is_cheaper(batch * heads, queries, keys, channels, dtype.itemsize, kept=recorded)
    if backend == "native" or mask_layout is not None or not served:
        return None
    quadratic = order == "auto" and quadratic_is_cheaper(*sizes)
    return functools.partial(_plain, normalization, quadratic, dtype)


def _like(layout: _Layout) -> Tensor:
    """A tensor without memory."""
    dtype, shape, strides = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _plain(
    normalization: str,
    quadratic: bool,
    dtype: torch.dtype,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: None,
) -> Tensor | None:
    return plain.efficient_attention(query, key, value, normalization, quadratic, dtype)


def _differentiable(
    kernels: native_short.Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    return _Kernels.apply(kernels, query, key, value, canonical_mask(key_mask, key))


class _Kernels(torch.autograd.Function):
    """The kernels, and theirs for the gradients."""

    @staticmethod
    def forward(ctx, kernels, query, key, value, key_mask):
        ctx.save_for_backward(query, key, value, key_mask)
        ctx.kernels = kernels
        return kernels(query, key, value, key_mask)

    @staticmethod
    def backward(ctx, d_output):
        query, key, value, key_mask = ctx.saved_tensors
        inputs, needs = (query, key, value), ctx.needs_input_grad[1:4]
        kernels = ctx.kernels
        unwatched = kernels.unwatched if key_mask is None and not is_grad_enabled() else None
        if unwatched is not None and not is_followed() and unwatched.find(None, d_output, *inputs):
            return None, *kernels.gradients(d_output, *inputs, None, needs), None
        # Of inputs that nobody had cast, whatever is active by now.
        with without_autocast(d_output.device):
            if not nobody_watches(d_output, *inputs):
                # The gradient itself will be differentiated, or is one of many.
                rest = key_mask, kernels.normalization
                gradients = pull_back(
                    lambda q, k, v: reference.attend(
                        q, reference.summarize(k, v, *rest)[0], rest[1]
                    ),
                    inputs,
                    d_output,
                    needs,
                )
                return None, *gradients, None
            gradients = kernels.gradients(d_output, *inputs, key_mask, needs)
        if unwatched is not None:
            unwatched.add(True, None, d_output, *inputs)
        return None, *gradients, None


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
