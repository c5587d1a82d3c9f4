"""Many small Python objects in one buffer.

A list of a million tuples costs a gigabyte in every process: workers that are started afresh copy it, and forked ones
too, a page at a time, as reading an object writes its count of references. One tensor is shared by both.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar, overload

import torch

__all__ = ["Packed"]

T = TypeVar("T")


class Packed(Sequence[T], Generic[T]):
    """A sequence that never changes, pickled item by item into one buffer; an item is made when it is asked for.

    Workers of a ``DataLoader`` share the buffer: forked ones as it is, others because torch sends a tensor to them as a
    handle to shared memory.

    Args:
        items: whatever pickles.

    Example:
        >>> names = Packed(f"{i:06}.jpg" for i in range(1000))
        >>> len(names), names[7]
        (1000, '000007.jpg')
    """

    def __init__(self, items: Iterable[T]) -> None:
        pieces = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = torch.tensor(list(accumulate(map(len, pieces))), dtype=torch.int64)
        whole = bytearray().join(pieces)
        empty = torch.empty(0, dtype=torch.uint8)
        self._bytes = torch.frombuffer(whole, dtype=torch.uint8) if whole else empty

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the items take."""
        return self._bytes.nbytes + self._ends.nbytes

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._bytes[start : int(self._ends[index])].numpy().data)
