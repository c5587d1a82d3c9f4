"""One problem, all entries: gate, memory, rounds, and how many times as long as ours each takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...memory import peak_bytes
from ..spread import percentiles
from .entries import OURS, Call, Entry, Unavailable
from .gate import Truth, admit, results, truth
from .module_entries import MODULE
from .operator_entries import OPERATOR
from .problems import Module, Operator, Problem, Task
from .timing import Effort, Rounds, Work, seconds_of, take_rounds

__all__ = ["ENTRIES", "measure", "work_of"]

ENTRIES: dict[str, dict[str, Entry]] = {Operator.subject: OPERATOR, Module.subject: MODULE}

# Of the positions from whose time that of more is computed, where it grows with their square. A GPU needs many.
_SAMPLE_POSITIONS = {"cpu": 2048, "cuda": 32768}


def measure(
    problem: Problem,
    effort: Effort,
    *,
    entries: Mapping[str, Entry] | None = None,
    among: Collection[str] | None = None,
    checked: bool = True,
) -> dict[str, Any]:
    """Let in who is right, and compare times and memory.

    Args:
        problem: to be solved.
        effort: that is spent.
        entries: by name, with ours; default: those of ``ENTRIES`` for the problem.
        among: names of those that are measured beside ours; default: all.
        checked: compare with float64 first. Only for a length of what was compared at others.

    Returns:
        What JSON can hold: the problem; ``input_bytes`` and ``minimal_bytes``; ``disturbed``, see
        :class:`~efficient_attention.benchmark.speed.timing.Rounds`; and ``entries``, by name. An entry has ``reason``
        if it was not measured; else ``times_ours``, the 20th, 50th and 80th percentile over the rounds of its time
        divided by that of ours; ``bytes``, the most that its tensors hold at one time beside its inputs; ``error``, as
        a share of what is allowed; on a GPU ``microseconds``, percentiles too. ``computed`` is true where a call would
        take longer than the budget, and its time was computed from that of fewer positions.

    Not part of the paper.
    """
    entries = ENTRIES[problem.subject] if entries is None else entries
    chosen = {n: e for n, e in entries.items() if among is None or n in among or n == OURS}
    rounds = Rounds({}, disturbed=False)
    with torch.set_grad_enabled(problem.mode != "forward"):
        rows, works, computed = _let_in(problem, chosen, effort, checked)
        if OURS in works:
            rounds = take_rounds(works, device=problem.device, effort=effort)
    for name, row in rows.items():
        if OURS not in works:
            row.setdefault("reason", "ours cannot be compared with")
        elif "reason" not in row:
            row |= _compared(name, rounds, computed.get(name), problem.device)
    return {
        **problem.describe(),
        "positions": problem.positions,
        "input_bytes": problem.input_bytes,
        "minimal_bytes": problem.minimal_bytes,
        "disturbed": rounds.disturbed,
        "entries": rows,
    }


def work_of(call: Call, task: Task) -> Work:
    """What is timed of a call: all of it, or its backward pass alone, after a forward pass that is not timed."""
    mode = task.problem.mode
    function, inputs, before = call.function, call.inputs, call.before
    if mode == "forward" or not call.leaves:

        def forward(_: Any) -> Tensor:
            return function(*inputs)

        return Work(forward, before, call.scale)
    leaves, d_output = list(call.leaves.values()), task.d_output

    def backward(output: Tensor) -> Any:
        return torch.autograd.grad(
            output, leaves, d_output.reshape(output.shape), allow_unused=True
        )

    def whole(_: Any) -> Any:
        return backward(function(*inputs))

    if mode == "training":
        return Work(whole, before, call.scale)
    return Work(backward, lambda: function(*inputs), call.scale)


def _let_in(
    problem: Problem, entries: Mapping[str, Entry], effort: Effort, checked: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, Work], dict[str, float]]:
    """Rows, what is to be timed of them, and seconds of those that would take too long."""
    task = problem.task()
    right = truth(task) if checked else Truth({}, {})
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Work] = {}
    computed: dict[str, float] = {}
    for name, entry in entries.items():
        try:
            expected = _expected(problem, entry)
            if expected is not None and expected[0] > effort.budget:
                computed[name], held = expected
                rows[name] = {"computed": True, "bytes": held}
            else:
                rows[name], works[name] = _ready(entry, task, right)
        except Unavailable as reason:
            rows[name] = {"reason": str(reason)}
    return rows, works, computed


def _expected(problem: Problem, entry: Entry) -> tuple[float, int] | None:
    """Seconds and bytes of a call, from one with fewer positions; ``None`` where time grows with them, or has few.

    Whoever takes the square of time takes no more than a multiple of memory: nobody here has an N x N map.
    """
    fewer = problem.at(_SAMPLE_POSITIONS[problem.device])
    if entry.power == 1 or problem.positions <= fewer.positions:
        return None
    task = fewer.task()
    call = entry.make(task)
    # Not compared: that is done where it is timed.
    results(call, task)
    work, factor = work_of(call, task), problem.positions / fewer.positions
    seconds = min(seconds_of(work, problem.device) for _ in range(5))
    return seconds * factor**entry.power, round(_peak(work) * factor)


def _ready(entry: Entry, task: Task, right: Truth) -> tuple[dict[str, Any], Work]:
    call = entry.make(task)
    error = admit(call, task, entry.formula, right)
    work = work_of(call, task)
    if entry.formula == "floor":
        return {}, work
    row: dict[str, Any] = {"bytes": _peak(work)}
    if error is not None:
        row["error"] = round(error, 3)
    return row, work


def _peak(work: Work) -> int:
    prepared = None if work.prepare is None else work.prepare()
    return peak_bytes(lambda: work.run(prepared))


def _compared(name: str, rounds: Rounds, seconds: float | None, device: str) -> dict[str, Any]:
    ours = rounds.seconds[OURS]
    taken = rounds.seconds[name] if seconds is None else [seconds] * len(ours)
    row: dict[str, Any] = {
        "times_ours": percentiles(a / b for a, b in zip(taken, ours, strict=True))
    }
    if device != "cpu":
        row["microseconds"] = percentiles(1e6 * each for each in taken)
    return row
