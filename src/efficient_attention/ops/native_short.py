"""Short inputs by the native kernels (native/short.c): one call, in which each head is computed at once.

What a call costs beside its arithmetic is Python's, so sizes and strides are put together once for each shape.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import SHORTEST
from .layout import empty_output
from .native_calls import LONGEST_IN_CACHE, Argument, Problem, View, address, run

# Queries and keys, each: what one thread computes of a head without sharing it.
LONGEST = SHORTEST
# Keys of the quadratic order: one block of the kernels.
_MOST_QUADRATIC = 64

_TENSORS = ("query", "key", "value", "mask", "output", "d_query", "d_key", "d_value")
_Layout = tuple[int, ...]


class _Short(ctypes.Structure):
    """As in native/short.c."""

    _fields_ = [
        *((name, Problem) for name in ("keys", "queries")),
        *((name, View) for name in _TENSORS),
        ("quadratic", ctypes.c_int64),
    ]


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    quadratic: bool,
) -> Tensor:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``; ``quadratic``: perhaps in the quadratic order."""
    output = empty_output(query, value.shape[3])
    given = query, key, value, _spread(key_mask, key), output
    sizes = _sizes(normalization, quadratic, given)
    run("efficient_attention", sizes, *map(address, given))
    return output


def efficient_attention_backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, in their dtypes and layouts; ``None`` where ``needs`` is false."""
    inputs = query, key, value
    gradients = [torch.empty_like(x) if n else None for x, n in zip(inputs, needs, strict=True)]
    given = *inputs, _spread(key_mask, key), d_output, *gradients
    sizes = _sizes(normalization, False, given)
    run("efficient_attention_backward", sizes, *map(address, given))
    return tuple(gradients)


def _spread(key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    # One row or head of a mask is read again for each: its stride is 0.
    return None if key_mask is None else key_mask.expand(key.shape[:3]).unsqueeze(-1)


def _sizes(normalization: str, quadratic: bool, given: Sequence[Tensor | None]) -> Argument:
    query, _, value, *_ = given
    assert query is not None
    assert value is not None
    kind = query.dtype, normalization, quadratic, torch.get_num_threads()
    layouts = [None if x is None else x.stride() for x in given]
    return _structure(*kind, query.shape, value.shape, *layouts)


@functools.lru_cache(maxsize=1024)
def _structure(
    dtype: torch.dtype,
    normalization: str,
    quadratic: bool,
    threads: int,
    query: torch.Size,
    value: torch.Size,
    *layouts: _Layout | None,
) -> Argument:
    batch, heads, queries, key_channels = query
    keys, value_channels = value[2:]
    kinds = {"bfloat16": dtype == torch.bfloat16, "softmax": normalization == "softmax"}
    problems = (
        Problem(
            *(batch, heads, positions, LONGEST, 1, key_channels, value_channels, 1),
            **kinds,
            # All of the pool, or none of it: what is left over would be ended, and started again for the next.
            threads=threads if batch * heads > 1 else 1,
            stream=batch * heads * positions * value_channels * dtype.itemsize > LONGEST_IN_CACHE,
        )
        for positions in (keys, queries)
    )
    views = [View(None, *(layout or ())) for layout in layouts]
    views += [View()] * (len(_TENSORS) - len(views))
    return ctypes.byref(_Short(*problems, *views, quadratic and keys <= _MOST_QUADRATIC))
