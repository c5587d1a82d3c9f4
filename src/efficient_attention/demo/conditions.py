"""What a demonstration needs around it: one thread, so that times compare, and a folder that can be written to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import InputError

__all__ = ["one_thread", "telling_of", "writable_folder"]


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums on any number of cores, and times that compare, on a busy machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def writable_folder(output: str | Path) -> Path:
    """Find out before the work, not after it."""
    folder = Path(output)
    with telling_of(output):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


@contextmanager
def telling_of(output: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output must be a folder that can be written to; got '{output}': "
            f"{error.strerror or error}"
        ) from error
