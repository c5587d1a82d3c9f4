"""Which calls the Triton kernels serve, and in what pieces: blocks, tiles of channels, chunks of a sequence.

This file counts and imports no kernel. A *chunk* is what one program goes through, a *block* what it holds at a time.
Both depend on dtype, heads, channels and length but not on the batch, so that a sample gets the same sums whatever its
batch mates are. Dk and Dv are channels of keys and values.

Tiles are bounded by the registers of a program: none makes a compiler spill (``test_triton_compilation.py``). They were
chosen by that alone; no time was measured on a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Queries are normalized over all of their channels, which one block holds.
MOST_KEY_CHANNELS = 256
# How products take their operands; triton_kernels.py says what each is.
OPERANDS = {torch.bfloat16: "bfloat16", torch.float16: "tf32", torch.float32: "ieee"}

# Programs that a sample is shared out to, where it is long enough: about two for each place on a large GPU.
_PROGRAMS = 1024
# A program's sums are float32, are written and read again, and may have this share of the bytes that it reads.
_SHARE_OF_SUMS = 1 / 8
_SHORTEST_CHUNK = 128
# Numbers of a context that a program holds in its registers.
_MOST_SUMS = {torch.bfloat16: 128 * 128, torch.float16: 128 * 128, torch.float32: 128 * 64}
# Positions of a block beside few sums, beside many, and beside more than 128 key channels.
_POSITIONS = {
    torch.bfloat16: (64, 32, 16),
    torch.float16: (32, 16, 16),
    torch.float32: (16, 16, 16),
}

# The same for a folded module, whose tiles of key channels multiply its programs.
_MODULE_PROGRAMS = 512
_SHARE_OF_MODULE_SUMS = 1 / 2
# Channels of keys in a tile, and channels of X that a projection takes at a time.
_KEY_BLOCK = 64
_DEPTH = {torch.bfloat16: 64, torch.float16: 32, torch.float32: 32}
# Positions of a block for sums, for the output, for gradients of inputs: half of it beside more than 128 key channels.
# Weights are read again for each block, from the second-level cache, which is what long blocks spare.
_MODULE_POSITIONS = {
    torch.bfloat16: (64, 128, 64),
    torch.float16: (32, 32, 16),
    torch.float32: (32, 32, 32),
}


class Tile(NamedTuple):
    """What a program holds at a time, and how it works on it.

    Attributes:
        positions: of a block.
        key_channels: of a block, a power of two.
        value_channels: of a block, a power of two.
        warps: of 32 threads each.
        stages: blocks that are on their way from memory at a time.
        depth: channels that a projection takes at a time.
    """

    positions: int
    key_channels: int
    value_channels: int
    warps: int
    stages: int
    depth: int = 64


# Chunks and numbers of each that are added up at a time.
SUM_TILE = Tile(positions=32, key_channels=1, value_channels=64, warps=4, stages=2)


def why_not(dtype: torch.dtype, key_channels: int, value_channels: int, groups: int) -> str | None:
    """Why the kernels do not serve such a call, or ``None`` if they do."""
    if dtype not in OPERANDS:
        return f"it computes in float16, bfloat16 or float32; got {dtype}"
    if not (key_channels and value_channels):
        return f"it needs channels; got Dk = {key_channels}, Dv = {value_channels}"
    if math.prod(padded_groups(key_channels, groups)) > MOST_KEY_CHANNELS:
        return (
            f"it takes up to {MOST_KEY_CHANNELS} key channels, after number and size of their groups are rounded up to "
            f"powers of two; got Dk = {key_channels}, num_groups = {groups}"
        )
    return None


def why_not_module(dtype: torch.dtype, key_channels: int, channels: int, groups: int) -> str | None:
    """Why the kernels do not serve a folded module of C channels, or ``None`` if they do."""
    # As attending does, they hold all key channels of a block, and values, here X, in tiles.
    return why_not(dtype, key_channels, channels, groups)


def padded_groups(key_channels: int, groups: int) -> tuple[int, int]:
    """How many groups of how many channels a block holds: powers of two, and at least 16 channels together."""
    count = _power_of_two(groups)
    return count, max(_power_of_two(key_channels // groups), 16 // count)


def chunk_length(
    dtype: torch.dtype, heads: int, positions: int, key_channels: int, value_channels: int
) -> int:
    """Positions that one program goes through, a power of two.

    Few enough to fill the device, and so many that the sums of chunks add little to the bytes that are moved.
    """
    read = (key_channels + value_channels) * dtype.itemsize
    written = 4 * key_channels * value_channels
    shortest = max(_SHORTEST_CHUNK, math.ceil(written / (_SHARE_OF_SUMS * read)))
    return _power_of_two(max(shortest, -(-heads * positions // _PROGRAMS)))


def summarize_tile(dtype: torch.dtype, key_channels: int, value_channels: int) -> Tile:
    """For ``summarize``, whose programs take a tile of either's channels."""
    return _tile(dtype, min(128, _padded(key_channels)), value_channels)


def backward_tile(dtype: torch.dtype, key_channels: int, value_channels: int) -> Tile:
    """For both gradients, whose programs hold all key channels, and block and gradient of it at a time."""
    tile = _tile(dtype, _padded(key_channels), value_channels)
    if tile.value_channels < value_channels:
        # A program goes over all tiles, and the loads of each would wait in memory of their own.
        return tile._replace(stages=1)
    return tile


def attend_tile(dtype: torch.dtype, key_channels: int, value_channels: int) -> Tile:
    """For ``attend``, whose programs hold all key channels."""
    return _tile(dtype, _padded(key_channels), value_channels)


def pool_tile(dtype: torch.dtype, key_channels: int, channels: int) -> Tile:
    """For ``pool``, whose programs take a tile of the keys' channels, and all of X's where that is possible."""
    return sum_tile(dtype, min(_KEY_BLOCK, _padded(key_channels)), channels)


def sum_tile(dtype: torch.dtype, key_block: int, channels: int) -> Tile:
    """For sums over positions of a module: ``key_block`` channels of queries or keys by channels of X."""
    value_block = min(_padded(channels), 256, _MOST_SUMS[dtype] // key_block)
    # Wide blocks of keys leave fewer registers for positions.
    positions = _MODULE_POSITIONS[dtype][0] // (1 if key_block <= 64 else 2)
    tile = _module_tile(dtype, key_block, channels, max(16, positions))
    few = key_block * value_block <= 64 * 64
    return tile._replace(value_channels=value_block, warps=4 if few else 8)


def output_tile(dtype: torch.dtype, key_block: int, channels: int) -> Tile:
    """For the output of a module, with all key channels at a time."""
    return _module_tile(dtype, key_block, channels, _MODULE_POSITIONS[dtype][1])


def input_gradient_tile(dtype: torch.dtype, key_block: int, channels: int) -> Tile:
    """For the gradient of a module's input: up to three blocks of all key channels at a time."""
    tile = _module_tile(dtype, key_block, channels, _MODULE_POSITIONS[dtype][2])
    return tile._replace(stages=2)


def _module_tile(dtype: torch.dtype, key_block: int, channels: int, positions: int) -> Tile:
    depth = min(_DEPTH[dtype], _padded(channels))
    positions = positions if key_block <= 128 else max(16, positions // 2)
    # A projection has few steps: more of them are on their way, for one program hardly fills a processor.
    return Tile(positions, key_block, depth, 4 if key_block <= 64 else 8, 3, depth)


def heads_of_tile(groups: int, size: int) -> int:
    """How many of the padded groups of a query's channels a tile holds: as many as there is room for."""
    return min(groups, max(1, _KEY_BLOCK // size))


def module_chunk_length(dtype: torch.dtype, positions: int, key_channels: int) -> int:
    """Positions that one program of a module's sums goes through, a power of two, whatever the batch."""
    # Sums of dk C numbers, of C channels of positions.
    shortest = math.ceil(4 * key_channels / (_SHARE_OF_MODULE_SUMS * dtype.itemsize))
    return _power_of_two(max(_SHORTEST_CHUNK, shortest, -(-positions // _MODULE_PROGRAMS)))


def _tile(dtype: torch.dtype, key_block: int, value_channels: int) -> Tile:
    value_block = min(_padded(value_channels), 128, _MOST_SUMS[dtype] // key_block)
    sums = key_block * value_block
    # As many positions as there are registers for, beside the sums.
    size = 0 if sums <= 64 * 64 else 1 if key_block <= 128 else 2
    positions = _POSITIONS[dtype][size]
    few = 32 * 32 if dtype == torch.float32 else 64 * 64
    return Tile(positions, key_block, value_block, warps=4 if sums <= few else 8, stages=2)


def candidates(tile: Tile) -> list[Tile]:
    """A tile, and those that differ from it in one thing and might be faster: seven at most."""
    changes = (
        *({"positions": n} for n in (2 * tile.positions, tile.positions // 2) if n >= 16),
        *({"warps": n} for n in (2 * tile.warps, tile.warps // 2) if 2 <= n <= 8),
        *({"stages": n} for n in (tile.stages + 1, tile.stages - 1) if n >= 1),
    )
    return [tile, *(tile._replace(**change) for change in changes)]


def _padded(channels: int) -> int:
    """Channels of a block: a power of two, and as many as products need."""
    return max(16, _power_of_two(channels))


def _power_of_two(n: int) -> int:
    """The smallest that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()
