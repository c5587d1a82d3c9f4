"""Short inputs by the native kernels (native/short.c): one call, in which each head is computed at once.

What a call costs beside its arithmetic is Python's, so sizes and strides are put together once for each shape.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .chunks import SHORTEST
from .layout import empty_output
from .native_calls import Argument, Problem, View, address, run

# Queries and keys, each: what one thread computes of a head without sharing it.
LONGEST = SHORTEST
# Keys of the quadratic order: one block of the kernels.
_MOST_QUADRATIC = 64

_Layout = tuple[int, ...]


class _Short(ctypes.Structure):
    """As in native/short.c."""

    _fields_ = [
        *((name, Problem) for name in ("keys", "queries")),
        *((name, View) for name in ("query", "key", "value", "mask", "output")),
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
    # One row or head of a mask is read again for each: its stride is 0.
    mask = None if key_mask is None else key_mask.expand(key.shape[:3]).unsqueeze(-1)
    sizes = _sizes(
        *(query.shape, key.shape[2], value.shape[3], query.dtype, normalization, quadratic),
        *(query.stride(), key.stride(), value.stride(), None if mask is None else mask.stride()),
        *(output.stride(), torch.get_num_threads()),
    )
    run("efficient_attention", sizes, *map(address, (query, key, value, mask, output)))
    return output


@functools.lru_cache(maxsize=1024)
def _sizes(
    shape: torch.Size,
    keys: int,
    value_channels: int,
    dtype: torch.dtype,
    normalization: str,
    quadratic: bool,
    query: _Layout,
    key: _Layout,
    value: _Layout,
    mask: _Layout | None,
    output: _Layout,
    threads: int,
) -> Argument:
    batch, heads, queries, key_channels = shape
    kinds = {"bfloat16": dtype == torch.bfloat16, "softmax": normalization == "softmax"}
    problems = (
        Problem(
            *(batch, heads, positions, LONGEST, key_channels, value_channels, 1),
            **kinds,
            threads=min(threads, max(1, batch * heads)),
        )
        for positions in (keys, queries)
    )
    views = (View(None, *(stride or ())) for stride in (query, key, value, mask, output))
    return ctypes.byref(_Short(*problems, *views, quadratic and keys <= _MOST_QUADRATIC))
