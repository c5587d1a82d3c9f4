"""Processes with a setting of the C library's allocator, which reads it where a process starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

__all__ = ["ALLOCATORS", "in_process"]

#: As a process starts; and with memory that is kept and used again, which glibc gives back to the system by default
#: whenever a tensor of more than 32 MB goes, to be cleared page by page for the next one.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "warm": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    },
}

Result = TypeVar("Result")


def in_process(allocator: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a new process with a setting of the allocator, and return what it returns.

    Args:
        allocator: one of ``ALLOCATORS``.
        function: of a module, by its name.
        arguments: that can be pickled, as can the result.

    Raises:
        Exception: what the function raised.

    Not part of the paper.
    """
    # Spawned, as the allocator of a forked process has started already.
    with (
        _environment(ALLOCATORS[allocator]),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


@contextmanager
def _environment(setting: dict[str, str]) -> Iterator[None]:
    """The environment with one setting and none of the other's, for as long as processes start in it."""
    names = {name for each in ALLOCATORS.values() for name in each}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(setting)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
