"""How the native kernels cut up their work: chunks of positions, each with sums of its own.

Threads take chunks as they come; how many there are follows from the sizes alone, and so does the rounding.
"""

from __future__ import annotations

# Chunks of one head or sample, at most.
MOST = 64
# Positions of a chunk of the operator, at least; and of a module, where a position is more work.
SHORTEST = 2048
SHORTEST_OF_MODULE = 256

# Sums are padded to whole vectors, of at most so many numbers.
_LANES = 16


def chunk_length(positions: int) -> int:
    """Positions of a chunk of one head, in the operator."""
    return SHORTEST * max(1, _ceil(positions, MOST * SHORTEST))


def module_chunk_length(positions: int, key_channels: int) -> int:
    """The same for a module: beyond eight, their sums ``[dk, C]`` are as many numbers as a sixteenth of X."""
    most = min(max(8, positions // (16 * key_channels)), MOST)
    return SHORTEST_OF_MODULE * max(1, _ceil(positions, most * SHORTEST_OF_MODULE))


def sums_of_chunks(
    maps: int, positions: int, length: int, key_channels: int, value_channels: int, parts: int = 1
) -> int:
    """How many numbers all chunks of so many maps sum up: ``parts`` contexts each, and two numbers for each row."""
    rows = parts * _padded(key_channels)
    return maps * max(1, _ceil(positions, length)) * rows * (_padded(value_channels) + 2)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    return _LANES * _ceil(size, _LANES)
