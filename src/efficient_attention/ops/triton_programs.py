"""How kernels are run: programs on the device of a tensor, masks as bytes, sums of what chunks have left.

Nothing here waits for the device or looks at a value, and all memory comes from torch, so that calls can be captured
in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from . import tuning
from .tiling import OPERANDS, SUM_TILE, Tile
from .triton_blocks import OutOfResources

Contexts = tuple[Tensor, Tensor, Tensor, Tensor]


def launch(
    kernel: Any,
    x: Tensor,
    programs: int | Callable[[Tile], int],
    tile: Tile,
    *arguments: Any,
    repeatable: bool = True,
    **sizes: Any,
) -> None:
    """Run so many programs of a kernel on the device of ``x``, in blocks of the tile's positions.

    ``repeatable``: it writes over nothing that it reads.
    """

    def number(tile: Tile) -> int:
        return programs if isinstance(programs, int) else programs(tile)

    def run_in(tile: Tile) -> None:
        run(kernel, number(tile), tile, arguments, {"BN": tile.positions, **sizes})

    if not number(tile):
        return
    with torch.cuda.device_of(x):
        if tuning.is_on():
            kind = _kind(kernel, number(tile), arguments, sizes)
            repeated = run_in if repeatable else None
            tile = tuning.chosen(tile, kind, x.device, repeated, OutOfResources)
        run_in(tile)


def _kind(
    kernel: Any, programs: int, arguments: Sequence[Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    """What tells calls of a kernel apart that may want other tiles."""
    tensors = [str(x.dtype) for x in arguments if isinstance(x, Tensor)]
    ones = [i for i, x in enumerate(arguments) if isinstance(x, int) and x == 1]
    size = programs.bit_length()
    return {"kernel": kernel.__name__, "size": size, "tensors": tensors, "ones": ones, **sizes}


def run(
    kernel: Any, programs: int, tile: Tile, arguments: Sequence[Any], sizes: dict[str, Any]
) -> None:
    """What every launch comes to."""
    kernel[(programs,)](*arguments, **sizes, num_warps=tile.warps, num_stages=tile.stages)


def arithmetic(x: Tensor, normalization: str) -> dict[str, Any]:
    """What the kernels of a call have to know of its arithmetic."""
    return {"SOFTMAX": normalization == "softmax", "OPERANDS": OPERANDS[x.dtype]}


def count(whole: int, part: int) -> int:
    """How many parts a whole has, the last of which need not be full."""
    return -(-whole // part)


def mask_bytes(
    mask: Tensor | None, shape: Sequence[int], like: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """A mask as bytes, and strides that repeat it to a shape; anything if there is none."""
    if mask is None:
        return like, (0,) * len(shape)
    repeated = mask.expand(shape).view(torch.uint8)
    return repeated, repeated.stride()


def merged(parts: Contexts) -> Contexts:
    """The context of all chunks, ``[B, H, ...]``, from those of each, ``[B, H, chunks, ...]``.

    Mean ``[..., Dk, Dv]`` and log_weight, shift, total ``[..., Dk]``.
    """
    mean, log_weight, shift, total = parts
    batch, heads, chunks, key_channels, value_channels = mean.shape
    whole = parts
    if chunks > 1:
        whole = empty_contexts(mean, (batch, heads, 1, key_channels), value_channels)
        tiles = count(value_channels, SUM_TILE.value_channels)
        launch(
            kernels.merge_kernel,
            mean,
            batch * heads * key_channels * tiles,
            SUM_TILE,
            *(mean, shift, total, *whole, chunks),
            DK=key_channels,
            DV=value_channels,
            BV=SUM_TILE.value_channels,
        )
    mean, log_weight, shift, total = (x.squeeze(2) for x in whole)
    return mean, log_weight, shift, total


def empty_contexts(like: Tensor, shape: Sequence[int], value_channels: int) -> Contexts:
    """Memory for mean ``[*shape, Dv]`` and log_weight, shift, total ``[*shape]``, in float32."""
    mean = like.new_empty(*shape, value_channels, dtype=torch.float32)
    log_weight, shift, total = (like.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return mean, log_weight, shift, total


def added(parts: Tensor) -> Tensor:
    """The sums over chunks of ``[n, chunks, ...]``, in their order."""
    whole = parts[:, 0]
    if parts.shape[1] > 1:
        whole = torch.empty_like(whole, memory_format=torch.contiguous_format)
        size = whole[0].numel()
        launch(
            kernels.add_kernel,
            parts,
            parts.shape[0] * count(size, SUM_TILE.value_channels),
            SUM_TILE,
            *(parts, whole, parts.shape[1], size),
            BV=SUM_TILE.value_channels,
        )
    return whole
