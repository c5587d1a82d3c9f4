"""Products of stacks of matrices, and memory for them that is used again for every block of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import accumulation_dtype


def product(a: Tensor, b: Tensor, onto: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``onto + a b`` for every matrix b of a stack; a is a stack too, or one for all. ``out`` may be ``onto``."""
    if b.shape[0] == 1:
        # Faster than a stack of one, in low precision by far.
        a, b = (a if a.dim() == 2 else a[0]), b[0]
        onto, out = (None if x is None else x[0] for x in (onto, out))
        result = torch.mm(a, b, out=out) if onto is None else torch.addmm(onto, a, b, out=out)
        return result.unsqueeze(0)
    a = a.expand(b.shape[0], -1, -1)
    return torch.bmm(a, b, out=out) if onto is None else torch.baddbmm(onto, a, b, out=out)


class Pages:
    """Memory for projections of one block at a time, used again for every block.

    Fresh memory is expensive: the system clears each page of it. In low precision a page is there twice, in the dtype
    of the products and in that of sums.
    """

    def __init__(self, like: Tensor, tiles: list, channels: int, count: int = 1):
        sizes = [(rows.stop - rows.start) * blocks[0].stop for rows, blocks in tiles]
        size = channels * max(sizes, default=0)
        dtype = accumulation_dtype(like.dtype)
        self._wide = [like.new_empty(size, dtype=dtype) for _ in range(count)]
        self._narrow = self._wide
        if dtype != like.dtype:
            self._narrow = [like.new_empty(size) for _ in range(count)]

    def product(self, page: int, a: Tensor, b: Tensor) -> Tensor:
        """``a b`` in the dtype of sums, on a page."""
        shape = (b.shape[0], a.shape[-2], b.shape[2])
        narrow = _view(self._narrow[page], shape)
        product(a, b, out=narrow)
        return narrow if self._narrow is self._wide else self.wide(page, shape).copy_(narrow)

    def wide(self, page: int, shape: Sequence[int]) -> Tensor:
        return _view(self._wide[page], shape)

    def narrowed(self, page: int, x: Tensor) -> Tensor:
        """What :meth:`product` gave, changed since, in the dtype of products."""
        return x if self._narrow is self._wide else _view(self._narrow[page], x.shape).copy_(x)


def _view(page: Tensor, shape: Sequence[int]) -> Tensor:
    return page[: math.prod(shape)].view(shape)
