"""One line that says how far a long computation is."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress"]

_BAR = 24


class Progress:
    """One line of progress: redrawn in place on a terminal; elsewhere, as in a log, written once, at the end.

    Args:
        title: what is going on.
        total: how many steps there are.
        stream: where to write; default standard error, so that results can be piped.

    Example:
        >>> progress = Progress("fitting", total=500)
        >>> for step in range(500):
        ...     progress.show(step + 1, f"error {0.5:.3f}")
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        self.title = title
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self._terminal = self.stream.isatty()
        self._start = time.perf_counter()
        self._drawn = -float("inf")

    def show(self, done: int, note: str = "") -> None:
        """Say that ``done`` of all steps are done; cheap enough to be called at every step."""
        now = time.perf_counter()
        finished = done >= self.total
        if self._terminal and (finished or now - self._drawn > 0.1):
            self._drawn = now
            filled = round(_BAR * done / self.total)
            bar = "#" * filled + "-" * (_BAR - filled)
            # The escape erases what a longer line has left behind.
            self._write(f"\r{self.title} [{bar}] {done}/{self.total}  {note}\033[K")
        if finished:
            self._write(f"\r\033[K" if self._terminal else f"{self._summary(now, note)}\n")

    def _summary(self, now: float, note: str) -> str:
        return f"{self.title}: {self.total} steps in {now - self._start:.1f} s  {note}".rstrip()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
