"""Short inputs by the native kernels (native/short.c): one call, in which each head is computed at once.

What a call costs beside its arithmetic is Python's, so that sizes and strides are put together once for each shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from .chunks import SHORTEST, short_chunk_length
from .huge_pages import SMALLEST, on_huge_pages
from .layout import empty_output
from .native_calls import DTYPES, LONGEST_IN_CACHE, Argument, Problem, View, check
from .planner import quadratic_gradients_are_cheaper, quadratic_is_cheaper
from .watching import Recent, empty_strided

__all__ = ["DTYPES", "LONGEST", "Attention"]

# Queries and keys, each.
LONGEST = SHORTEST
# Exponentials, and so many multiply-adds for each of them, of what one thread has done before others are awake.
_LITTLE = 8192
_MULTIPLY_ADDS = 8
# Layouts of outputs' gradients that are known for one of the inputs, at most.
_MOST_KNOWN = 64

_TENSORS = ("query", "key", "value", "mask", "d_query", "d_key", "d_value", "output")


class _Short(ctypes.Structure):
    """As in native/short.c."""

    _fields_ = [
        *((name, Problem) for name in ("keys", "queries")),
        *((name, View) for name in _TENSORS),
        ("quadratic", ctypes.c_int64),
    ]


class Attention:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, and its gradients, for inputs of which only the values are new.

    Args:
        query, key, value, key_mask: of such shapes, strides and dtypes; they may be on the meta device.
        normalization: as in :func:`.functional.efficient_attention`.
        linear: whether the order must be the linear one, or may be the cheaper one of each pass.
        library: the kernels.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        normalization: str,
        *,
        linear: bool,
        library: ctypes.CDLL,
    ) -> None:
        self.normalization, self._linear, self._library = normalization, linear, library
        self._inputs, self._layout = (query, key, value), _layout(query, key, value, key_mask)
        # One row or head of a mask is read again for each: its stride is 0.
        mask = None if key_mask is None else key_mask.expand(key.shape[:3]).unsqueeze(-1)
        output, gradients = (
            empty_output(query, value.shape[3]),
            [*map(torch.empty_like, self._inputs)],
        )
        self._output, *self._gradients = (
            (tuple(x.shape), x.stride(), x.dtype) for x in (output, *gradients)
        )
        self._is_large = output.nbytes >= SMALLEST
        self._views = [*map(_view, (*self._inputs, mask, *gradients))]
        self._known: dict[object, Argument] = {}
        # Gradients of outputs that have come, with inputs, and nobody watched them.
        self.unwatched: Recent[bool] = Recent()
        self._run, self._run_backward = _kernels(library)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        output = empty_strided(*self._output)
        if self._is_large:
            on_huge_pages(output)
        mask = None if key_mask is None else key_mask.data_ptr()
        places = query.data_ptr(), key.data_ptr(), value.data_ptr(), mask, output.data_ptr()
        check(self._run(self._known.get((None, get_num_threads())) or self._sizes(None), *places))
        return output

    def gradients(
        self,
        d_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Those of query, key and value, laid out as they are; ``None`` where ``needs`` is false."""
        inputs = query, key, value, key_mask
        if _layout(*inputs) != self._layout:  # somebody saved copies of them for the backward pass
            of_copies = Attention(
                *inputs, self.normalization, linear=self._linear, library=self._library
            )
            return of_copies.gradients(d_output, *inputs, needs)
        found = [
            on_huge_pages(empty_strided(*layout)) if needed else None
            for layout, needed in zip(self._gradients, needs, strict=True)
        ]
        given = *inputs, *found, d_output
        places = [None if x is None else x.data_ptr() for x in given]
        check(self._run_backward(self._sizes(d_output.stride()), *places))
        return tuple(found)

    def _sizes(self, d_output: tuple[int, ...] | None) -> Argument:
        """What a kernel gets beside places; ``d_output``: strides of the output's gradient, if it is there."""
        asked = d_output, get_num_threads()
        known = self._known.get(asked)
        if known is None:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            known = self._known[asked] = self._structure(*asked)
        return known

    def _structure(self, d_output: tuple[int, ...] | None, threads: int) -> Argument:
        query, _, value = self._inputs
        batch, heads, queries, key_channels = query.shape
        keys, value_channels = value.shape[2:]
        chunk = short_chunk_length(key_channels, value_channels)
        sizes = queries, keys, key_channels, value_channels
        # Of equal orders the quadratic one has fewer steps there.
        if d_output:
            quadratic = quadratic_gradients_are_cheaper(*sizes)
        else:
            quadratic = quadratic_is_cheaper(*sizes, or_equal=True)
        quadratic = quadratic and not self._linear
        cut_up = batch * heads > 1 or max(queries, keys) > chunk
        little = batch * heads * _work(*sizes, quadratic=quadratic) <= _LITTLE
        # All of the pool, or none of it: what is left over would be ended, and started again for the next.
        if little or not cut_up:
            threads = 1
        problems = (
            Problem(
                *(batch, heads, positions, chunk, 1, key_channels, value_channels, 1),
                bfloat16=query.dtype == torch.bfloat16,
                softmax=self.normalization == "softmax",
                stream=batch * heads * positions * value_channels * query.itemsize
                > LONGEST_IN_CACHE,
                threads=threads,
            )
            for positions in (keys, queries)
        )
        output = View(None, *(d_output or self._output[1]))
        return ctypes.byref(_Short(*problems, *self._views, output, quadratic))


def _work(
    queries: int, keys: int, key_channels: int, value_channels: int, *, quadratic: bool
) -> int:
    """What a head takes, about, in one pass and order, in the units of ``_LITTLE``."""
    if quadratic:
        multiply_adds = queries * keys * (key_channels + value_channels)
    else:
        multiply_adds = (queries + keys) * key_channels * value_channels
    return (queries + keys) * key_channels + multiply_adds // _MULTIPLY_ADDS


def _layout(*inputs: Tensor | None) -> list[tuple[int, ...] | None]:
    return [None if x is None else x.stride() for x in inputs]


def _view(x: Tensor | None) -> View:
    """Of a tensor without its memory."""
    return View() if x is None else View(None, *x.stride())


def _kernels(library: ctypes.CDLL) -> tuple[Argument, Argument]:
    """Those for the output and for the gradients, which take sizes and places."""
    forward, backward = library.efficient_attention, library.efficient_attention_backward
    forward.argtypes, backward.argtypes = [ctypes.c_void_p] * 6, [ctypes.c_void_p] * 9
    return forward, backward
