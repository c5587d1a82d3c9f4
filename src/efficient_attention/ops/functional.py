"""The public functions: documented, checked and defaulted here, once, for every implementation.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, blocked, library, native_launch, reference, short
from .arguments import (
    canonical_mask,
    check_attention_shapes,
    check_like,
    check_option,
    check_out,
    check_shape,
    check_size,
    check_tensor,
)
from .context import Context
from .layout import share_memory
from .limits import refuse_impossible_map
from .planner import OPERATOR_ORDERS, cheapest, operator_costs
from .precision import DTYPES, accumulation_dtype, autocast_is_on
from .watching import nobody_watches

__all__ = ["attend", "dot_product_attention", "efficient_attention", "summarize"]

NORMALIZATIONS = ("softmax", "scaling")
BACKENDS = ("auto", "reference", "blocked", "native", "triton")
# Their order is the linear one; "native" takes what is cheaper for short inputs, unless an order is named.
LINEAR_BACKENDS = ("blocked", "native", "triton")


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    normalization: str = "softmax",
    order: str = "auto",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Global attention with memory and time linear in the number of positions: ``rho_q(Q) (rho_k(K)^T V)``.

    ``normalization="softmax"``: rho_q is a softmax over the channels of each query, rho_k over the positions of
    each key channel. ``"scaling"``: the products are divided by the number of keys, and the result equals that of
    dot-product attention with scaling. Positions carry no order: permuting keys and values together changes nothing.

    Args:
        query: ``[B, H, N, Dk]``, float16, bfloat16, float32 or float64, any strides.
        key: ``[B, H, M, Dk]``, dtype and device of ``query``.
        value: ``[B, H, M, Dv]``, dtype and device of ``query``.
        key_mask: bool, ``[B, M]`` or ``[B, H, M]``, B and H perhaps 1; True = attend. Masked positions may hold
            anything. A query whose every key is masked gets 0. An N x M mask, an additive bias and dropout on the
            weights have no linear form: there is no N x M map to apply them to.
        normalization: ``"softmax"`` or ``"scaling"``.
        order: ``"linear"``, ``"quadratic"`` (``(rho_q(Q) rho_k(K)^T) V``, the same values, cheaper for fewer than
            about ``2 Dk Dv / (Dk + Dv)`` positions) or ``"auto"``: the one with fewer multiply-adds; of equals the
            linear one, or by the kernels in C, which have both for short inputs, the quadratic one. A program that is
            compiled, exported or traced serves every length, so ``"auto"`` is ``"linear"`` there.
        backend: ``"triton"`` (one pass over memory, on NVIDIA GPUs), ``"native"`` (one pass, on CPUs, by kernels that
            the C compiler of the machine makes when they are first named: :func:`build_native`; ``"auto"`` takes them
            from then on), ``"blocked"`` (bounded memory, any device), ``"reference"`` (the plain equations) or
            ``"auto"``: what serves the tensors best; second derivatives, forward mode and ``torch.func`` always work.
        out: where to write the result, ``[B, H, N, Dv]``, dtype and device of ``query`` (under autocast, its dtype):
            memory that is there already, such as that of the last call, or that of an input. No gradients are recorded.

    Returns:
        ``[B, H, N, Dv]`` in ``query.dtype``, ``out`` if it was given. Sums are kept in float32 (float64 for float64
        inputs); bfloat16 is multiplied as it is where the device does, and PyTorch's products of it are rounded to it.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices or dtypes do not fit together, or an option is unknown.
        NotImplementedError: a backend that was named cannot serve the call.
        MemoryError: ``order="quadratic"`` was named, and its N x M map is more than the device has.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 4096, 32) for _ in range(3))
        >>> efficient_attention.efficient_attention(q, k, v).shape
        torch.Size([2, 8, 4096, 32])

    Paper: Shen et al. 2021, Sec. 3.2.
    """
    if backend in ("auto", "native"):
        options = normalization, order, backend
        fresh = out is None
        output = short.efficient_attention(query, key, value, key_mask, *options, fresh=fresh)
        if output is not None:
            if out is None:
                return output
            check_out(out, query, value.shape[3], key, value)
            return out.copy_(output)
    check_option("order", order, ("auto", *OPERATOR_ORDERS))
    check_option("backend", backend, BACKENDS)
    check_option("normalization", normalization, NORMALIZATIONS)
    query, key, value = _autocast(query, key, value)
    check_attention_shapes(query, key, value)
    mask = canonical_mask(key_mask, key)
    if out is not None:
        check_out(out, query, value.shape[3], key, value)
    if order == "auto":
        order = "linear"
        if backend not in LINEAR_BACKENDS:
            order = cheapest_order(
                heads=query.shape[1],
                queries=query.shape[2],
                keys=key.shape[2],
                key_channels=key.shape[3],
                value_channels=value.shape[3],
            )
    if order == "linear":
        run_summarize, run_attend = _operators(backend, query, key, value)
        mean, *_ = run_summarize(key, value, mask, normalization)
        return _into(out, run_attend, query, mean, normalization, 1)
    if backend in LINEAR_BACKENDS:
        raise NotImplementedError(
            f"backend={backend!r} computes order='linear' only; for order='quadratic' use backend='auto'"
        )
    itemsize = accumulation_dtype(query.dtype).itemsize
    refuse_impossible_map(query, key, itemsize=itemsize, way_out="Use order='linear'")
    return _into(out, reference.quadratic, query, key, value, mask, normalization)


def summarize(
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    normalization: str = "softmax",
    backend: str = "auto",
) -> Context:
    """Reduce keys and values to their :class:`Context`, ``rho_k(K)^T V``, in one pass: its size is independent of M.

    Contexts of parts of the keys merge into the context of all of them (:meth:`Context.merge`).

    Args:
        key: ``[B, H, M, Dk]``, float16, bfloat16, float32 or float64, any strides; M may be 0.
        value: ``[B, H, M, Dv]``, dtype and device of ``key``.
        key_mask: bool, ``[B, M]`` or ``[B, H, M]``, B and H perhaps 1; True = attend.
        normalization: ``"softmax"`` or ``"scaling"``.
        backend: as in :func:`efficient_attention`.

    Returns:
        ``Context(mean [B, H, Dk, Dv], log_weight [B, H, Dk])`` in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`efficient_attention`.

    Example:
        >>> memory = efficient_attention.summarize(torch.randn(1, 4, 77, 16), torch.randn(1, 4, 77, 16))
        >>> memory.mean.shape
        torch.Size([1, 4, 16, 16])

    Paper: Shen et al. 2021, Sec. 3.2; the channels of ``rho_k(K)`` are the template attention maps of Sec. 3.4.
    """
    check_option("backend", backend, BACKENDS)
    check_option("normalization", normalization, NORMALIZATIONS)
    key, value = _autocast(key, value)
    check_tensor("key", key)
    check_tensor("value", value)
    check_like("value", value, "key", key)
    check_shape("value", value, (*key.shape[:3], None), "[B, H, M, Dv]", "key's B, H, M")
    mask = canonical_mask(key_mask, key)
    run, _ = _operators(backend, key, value)
    mean, log_weight, *_ = run(key, value, mask, normalization)
    return Context(mean, log_weight)


def attend(
    query: Tensor,
    context: Context,
    *,
    normalization: str = "softmax",
    num_groups: int = 1,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Let queries attend to a context: ``rho_q(Q) C``, in one pass over the queries.

    Args:
        query: ``[B, H, N, Dk]``, float16, bfloat16, float32 or float64, any strides; N may be 0.
        context: as :func:`summarize` returns it, on the device of ``query``.
        normalization: the one that the context was summarized with, which it does not tell: nothing checks this.
        num_groups: the softmax runs within each of this many equal groups of a query's channels. With the contexts
            of G heads stacked along Dk this returns the sum of the heads' outputs, without ever holding them apart.
        backend: as in :func:`efficient_attention`.
        out: where to write the result, as in :func:`efficient_attention`.

    Returns:
        ``[B, H, N, Dv]`` in ``query.dtype``, ``out`` if it was given.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`efficient_attention`.

    Example:
        >>> memory = efficient_attention.summarize(torch.randn(1, 4, 77, 16), torch.randn(1, 4, 77, 16))
        >>> efficient_attention.attend(torch.randn(1, 4, 1000, 16), memory).shape
        torch.Size([1, 4, 1000, 16])

    Paper: Shen et al. 2021, Sec. 3.2.
    """
    check_option("backend", backend, BACKENDS)
    check_option("normalization", normalization, NORMALIZATIONS)
    (query,) = _autocast(query)
    check_tensor("query", query)
    if not isinstance(context, Context):
        raise TypeError(f"context must be a Context; got {type(context).__name__}")
    mean = context.mean
    check_shape(
        "context.mean",
        mean,
        (*query.shape[:2], query.shape[3], None),
        "[B, H, Dk, Dv]",
        "query's B, H, Dk",
    )
    dtype = accumulation_dtype(query.dtype)
    if mean.dtype != dtype or mean.device != query.device:
        raise ValueError(
            f"context must be {dtype} on {query.device} for a query of {query.dtype}; "
            f"got {mean.dtype} {mean.device}"
        )
    check_size("num_groups", num_groups)
    if query.shape[-1] % num_groups:
        raise ValueError(f"num_groups must divide query's Dk = {query.shape[-1]}; got {num_groups}")
    if out is not None:
        check_out(out, query, mean.shape[3], mean)
    _, run = _operators(backend, query, mean)
    return _into(out, run, query, mean, normalization, num_groups)


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    normalization: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    """The attention that efficient attention replaces, ``rho(Q K^T) V``: the baseline, quadratic in the positions.

    ``normalization="softmax"`` goes through ``F.scaled_dot_product_attention``, so the baseline is the fastest that
    PyTorch has. ``"scaling"`` divides the products by the number of keys and equals
    ``efficient_attention(..., normalization="scaling")``.

    Args:
        query: ``[B, H, N, Dk]``.
        key: ``[B, H, M, Dk]``, dtype and device of ``query``.
        value: ``[B, H, M, Dv]``, dtype and device of ``query``.
        key_mask: bool, ``[B, M]`` or ``[B, H, M]``, B and H perhaps 1; True = attend. A query whose every key is
            masked gets 0.
        normalization: ``"softmax"`` or ``"scaling"``.
        scale: factor on ``Q K^T`` before the softmax. 1 is the paper's equation; transformers use ``Dk ** -0.5``.

    Returns:
        ``[B, H, N, Dv]`` in ``query.dtype``.

    Raises:
        TypeError, ValueError: as :func:`efficient_attention`; ValueError also for ``scale`` with ``"scaling"``.
        MemoryError: the N x M map of ``"scaling"`` is more than the device has.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 256, 32) for _ in range(3))
        >>> efficient_attention.dot_product_attention(q, k, v).shape
        torch.Size([2, 8, 256, 32])

    Paper: Shen et al. 2021, Sec. 3.1.
    """
    check_option("normalization", normalization, NORMALIZATIONS)
    if normalization == "scaling" and scale != 1.0:
        raise ValueError(f"scale must be 1 with normalization='scaling'; got {scale}")
    query, key, value = _autocast(query, key, value)
    check_attention_shapes(query, key, value)
    mask = canonical_mask(key_mask, key)
    if mask is not None:
        key = key.masked_fill(~mask.unsqueeze(-1), 0)
        value = value.masked_fill(~mask.unsqueeze(-1), 0)
    if normalization == "scaling":
        way_out = (
            "efficient_attention(..., normalization='scaling') gives the same values without it"
        )
        refuse_impossible_map(query, key, itemsize=query.element_size(), way_out=way_out)
        count = key.shape[-2] if mask is None else mask.sum(-1)[..., None, None]
        count = torch.as_tensor(count, device=key.device).clamp(min=1)
        return (query @ (key / count).to(key.dtype).mT) @ value
    return _fused_softmax_attention(query, key, value, mask, scale)


def _fused_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    # The fused kernels want unit strides and Dk = Dv, and take an N x M map without a word where they get neither;
    # channels of zeros change no product.
    value_channels = value.shape[-1]
    channels = max(key.shape[-1], value_channels)
    query, key, value = (
        x.contiguous() if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1]))
        for x in (query, key, value)
    )
    attended = None
    if mask is not None:
        # A row of which nothing is left attends to zeros, which its keys and values are.
        mask = mask | ~mask.any(-1, keepdim=True)
        attended = mask.unsqueeze(-2)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attended, scale=scale)
    return output[..., :value_channels]


def serves_every_length() -> bool:
    """Whether what runs now is being recorded, to run for other lengths too: compiled, exported or traced."""
    return torch.compiler.is_compiling() or is_traced()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` is recording, to which no Python operator and no comparison of sizes is known."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def cheapest_order(
    *, heads: int, queries: int, keys: int, key_channels: int, value_channels: int
) -> str:
    """What ``order="auto"`` is for these sizes; shared with the modules."""
    if serves_every_length():
        return "linear"
    costs = operator_costs(
        heads=heads,
        queries=queries,
        keys=keys,
        key_channels=key_channels,
        value_channels=value_channels,
    )
    return cheapest(costs)


def _operators(backend: str, *tensors: Tensor) -> tuple[Callable, Callable]:
    """The ``summarize`` and ``attend`` that serve the call; an error if a backend was named that cannot."""
    if backend == "reference":
        return reference.summarize, reference.attend
    if backend in ("auto", "blocked") and nobody_watches(*tensors):
        # What the dispatcher would come to.
        implementation = backends.on_cpu(tensors[0]) if backend == "auto" else blocked
        return implementation.summarize, implementation.attend
    reason = library.serves_plain_tensors_only()
    if reason is not None and backend != "auto":
        raise NotImplementedError(f"backend={backend!r}: {reason}; use backend='auto'")
    # A program that is exported or traced must run where this package is not installed.
    recorded = torch.compiler.is_exporting() or is_traced()
    if reason is not None or (backend == "auto" and recorded):
        return reference.summarize, reference.attend
    named = {"backend": backend}
    return partial(library.summarize, **named), partial(library.attend, **named)


def _into(out: Tensor | None, run: Callable, *args: Any) -> Tensor:
    """The result of an implementation, written to ``out`` if there is any."""
    if out is None:
        return run(*args)
    if run not in (blocked.attend, native_launch.attend) or out.is_inference():
        return out.copy_(run(*args))
    query, _, normalization, _ = args
    # A block of queries is read before it is written over, unless it is multiplied where it lies.
    same = out.data_ptr() == query.data_ptr() and out.stride() == query.stride()
    if share_memory(out, query) and not (same and normalization == "softmax"):
        return out.copy_(run(*args))
    run(*args, out=out)
    torch.autograd.graph.increment_version(out)
    return out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of ``F.scaled_dot_product_attention``."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocast_is_on(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.dtype in DTYPES and x.dtype != torch.float64
        else x
        for x in tensors
    )
