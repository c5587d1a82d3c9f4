"""Random numbers that belong to a sample: not to a worker, a process or the place where a run was resumed.

A sampler asks a data set for a :class:`Draw`, which holds what to take and the seed of its random numbers. So a data
set keeps no state: the same draw gives the same sample, whoever asks and whenever.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = ["Draw", "as_draw", "generator", "reproducibly", "seed_of"]


class Draw(NamedTuple):
    """What a sampler asks of a data set: ``dataset[Draw(item, seed)]``; ``dataset[item]`` has seed 0."""

    item: int
    seed: int


def as_draw(key: int | Draw, length: int) -> Draw:
    """The draw that a data set of so many samples is asked for.

    Args:
        key: a draw, or an index; negative ones count from the end.
        length: of the data set.

    Raises:
        TypeError: something else, a slice for one.
        IndexError: there is no such sample; with it a ``for`` loop over a data set ends.

    Example:
        >>> as_draw(-1, 10)
        Draw(item=9, seed=0)
    """
    draw = key if isinstance(key, Draw) else Draw(key, 0)
    if not hasattr(draw.item, "__index__"):
        raise TypeError(f"a data set takes an index or a Draw; got {type(key).__name__}")
    index = draw.item.__index__()
    if not -length <= index < length:
        raise IndexError(f"index must be below {length}, the number of samples; got {index}")
    return Draw(index % length, draw.seed)


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a tuple of integers: unlike ones for keys that differ in anything, on every machine.

    Example:
        >>> seed_of(0, 1) != seed_of(1, 0)
        True
    """
    packed = struct.pack(f"<{len(key)}q", *key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator(*key: int) -> torch.Generator:
    """A generator of its own for a tuple of integers, ``(seed, index)`` for one."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def reproducibly(*key: int) -> Iterator[None]:
    """Within, torch's own generator on the CPU starts from ``key``; afterwards it is as it was.

    For transforms that take their random numbers from there, as torchvision's do.

    Example:
        >>> with reproducibly(0, 1):
        ...     a = torch.rand(3)
        >>> with reproducibly(0, 1):
        ...     b = torch.rand(3)
        >>> torch.equal(a, b)
        True
    """
    state = torch.random.get_rng_state()
    # Not torch.manual_seed, which seeds the accelerators too.
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
