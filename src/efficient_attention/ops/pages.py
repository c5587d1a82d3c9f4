"""Products of stacks of matrices, and memory for blocks that is used again for every block of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Tile
from .layout import is_channel_major
from .precision import accumulation_dtype, product_dtype


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


def product_by_head(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a b`` for all samples and heads, ``[b, H, i, j]``, perhaps into ``out``, of any strides and dtype."""
    if out is None:
        return product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    if is_channel_major(out):
        product_by_head(b.mT, a.mT, out.mT)
    elif out.dtype == a.dtype and _is_a_stack(out):
        product(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    else:
        out.copy_(product_by_head(a, b))
    return out


def _is_a_stack(x: Tensor) -> bool:
    """Whether the samples and heads of ``x [b, H, i, j]`` follow each other at one distance."""
    return 1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)


class Pages:
    """Memory for intermediate results of one block at a time, used again for every block.

    Fresh memory is expensive: the system clears each page of it. Where products are narrower than sums, a page is
    there twice, in the dtype of each.
    """

    def __init__(self, like: Tensor, tiles: Sequence[Tile], channels: int):
        self._like = like
        self._size = channels * max((tile.positions for tile in tiles), default=0)
        self._sums, self._products = (
            accumulation_dtype(like.dtype),
            product_dtype(like.dtype, like.device),
        )
        self._pages: dict[tuple[int, torch.dtype], Tensor] = {}

    def _page(self, page: int, dtype: torch.dtype) -> Tensor:
        if (page, dtype) not in self._pages:
            self._pages[page, dtype] = self._like.new_empty(self._size, dtype=dtype)
        return self._pages[page, dtype]

    def factor(self, x: Tensor) -> Tensor:
        """A tensor in the dtype of products: itself, unless they are wider than inputs."""
        return x.to(self._products)

    def write_product(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        onto: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """``onto + a b + bias`` for rows a into ``out``, of the dtype of inputs; factors have that of products."""
        is_there = out.dtype == self._products
        result = product(a, b, onto, out if is_there else None)
        if bias is not None:
            result.add_(bias.unsqueeze(-1))
        if not is_there:
            out.copy_(result)

    @property
    def _is_one(self) -> bool:
        """Whether products are as wide as sums, so that a page is there once."""
        return self._sums == self._products

    def product(self, page: int, a: Tensor, b: Tensor) -> Tensor:
        """``a b`` of stacks, in the dtype of sums, on a page."""
        shape = (b.shape[0], a.shape[-2], b.shape[2])
        narrow = _view(self._page(page, self._products), shape)
        product(a, b, out=narrow)
        return narrow if self._is_one else self.wide(page, shape).copy_(narrow)

    def product_by_head(self, page: int, a: Tensor, b: Tensor, onto: Tensor) -> Tensor:
        """``a b`` for all samples and heads in the dtype of sums: where it goes in the end, or on a page like it."""
        if onto.dtype == self._sums:
            return product_by_head(a, b, onto)
        narrow = self.narrow_like(page, onto)
        product_by_head(a, b, narrow)
        return narrow if self._is_one else self.like(page, onto).copy_(narrow)

    def wide(self, page: int, shape: Sequence[int]) -> Tensor:
        return _view(self._page(page, self._sums), shape)

    def like(self, page: int, block: Tensor) -> Tensor:
        """A page in the dtype of sums, and in the memory order of a block ``[b, H, n, D]``."""
        return _view_like(self._page(page, self._sums), block)

    def narrow_like(self, page: int, block: Tensor) -> Tensor:
        """The same in the dtype of products."""
        return _view_like(self._page(page, self._products), block)

    def narrowed(self, page: int, x: Tensor) -> Tensor:
        """What is on a page in the dtype of sums, in that of products."""
        return x if self._is_one else self.narrow_like(page, x).copy_(x)


def _view(page: Tensor, shape: Sequence[int]) -> Tensor:
    return page[: math.prod(shape)].view(shape)


def _view_like(page: Tensor, block: Tensor) -> Tensor:
    if is_channel_major(block):
        return _view(page, block.mT.shape).mT
    return _view(page, block.shape)
