"""The error that a command tells in one line: what a user gave cannot be used."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """What a user gave cannot be used; the message names it, says what was expected and what came.

    Commands print the message as one line and exit with code 2. Any other exception is a defect and
    keeps its traceback.
    """
