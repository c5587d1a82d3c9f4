"""A grid of problems, measured with each setting of the allocator, as a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...ops import native_build
from ...progress import Progress
from ..provenance import describe, write_record
from .allocators import ALLOCATORS, in_process
from .arguments import RESULTS
from .measurement import ENTRIES, measure
from .problems import Problem
from .tables import speed_tables
from .timing import Effort

__all__ = ["device_name", "in_settings", "measure_speed", "record_path"]


def measure_speed(
    problems: Sequence[Problem],
    *,
    effort: Effort,
    among: Collection[str] | None = None,
    threads: int | None = None,
    output: str | Path = RESULTS,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure problems of one subject on one device, on a CPU with each setting of the allocator, and record it.

    Args:
        problems: at least one.
        effort: that is spent on each.
        among: names of entries beside ours; default: all.
        threads: of an operator on a CPU; default: PyTorch's.
        output: folder of the record, ``<subject>_<device>.json``.
        report: called with the tables.

    Returns:
        The path of the record: ``entries``, what each is; ``cases``, one for each setting and problem, as
        :func:`~efficient_attention.benchmark.speed.measurement.measure` returns them, with the ``allocator``.

    Raises:
        InputError: a name that is no entry's.

    Not part of the paper.
    """
    entries = ENTRIES[problems[0].subject]
    unknown = sorted(set(among or ()) - set(entries))
    if unknown:
        raise InputError(f"peers must be among {', '.join(entries)}; got {', '.join(unknown)}")
    device = problems[0].device
    cases = in_settings(
        partial(_measure_one, effort=effort, among=among),
        problems,
        allocators=tuple(ALLOCATORS) if device == "cpu" else ("default",),
        threads=threads,
    )
    record = {
        "name": problems[0].subject,
        "device": device_name(device),
        "effort": effort._asdict(),
        "entries": {n: {"what": e.what, "formula": e.formula} for n, e in entries.items()},
        "cases": cases,
        "provenance": {**describe(), "threads": threads or torch.get_num_threads()},
    }
    path = record_path(output, problems[0].subject, device)
    write_record(path, record)
    report(f"{speed_tables(record)}\n\n{path}")
    return path


def in_settings(
    function: Callable[[Problem], dict[str, Any]],
    problems: Sequence[Problem],
    *,
    allocators: Sequence[str],
    threads: int | None,
) -> list[dict[str, Any]]:
    """Call a function of a problem with each, in a process for each setting of the allocator.

    Args:
        function: can be pickled; returns what JSON can hold.
        problems: in whose order results come.
        allocators: settings, see :mod:`~efficient_attention.benchmark.speed.allocators`.
        threads: of an operator on a CPU; default: PyTorch's.

    Returns:
        The results, with the ``allocator`` of each.

    Not part of the paper.
    """
    found = []
    for allocator in allocators:
        cases = in_process(allocator, _call_with_each, function, problems, threads, allocator)
        found += [{"allocator": allocator, **case} for case in cases]
    return found


def device_name(device: str) -> str:
    """That of the GPU; of a CPU it is in the provenance."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def record_path(folder: str | Path, subject: str, device: str) -> Path:
    """Of a record, named for what was measured and where."""
    where = re.sub(r"\W+", "_", device_name(device).lower())
    return Path(folder) / f"{subject}_{where}.json"


def _measure_one(
    problem: Problem, *, effort: Effort, among: Collection[str] | None
) -> dict[str, Any]:
    return measure(problem, effort, among=among)


def _call_with_each(
    function: Callable[[Problem], dict[str, Any]],
    problems: Sequence[Problem],
    threads: int | None,
    allocator: str,
) -> list[dict[str, Any]]:
    # What a machine has built says nothing of others: the kernels in C are measured by name.
    native_build.set_aside()
    if threads is not None:
        torch.set_num_threads(threads)
    progress = Progress(f"{allocator} allocator: problems", total=len(problems))
    found = []
    for done, problem in enumerate(problems):
        progress.show(done, _in_words(problem))
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit("whoever asked for measurements has gone")
        found.append(function(problem))
    progress.show(len(problems))
    return found


def _in_words(problem: Problem) -> str:
    return (
        f"{problem.positions:,} positions, {problem.heads} heads, {problem.dtype}, {problem.mode}"
    )
