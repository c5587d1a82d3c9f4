"""Times, taken in turns: every candidate once in each round, so that what befalls the machine befalls all alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Effort", "Rounds", "Work", "seconds_of", "take_rounds"]

# Of the ticks in which the system counts the time of its processors.
_STAT = Path("/proc/stat")
_MOST_CALLS = 100_000


class Effort(NamedTuple):
    """How much is done for a figure.

    Attributes:
        rounds: that count.
        shortest: seconds of calls in a sample, at least.
        budget: seconds of one call, beyond which an entry that grows with the square of the positions is not run.
        others: the most of the processors' time that other processes may take in a round that counts.
    """

    rounds: int = 5
    shortest: float = 0.02
    budget: float = 1.0
    others: float = 0.1


class Work(NamedTuple):
    """What is timed: ``run(prepare())``, without the preparation."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] | None = None
    scale: float = 1.0


class Rounds(NamedTuple):
    """What was measured.

    Attributes:
        seconds: of a call, by name, one for each round.
        disturbed: whether other processes took more than they may in some of them.
    """

    seconds: dict[str, list[float]]
    disturbed: bool


def take_rounds(works: Mapping[str, Work], *, device: str, effort: Effort) -> Rounds:
    """Time works in turns.

    On a CPU with one thread, in CPU time. With several, a round in which other processes took much of the processors
    is taken again, up to twice as many in all; then the quietest count.

    Args:
        works: by name. All have run before.
        device: ``"cpu"`` or ``"cuda"``.
        effort: rounds, and seconds of a sample.

    Example:
        >>> rounds = take_rounds({"sleep": Work(lambda _: time.sleep(0.01))}, device="cpu", effort=Effort(rounds=3))
        >>> len(rounds.seconds["sleep"])
        3

    Not part of the paper.
    """
    calls = {name: _calls(work, device, effort.shortest) for name, work in works.items()}
    taken: list[tuple[float, dict[str, float]]] = []
    quiet = 0
    while quiet < effort.rounds and len(taken) < 2 * effort.rounds:
        before = _processor_times()
        sample = {}
        for name in _turned(works, len(taken)):
            # Once before, so that it meets the memory and the caches that it leaves, not those of another.
            _sample(works[name], 1, device)
            sample[name] = _sample(works[name], calls[name], device)
        others = _others(before, _processor_times())
        quiet += others <= effort.others
        taken.append((others, sample))
    taken.sort(key=lambda pair: pair[0])
    best = taken[: effort.rounds]
    seconds = {name: [sample[name] for _, sample in best] for name in works}
    return Rounds(seconds, disturbed=quiet < effort.rounds)


def _turned(works: Mapping[str, Work], first: int) -> list[str]:
    """The names from another one on in each round, so that nobody always follows the same."""
    names = list(works)
    first %= len(names)
    return names[first:] + names[:first]


def seconds_of(work: Work, device: str) -> float:
    """Of one call."""
    return _sample(work, 1, device)


def _calls(work: Work, device: str, shortest: float) -> int:
    """So many that a sample takes long enough to be told from the resolution of clocks and from chance."""
    calls = 1
    while True:
        seconds = _sample(work, calls, device) * calls / work.scale
        if seconds >= shortest / 4:
            return max(1, min(_MOST_CALLS, math.ceil(calls * shortest / seconds)))
        calls *= 4


def _sample(work: Work, calls: int, device: str) -> float:
    """Seconds of a call, on average."""
    run, prepare = work.run, work.prepare
    if prepare is None:

        def all_calls() -> None:
            for _ in range(calls):
                run(None)

        return _elapsed(all_calls, device) / calls * work.scale
    total = 0.0
    for _ in range(calls):
        prepared = prepare()
        total += _elapsed(partial(run, prepared), device)
    return total / calls * work.scale


def _elapsed(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        clock = _clock()
        begin = clock()
        function()
        return clock() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _clock() -> Callable[[], float]:
    """CPU time of one thread, which others leave alone; time of the clock, where threads wait for each other."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _processor_times() -> tuple[float, float, float]:
    """Seconds: of the clock, of all processors at work, of this process."""
    busy = 0.0
    try:
        ticks = list(map(int, _STAT.read_text().splitlines()[0].split()[1:9]))
        # All but what is idle or waits for a disk: the fourth and the fifth.
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        # Not Linux: nobody is seen.
        pass
    return time.perf_counter(), busy, time.process_time()


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """The share of the processors' time that other processes took."""
    seconds, busy, own = (b - a for a, b in zip(before, after, strict=True))
    if _clock() is time.process_time:
        return 0.0
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1)) if busy else 0.0
