"""What answers a problem: a way to compute attention, another one in its place, or a floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .problems import Task

__all__ = ["FORMULAS", "OURS", "Call", "Entry", "Unavailable"]

#: The entry that all times are compared with.
OURS = "ours"
#: Efficient attention, compared with float64; another map in its place; a part of the work, or a copy of as many bytes.
FORMULAS = ("same", "other", "floor")


class Unavailable(Exception):
    """An entry cannot be measured here; the message says why."""


class Call(NamedTuple):
    """What is timed, ready to run.

    Attributes:
        function: of ``inputs``.
        inputs: that it is called with.
        leaves: by name, what gradients are computed for where the problem has a backward pass. A floor has none: it
            does by itself what it stands for.
        before: called before each run, not timed.
        scale: what the time of a run is multiplied with.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    leaves: Mapping[str, Tensor]
    before: Callable[[], Any] | None = None
    scale: float = 1.0


class Entry(NamedTuple):
    """One of those that are compared.

    Attributes:
        what: in a sentence, for the record.
        make: a call for a task; raises :class:`Unavailable`.
        formula: one of ``FORMULAS``.
        power: of the number of positions, with which its time grows.
    """

    what: str
    make: Callable[[Task], Call]
    formula: str = "same"
    power: int = 1
