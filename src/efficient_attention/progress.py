"""One line that says how far a long computation is."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress"]

_BAR = 24  # characters
_REDRAW = 0.1  # seconds
_LOG = 10.0  # seconds


class Progress:
    """One line of progress: redrawn in place on a terminal; elsewhere a line now and then.

    Args:
        title: what is going on.
        total: how many steps there are.
        stream: where to write; default standard error, so that results can be piped.

    Example:
        >>> progress = Progress("fitting", total=500)
        >>> for step in range(500):
        ...     progress.show(step + 1, f"error {1 / (step + 1):.3f}")
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        self.title = title
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self._terminal = self.stream.isatty()
        self._shown = -float("inf") if self._terminal else time.perf_counter()

    def show(self, done: int, note: str = "") -> None:
        """Say that so many steps are done; cheap enough for every step. The last one clears."""
        now = time.perf_counter()
        if self._terminal and done >= self.total:
            self._write("\r\033[K")
        elif now - self._shown >= (_REDRAW if self._terminal else _LOG) and done < self.total:
            self._shown = now
            self._write(self._bar(done, note) if self._terminal else self._line(done, note))

    def _bar(self, done: int, note: str) -> str:
        filled = round(_BAR * done / self.total)
        # The escape erases what a longer line has left behind.
        return f"\r[{'#' * filled}{'-' * (_BAR - filled)}] {self._text(done, note)}\033[K"

    def _line(self, done: int, note: str) -> str:
        return f"{self._text(done, note)}\n"

    def _text(self, done: int, note: str) -> str:
        return f"{self.title} {done}/{self.total}  {note}".rstrip()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
