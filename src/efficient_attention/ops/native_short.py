"""Short inputs by the native kernels (native/short.c): one call, in which each head is computed at once.

What a call costs beside its arithmetic is Python's, so that sizes and strides are put together once for each shape.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .chunks import SHORTEST, short_chunk_length
from .huge_pages import on_huge_pages
from .layout import empty_output
from .native_calls import DTYPES, LONGEST_IN_CACHE, Argument, Problem, View, address, check, run

__all__ = ["DTYPES", "LONGEST", "attention", "gradients"]

# Queries and keys, each.
LONGEST = SHORTEST
# Keys of the quadratic order: one block of the kernels.
_MOST_QUADRATIC = 64

_TENSORS = ("query", "key", "value", "mask", "output", "d_query", "d_key", "d_value")


class _Short(ctypes.Structure):
    """As in native/short.c."""

    _fields_ = [
        *((name, Problem) for name in ("keys", "queries")),
        *((name, View) for name in _TENSORS),
        ("quadratic", ctypes.c_int64),
    ]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    quadratic: bool,
    library: ctypes.CDLL,
    threads: int,
) -> Callable[..., Tensor]:
    """What computes ``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, for such queries, keys, values and masks.

    Of those here only shapes, strides and dtypes count: they may be on the meta device. ``quadratic``: perhaps in the
    quadratic order.
    """
    like = empty_output(query, value.shape[3])
    shape, strides = like.shape, like.stride()
    given = query, key, value, _spread(key_mask, key), like
    sizes = _sizes(normalization, quadratic, given, threads)
    kernel = library.efficient_attention
    kernel.argtypes = [ctypes.c_void_p] * 6

    def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        output = on_huge_pages(query.new_empty_strided(shape, strides))
        mask = None if key_mask is None else key_mask.data_ptr()
        places = query.data_ptr(), key.data_ptr(), value.data_ptr(), mask, output.data_ptr()
        check(kernel(sizes, *places))
        return output

    return attend


def gradients(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Those of query, key and value, in their dtypes and layouts; ``None`` where ``needs`` is false."""
    inputs = query, key, value
    found = [torch.empty_like(x) if n else None for x, n in zip(inputs, needs, strict=True)]
    given = *inputs, _spread(key_mask, key), d_output, *found
    sizes = _sizes(normalization, False, given, torch.get_num_threads())
    run("efficient_attention_backward", sizes, *map(address, given))
    return tuple(found)


def _spread(key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    # One row or head of a mask is read again for each: its stride is 0.
    return None if key_mask is None else key_mask.expand(key.shape[:3]).unsqueeze(-1)


def _sizes(
    normalization: str, quadratic: bool, given: Sequence[Tensor | None], threads: int
) -> Argument:
    query, _, value, *_ = given
    assert query is not None
    assert value is not None
    kind = query.dtype, normalization, quadratic, threads
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
    *layouts: tuple[int, ...] | None,
) -> Argument:
    batch, heads, queries, key_channels = query
    keys, value_channels = value[2:]
    chunk = short_chunk_length(key_channels, value_channels)
    kinds = {"bfloat16": dtype == torch.bfloat16, "softmax": normalization == "softmax"}
    problems = (
        Problem(
            *(batch, heads, positions, chunk, 1, key_channels, value_channels, 1),
            **kinds,
            # All of the pool, or none of it: what is left over would be ended, and started again for the next.
            threads=threads if batch * heads > 1 or max(queries, keys) > chunk else 1,
            stream=batch * heads * positions * value_channels * dtype.itemsize > LONGEST_IN_CACHE,
        )
        for positions in (keys, queries)
    )
    views = [View(None, *(layout or ())) for layout in layouts]
    views += [View()] * (len(_TENSORS) - len(views))
    return ctypes.byref(_Short(*problems, *views, quadratic and keys <= _MOST_QUADRATIC))
