"""Blocks of positions that fit a cache: how to walk over them, and how to add up what they give.

Sums over blocks are taken pairwise, so that their rounding grows with the logarithm of the length. The length of a
block does not depend on the batch: a sample gets the same blocks whatever its batch mates are. (A library of products
may still round a few short ones differently in another batch.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .planner import block_length, maps_per_block

Blocks = Sequence[slice]
T = TypeVar("T")

# exp(x) = 2 ** (x log2(e)): on a CPU PyTorch takes a float32 power of two in a third of the time of an exponential.
_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Maps that are taken together, as slices of the batch and of the heads, and the blocks of their positions."""

    rows: slice
    heads: slice
    blocks: Blocks

    @property
    def positions(self) -> int:
        """Positions of the longest block, of all maps."""
        maps = (self.rows.stop - self.rows.start) * (self.heads.stop - self.heads.start)
        return maps * self.blocks[0].stop


def walk(batch: int, heads: int, positions: int, channels: int, itemsize: int) -> list[Tile]:
    """Tiles that cover so many maps of so many ``channels``; none if there is nothing to cover."""
    length = block_length(channels, itemsize)
    maps = maps_per_block(min(length, positions), channels, itemsize)
    blocks = [slice(start, min(start + length, positions)) for start in range(0, positions, length)]
    # As many samples as fit, or as many heads of one.
    rows, heads_of_one = max(1, maps // max(1, heads)), min(maps, heads)
    return [
        Tile(slice(row, min(row + rows, batch)), slice(h, min(h + heads_of_one, heads)), blocks)
        for row in range(0, batch if blocks else 0, rows)
        for h in range(0, heads, max(1, heads_of_one))
    ]


def fold(combine: Callable[[T, T], T], part: Callable[[slice], T], blocks: Blocks) -> T:
    """``combine`` of ``part`` of every block, pairwise as a balanced tree."""
    if len(blocks) == 1:
        return part(blocks[0])
    half = len(blocks) // 2
    return combine(fold(combine, part, blocks[:half]), fold(combine, part, blocks[half:]))


def exponentials(x: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """``exp(x - shift)``; ``out`` may be x."""
    x = torch.sub(x, shift, out=out)
    return x.exp_() if x.dtype == torch.float64 else x.mul_(_LOG2_E).exp2_()


def add_weighted(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum w v``, shift and ``sum w`` for ``w = exp(k - shift)``: two blocks', relative to the largest key of both."""
    shift = torch.maximum(a[1], b[1])
    for weighted, own, total in (a, b):
        ratio = (own - shift).exp_()
        weighted.mul_(ratio.unsqueeze(-1))
        total.mul_(ratio)
    return a[0].add_(b[0]), shift, a[2].add_(b[2])


def divisor(total: Tensor) -> Tensor:
    """The total weight, or 1 where nothing has any: the heaviest key alone weighs 1, as does each that is counted."""
    return total.clamp(min=1)
