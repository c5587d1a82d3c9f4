"""What a user should do: attention measured on his machine around the crossover, and at the length that he has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...errors import InputError
from ...memory import available_bytes
from ...ops import native_build, native_calls
from ...ops.precision import multiplies_bfloat16
from .allocators import ALLOCATORS, in_process
from .entries import OURS
from .measurement import ENTRIES, measure, work_of
from .orders import planned_order
from .problems import Problem
from .tables import median
from .timing import Effort, Work, take_rounds

__all__ = ["Findings", "advise", "crossover_length", "in_words"]

#: Dot-product attention, the fastest that there is.
QUADRATIC = {"operator": "SDPA", "module": "non-local"}

# A few milliseconds each, around where the two meet.
_LENGTHS = (16, 64, 256, 1024, 4096)
_QUICK = Effort(rounds=5, shortest=0.005, budget=0.3)
# Below this many times the other's they take the same time, as far as a user can feel it.
_FELT = 1.15
_BUILD = 'python -c "import efficient_attention; efficient_attention.build_native()"'
# Inputs beside what is computed from them, gradients included.
_ROOM = 4


class Findings(NamedTuple):
    """What was measured.

    Attributes:
        curve: by number of positions, how many times as long as efficient attention dot-product attention takes.
        times: the same at the length that is asked for.
        computed: whether those were computed from fewer positions, as a call would take long.
        bytes: that each holds at one time there beside its inputs: efficient, dot-product.
        order: that the planner takes there.
        warm: by which factor efficient attention takes less time there where memory is kept; ``None`` on a GPU.
        kernels: whether the kernels in C that could have served it have been built; ``None`` where none could.
        slow: whether the processor has no products of this dtype, so that the layers around attention take long in it.
    """

    curve: dict[int, float]
    times: float
    computed: bool
    bytes: tuple[int, int]
    order: str
    warm: float | None
    kernels: bool | None = None
    slow: bool = False


def advise(
    problem: Problem,
    *,
    threads: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Measure efficient attention beside dot-product attention on this machine, and say what to do.

    Args:
        problem: at the length, and with the heads, channels, dtype and device, that are asked for.
        threads: of an operator on a CPU; default: PyTorch's.
        report: called with each line.

    Returns:
        What was measured. It takes some 20 seconds; on a CPU in processes with each setting of the allocator.

    Raises:
        InputError: tensors of this size do not fit into the memory that is there.

    Not part of the paper, whose Sec. 3.2 counts what is measured here.
    """
    needed, there = _ROOM * problem.input_bytes, available_bytes(torch.device(problem.device))
    if there is not None and needed > there:
        raise InputError(
            f"positions must be so many that their tensors fit {there >> 20:,} MiB; "
            f"got {problem.positions:,}, for which it takes {needed >> 20:,} MiB"
        )
    curve, at, order, seconds = in_process("default", _measured, problem, threads)
    warm = None
    if problem.device == "cpu":
        warm = seconds / in_process("warm", _seconds_of_ours, problem, threads)
    quadratic = at["entries"][QUADRATIC[problem.subject]]
    times = median(quadratic)
    assert times is not None, quadratic
    found = Findings(
        curve,
        times,
        quadratic.get("computed", False),
        (at["entries"][OURS]["bytes"], quadratic["bytes"]),
        order,
        warm,
        _has_kernels(problem),
        problem.device == "cpu" and problem.dtype == "bfloat16" and not multiplies_bfloat16(),
    )
    for line in in_words(problem, found):
        report(line)
    return found


def crossover_length(curve: Mapping[int, float]) -> float | None:
    """The number of positions from which dot-product attention takes longer, between those that were measured.

    Args:
        curve: as in :class:`Findings`.

    Returns:
        Where the curve passes 1 for the last time, interpolated between logarithms; 0 if it is above 1 throughout, and
        ``None`` if it ends below.

    Example:
        >>> crossover_length({16: 0.5, 64: 2.0})
        32.0

    Not part of the paper.
    """
    lengths = sorted(curve)
    below = [n for n in lengths if curve[n] < 1]
    if not below:
        return 0.0
    if below[-1] == lengths[-1]:
        return None
    low = below[-1]
    high = lengths[lengths.index(low) + 1]
    a, b = (torch.tensor(curve[n], dtype=torch.float64).log() for n in (low, high))
    share = (-a / (b - a)).item()
    return round(low * (high / low) ** share, 6)


def in_words(problem: Problem, found: Findings) -> list[str]:
    """What was found, line by line, and in the last what to do."""
    about = "about " if found.computed else ""
    ours, theirs = found.bytes
    curve = ", ".join(f"{n:,}: {times:.2g}" for n, times in sorted(found.curve.items()))
    lines = [
        f"time of dot-product attention, in times of efficient attention, by positions: {curve}",
        f"crossover: {_crossover(found.curve)}",
        f"at {problem.positions:,} positions dot-product attention takes {about}{found.times:.3g} times as long, and "
        f"{theirs / ours:.2g} times the memory beside its inputs",
        f'order that the planner takes there: "{found.order}"',
    ]
    if found.warm is not None:
        lines.append(
            f"with memory that is kept ({_setting()}) efficient attention takes {1 / found.warm:.2f} of its time"
        )
    if found.kernels is False:
        lines.append(f"it runs without its kernels in C, which this machine can have: {_BUILD}")
    if found.slow:
        lines.append(
            f"this processor has no products of {problem.dtype}: efficient attention multiplies in float32, but "
            "PyTorch's layers, and dot-product attention in training, take many times as long as in float32"
        )
    return [*lines, _advice(problem, found)]


def _has_kernels(problem: Problem) -> bool | None:
    served = problem.device == "cpu" and getattr(torch, problem.dtype) in native_calls.DTYPES
    return native_build.is_built() if served and native_build.why_not() is None else None


def _crossover(curve: Mapping[int, float]) -> str:
    length = crossover_length(curve)
    if length is None:
        return f"beyond {max(curve):,} positions"
    return f"about {length:,.0f} positions" if length else f"below {min(curve):,} positions"


def _advice(problem: Problem, found: Findings) -> str:
    if found.times < 1 / _FELT:
        faster = f"{1 / found.times:.2g} times as fast"
        return f"Keep dot-product attention: it is {faster} at {problem.positions:,} positions."
    if found.times < _FELT:
        return "Take either: they take the same time at this length; dot-product attention is what others know."
    advice = f"Take efficient attention: it is {found.times:.3g} times as fast at {problem.positions:,} positions"
    if found.warm is not None and found.warm >= _FELT:
        return f"{advice}, and {found.warm:.2g} times faster still if Python is started with {_setting()}."
    return f"{advice}."


def _setting() -> str:
    return " ".join(f"{name}={value}" for name, value in ALLOCATORS["warm"].items())


def _measured(
    problem: Problem, threads: int | None
) -> tuple[dict[int, float], dict[str, Any], str, float]:
    """The curve, the case at the length that is asked for, the order there, and the seconds of ours."""
    if threads is not None:
        torch.set_num_threads(threads)
    name = QUADRATIC[problem.subject]
    curve: dict[int, float] = {}
    for positions in _LENGTHS:
        found = measure(problem.at(positions), _QUICK, among=[name])
        times = median(found["entries"][name])
        assert times is not None, found
        curve[positions] = times
    at = measure(problem, _QUICK, among=[name], checked=False)
    return curve, at, planned_order(problem.task()), _seconds_of_ours(problem, threads)


def _seconds_of_ours(problem: Problem, threads: int | None) -> float:
    """The median of some rounds."""
    if threads is not None:
        torch.set_num_threads(threads)
    with torch.set_grad_enabled(problem.mode != "forward"):
        task = problem.task()
        work: Work = work_of(ENTRIES[problem.subject][OURS].make(task), task)
        seconds: Sequence[float] = take_rounds(
            {OURS: work}, device=problem.device, effort=_QUICK
        ).seconds[OURS]
    return sorted(seconds)[len(seconds) // 2]
