"""Large fresh memory on large pages, where the system has them.

The first write to each page of fresh memory interrupts the program while the system clears the page. With pages of
4 KiB that takes longer than to compute what is written; Linux has pages of 2 MiB for those who ask. What is asked of it
is what PyTorch asks for all memory under ``THP_MEM_ALLOC_ENABLE=1``.

Not for channel-major maps: a block of positions is a piece of every row there, large pages keep the rows at their
distance, and where that is a power of two the pieces fight for the same lines of a cache. Small pages scatter them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

# From here on the C library gets memory for a tensor from the system, and gives it back with the tensor; what is asked
# for concerns nothing else.
SMALLEST = 32 << 20
_ADVICE = 14  # MADV_HUGEPAGE


def on_huge_pages(x: Tensor) -> Tensor:
    """``x``, of which nothing has been written yet, on large pages if it is large, on a CPU, and the system has any."""
    if type(x) is Tensor and x.is_cpu and x.nbytes >= SMALLEST and not _has_long_rows(x):
        advise = _advise()
        if advise is not None:
            start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            # Advice: a system that does not know it says so, and nothing is lost.
            advise(start, end - start, _ADVICE)
    return x


def _has_long_rows(x: Tensor) -> bool:
    rows = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride == 1)
    return any(size * x.itemsize > mmap.PAGESIZE for size in rows)


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
