"""Files that are whole or not there: written beside their place, then moved to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the ``with`` ends well, and else leaves it as it was.

    Args:
        path: of the file; its folder is there.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> with replacing(Path(folder, "note.txt")) as file:
        ...     _ = file.write(b"whole")
        >>> Path(folder, "note.txt").read_text()
        'whole'
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()
