"""How the native kernels cut up their work: chunks of positions, each with sums of its own.

Threads take chunks as they come; how many there are follows from the sizes alone, and so does the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

# Chunks of one head, at most; and of one sample of a module, whose sums are larger.
MOST = 64
MOST_OF_MODULE = 32
# Positions of a chunk of the operator, at least; and of short inputs and of a module, where a position is more work.
SHORTEST = 2048
SHORTEST_OF_MODULE = 256
_SHORTEST_OF_SHORT = 256
# The numbers of a context whose sums may be there for every so many positions of short inputs.
_SMALL_CONTEXT = 128 * 256

# Sums of as many heads or samples are in memory at a time as take no more numbers than this, or have so many chunks for
# each thread, so that they do not grow with the batch.
_NUMBERS_AT_A_TIME = 2 << 20
_CHUNKS_OF_A_THREAD = 4
# Sums are padded to whole vectors, of at most so many numbers.
_LANES = 16


def chunk_length(positions: int) -> int:
    """Positions of a chunk of one head, in the operator."""
    return SHORTEST * max(1, _ceil(positions, MOST * SHORTEST))


def module_chunk_length(positions: int, key_channels: int, itemsize: int) -> int:
    """The same for a module: beyond eight, their sums ``[dk, C]`` in float32 take at most a sixteenth of X."""
    most = min(max(8, positions * itemsize // (64 * key_channels)), MOST_OF_MODULE)
    return SHORTEST_OF_MODULE * max(1, _ceil(positions, most * SHORTEST_OF_MODULE))


def short_chunk_length(key_channels: int, value_channels: int) -> int:
    """The same for inputs of up to ``SHORTEST`` positions; sums of a head's chunks are no more than about 1 MiB."""
    times = _ceil(key_channels * value_channels, _SMALL_CONTEXT)
    return min(_SHORTEST_OF_SHORT * max(1, times), SHORTEST)


class Sums(NamedTuple):
    """Sums of chunks: ``together`` heads or samples have them at a time, which take so many ``numbers``."""

    together: int
    numbers: int


def sums_of_chunks(
    maps: int,
    positions: int,
    length: int,
    key_channels: int,
    value_channels: int,
    parts: int,
    *,
    threads: int,
) -> Sums:
    """Those of so many heads or samples: each chunk has ``parts`` contexts, and two numbers for each of their rows."""
    rows = parts * _padded(key_channels)
    chunks = max(1, _ceil(positions, length))
    numbers = chunks * rows * (_padded(value_channels) + 2)
    enough = _ceil(_CHUNKS_OF_A_THREAD * threads, chunks)
    together = max(1, min(maps, max(enough, _NUMBERS_AT_A_TIME // max(1, numbers))))
    return Sums(together, min(maps, together) * numbers)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    return _LANES * _ceil(size, _LANES)
