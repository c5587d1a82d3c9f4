"""What each kernel has to do: bytes, operations and numbers, counted from the sizes of its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .gpu_model import Work

if TYPE_CHECKING:
    from .compilation import Launch

__all__ = ["work_of"]


def work_of(launch: Launch) -> Work:
    """What a launch of one of the library's kernels has to do.

    Not part of the paper.
    """
    names = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    tensors = {id(x): x for x in launch.arguments if isinstance(x, torch.Tensor)}
    moved = sum(x.nbytes for x in tensors.values())
    read, operations, numbers, ahead = _COUNTS[launch.kernel.__name__](names, launch.sizes)
    operands = launch.sizes.get("OPERANDS", "ieee")
    # One block is on its way while another is worked on.
    ahead *= max(1, launch.tile.stages - 1)
    return Work(launch.programs, moved, max(read, moved), operations, operands, numbers, ahead)


Counts = tuple[int, int, int, int]


def _tiles(channels: int, tile: int) -> int:
    return -(-channels // tile)


def _operator(
    of: str, products: int, key_reads: int, value_reads: int
) -> Callable[[dict[str, Any], dict[str, Any]], Counts]:
    """Counts of a kernel that goes over positions of ``of``, reading or writing so many blocks of each kind."""

    def count(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
        x = names[of]
        positions, size = x.numel() // x.shape[-1], x.dtype.itemsize
        keys, values = sizes["DK"], sizes["DV"]
        tiles = _tiles(values, sizes["BV"])
        read = positions * size * (key_reads * keys * tiles + value_reads * values)
        ahead = sizes["BN"] * size * (keys + min(1, value_reads) * sizes["BV"])
        return read, 2 * products * positions * keys * values, positions * keys * tiles, ahead

    return count


def _attend(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    read, operations, numbers, _ = _operator("query", 1, 1, 1)(names, sizes)
    # What it writes is not waited for.
    ahead = sizes["BN"] * sizes["DK"] * names["query"].dtype.itemsize
    return read, operations, numbers, ahead


def _sums(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    parts = names["means" if "means" in names else "parts"]
    return parts.nbytes, 0, parts.numel(), sizes["BN"] * sizes["BV"] * parts.dtype.itemsize


def _module(names: dict[str, Any], sizes: dict[str, Any], **units: int) -> Counts:
    """Projections and products of dk x C with every position; ``passes`` over X and over weights, for each tile."""
    x = names["x"]
    size, (batch, channels, length) = x.dtype.itemsize, x.shape
    positions, keys = batch * length, sizes["DK"]
    blocks = batch * _tiles(length, sizes["BN"])
    read = units["passes"] * positions * channels + units["weights"] * blocks * keys * channels
    operations = 2 * units["products"] * positions * keys * channels
    ahead = sizes["BN"] * sizes["BC"] * size
    return read * size, operations, units["numbers"] * positions * keys, ahead


def _pool(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    keys, values = _tiles(sizes["DK"], sizes["BK"]), _tiles(sizes["C"], sizes["BV"])
    return _module(
        names,
        sizes,
        passes=keys * (values + 1),
        weights=values,
        products=values + 1,
        numbers=values,
    )


def _sum_gradient(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    keys, values = _tiles(sizes["GROUPS"], sizes["BG"]), _tiles(sizes["C"], sizes["BV"])
    projections = 1 if sizes["OF"] == "context" else 2
    return _module(
        names,
        sizes,
        passes=keys * (values * projections + 1),
        weights=values * projections,
        products=values * projections + 1,
        numbers=values,
    )


def _output(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    return _module(names, sizes, passes=3, weights=2, products=2, numbers=1)


def _input_gradient(names: dict[str, Any], sizes: dict[str, Any]) -> Counts:
    sides = sizes["ATTENDS"], sizes["ATTENDED"]
    products = 3 * sides[0] + 4 * sides[1]
    passes = 1 + 3 * sides[0] + 2 * sides[1]
    return _module(
        names, sizes, passes=passes, weights=products, products=products, numbers=sum(sides)
    )


_COUNTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Counts]] = {
    "summarize_kernel": _operator("key", 1, 1, 1),
    "summarize_backward_kernel": _operator("key", 2, 2, 2),
    "attend_kernel": _attend,
    "attend_backward_kernel": _operator("query", 2, 2, 1),
    "merge_kernel": _sums,
    "add_kernel": _sums,
    "pool_kernel": _pool,
    "output_kernel": _output,
    "sum_gradient_kernel": _sum_gradient,
    "input_gradient_kernel": _input_gradient,
}
