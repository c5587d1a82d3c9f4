"""How the native kernels (native/*.c) are called: with addresses, strides and sizes, by ctypes.

They allocate nothing but scratch memory: a few blocks for each thread, and on short inputs sums of chunks, or weights
of keys and what is added to gradients. All else is PyTorch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native_build
from .chunks import Sums, sums_of_chunks

Argument = Any  # what ctypes passes on, of types that it keeps to itself

DTYPES = (torch.float32, torch.bfloat16)

# What is longer goes past the caches to memory: nobody would find it there.
LONGEST_IN_CACHE = 8 << 20


class Problem(ctypes.Structure):
    """Sizes, and what is asked for; as in native/blocks.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "positions", "chunk", "together")),
        *((name, c_int64) for name in ("key_channels", "value_channels", "groups")),
        *((name, c_int32) for name in ("bfloat16", "softmax", "stream", "threads")),
    ]


class View(ctypes.Structure):
    """The memory of a tensor ``[B, H, N, D]`` and its strides; as in native/blocks.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "head", "position", "channel")),
    ]


def run(name: str, *arguments: object) -> None:
    """Call a kernel; :class:`MemoryError` where it has no memory for its scratch space."""
    check(getattr(native_build.load(), name)(*arguments))


def check(code: int) -> None:
    """:class:`MemoryError` if a kernel returned that it has no memory for its scratch space."""
    if code != 0:
        raise MemoryError("the native kernels have no memory for their scratch space")


class Sizes(NamedTuple):
    """The sizes of a call: positions of ``x [B, H, N, D]`` in chunks of so many, and channels of keys and values."""

    x: Tensor
    chunk: int
    key_channels: int
    value_channels: int
    normalization: str
    num_groups: int = 1

    def problem(self) -> Argument:
        batch, heads, positions, _ = self.x.shape
        channels = self.key_channels, self.value_channels
        longest = batch * heads * positions * max(channels) * self.x.itemsize
        return byref(
            Problem(
                *(batch, heads, positions, self.chunk, self._sums().together),
                *(*channels, self.num_groups),
                bfloat16=self.x.dtype == torch.bfloat16,
                softmax=self.normalization == "softmax",
                stream=longest > LONGEST_IN_CACHE,
                threads=torch.get_num_threads(),
            )
        )

    def sums(self) -> Tensor:
        """Memory for sums of chunks."""
        return self.x.new_empty(self._sums().numbers, dtype=torch.float32)

    def _sums(self) -> Sums:
        batch, heads, positions, _ = self.x.shape
        channels = self.key_channels, self.value_channels
        return sums_of_chunks(
            *(batch * heads, positions, self.chunk, *channels, 1),
            threads=torch.get_num_threads(),
        )


def view(x: Tensor | None) -> Argument:
    """``[B, H, N, D]``; of None no memory."""
    return byref(View() if x is None else View(x.data_ptr(), *x.stride()))


def mask_view(mask: Tensor | None, shape: Sequence[int]) -> Argument:
    """A mask that broadcasts to ``[B, H, M]``."""
    # One row or head is read again for each: its stride is 0.
    if mask is None:
        return view(None)
    return view(mask.expand(shape).unsqueeze(-1))


def address(x: Tensor | None) -> c_void_p:
    """Where a contiguous tensor lies."""
    return c_void_p(None if x is None else x.data_ptr())
