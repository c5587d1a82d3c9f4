"""The planner's choice held against measurement: every order of every shape of a grid, and ``"auto"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modules import EfficientAttention2d
from ...ops import efficient_attention
from ...ops.functional import cheapest_order
from ...ops.planner import MODULE_ORDERS, OPERATOR_ORDERS
from ..provenance import describe, write_record
from ..tables import markdown
from .arguments import RESULTS
from .entries import OURS, Call, Entry, Unavailable
from .measurement import measure
from .module_entries import calling
from .problems import Module, Operator, Problem, Task
from .sweep import device_name, in_settings, record_path
from .tables import median
from .timing import Effort

__all__ = ["GRID", "NEAR", "measure_orders", "orders_table", "planned_order"]

#: How far from the best ``"auto"`` may be.
NEAR = 1.1
_LARGEST_INPUTS = 160 << 20
_LARGEST_MAP = 256 << 20
_WORST = 12

_CHANNELS = ((16, 16), (32, 64), (64, 64), (128, 32), (128, 128))
_MODULES = ((32, 16, 32), (64, 32, 32), (64, 64, 16), (128, 64, 128), (256, 128, 128))


def _grid() -> tuple[Problem, ...]:
    operators = [
        Operator(positions=n, heads=heads, batch=batch, key_channels=dk, value_channels=dv)
        for n in (16, 64, 128, 256, 1024, 4096, 16384, 65536)
        for heads in (1, 8)
        for batch in (1, 4)
        for dk, dv in _CHANNELS
    ]
    modules = [
        Module(height=side, width=side, heads=heads, channels=c, key_channels=dk, value_channels=dv)
        for side in (8, 16, 32, 64, 128)
        for heads in (1, 8)
        for c, dk, dv in (*_MODULES, (256, 128, 256), (256, 64, 256))
    ]
    grid: list[Problem] = [*operators, *modules]
    return tuple(problem for problem in grid if problem.input_bytes <= _LARGEST_INPUTS)


#: Of the operator with 16 to 65,536 positions, and of modules on maps of 8 x 8 to 128 x 128.
GRID = _grid()


def measure_orders(
    problems: Sequence[Problem] = GRID,
    *,
    effort: Effort,
    allocators: Sequence[str] = ("default",),
    threads: int | None = None,
    output: str | Path = RESULTS,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure every order of each problem, and ``"auto"``, and record how near ``"auto"`` is to the best.

    Args:
        problems: of one device.
        effort: that is spent on each.
        allocators: settings, see :mod:`~efficient_attention.benchmark.speed.allocators`.
        threads: of an operator on a CPU; default: PyTorch's.
        output: folder of the record, ``orders_<device>.json``.
        report: called with the table.

    Returns:
        The path of the record: ``cases``, for each setting and problem ``planned``, the order that ``"auto"`` is;
        ``times``, how many times as long as ``"auto"`` each order takes, the median over the rounds; ``best``;
        ``distance``, how many times as long as the best ``"auto"`` takes, or the order that it is, as this is the same
        computation timed twice; and ``near``, whether this is at most ``NEAR``.

    Not part of the paper.
    """
    device = problems[0].device
    record = {
        "name": "orders",
        "device": device_name(device),
        "effort": effort._asdict(),
        "near": NEAR,
        "cases": in_settings(
            partial(_judge, effort=effort), problems, allocators=allocators, threads=threads
        ),
        "provenance": {**describe(), "threads": threads or torch.get_num_threads()},
    }
    path = record_path(output, "orders", device)
    write_record(path, record)
    report(f"{orders_table(record)}\n\n{path}")
    return path


def orders_table(record: Mapping[str, Any]) -> str:
    """For how many shapes ``"auto"`` is near the best, and those where it is farthest from it.

    Args:
        record: of :func:`measure_orders`.

    Not part of the paper.
    """
    rows = []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for case in record["cases"]:
        groups.setdefault((case["subject"], case["allocator"]), []).append(case)
    for (subject, allocator), cases in groups.items():
        near = sum(case["near"] for case in cases)
        rows.append(
            [subject, allocator, f"{len(cases)}", f"{near}", f"{100 * near / len(cases):.1f} %"]
        )
    headings = ["", "allocator", "shapes", f"at most {record['near']} times the best", ""]
    far = [case for case in record["cases"] if not case["near"]]
    far.sort(key=lambda case: case["distance"], reverse=True)
    parts = [markdown(headings, rows)]
    if far:
        parts.append(_farthest(far[:_WORST]))
    return "\n\n".join(parts)


def planned_order(task: Task) -> str:
    """What ``order="auto"`` is for a task."""
    problem = task.problem
    if isinstance(problem, Operator):
        return cheapest_order(
            heads=problem.heads,
            queries=problem.positions,
            keys=problem.positions,
            key_channels=problem.key_channels,
            value_channels=problem.value_channels,
        )
    return _module(task, "auto").planned_order(task.inputs["x"])


def _farthest(cases: Sequence[Mapping[str, Any]]) -> str:
    headings = ["farthest from the best", "allocator", "auto is", "the best is", "takes"]
    rows = [
        [
            _shape(case),
            case["allocator"] + ("*" if case["disturbed"] else ""),
            case["planned"],
            case["best"],
            f"{case['distance']:.2f} times the best",
        ]
        for case in cases
    ]
    return markdown(headings, rows)


def _shape(case: Mapping[str, Any]) -> str:
    sizes = f"{case['batch']} x {case['heads']} heads, {case['key_channels']} / {case['value_channels']}"
    if case["subject"] == "module":
        return f"{case['height']} x {case['width']}, {case['channels']} channels, {sizes}"
    return f"{case['positions']:,} positions, {sizes}"


def _judge(problem: Problem, *, effort: Effort) -> dict[str, Any]:
    orders, make = (
        (OPERATOR_ORDERS, _operator_call)
        if isinstance(problem, Operator)
        else (MODULE_ORDERS, _module_call)
    )
    entries = {
        name: Entry(f"order={order!r}", partial(make, order=order))
        for name, order in ((OURS, "auto"), *((order, order) for order in orders))
    }
    found = measure(problem, effort, entries=entries)
    medians = {name: median(row) for name, row in found.pop("entries").items() if name != OURS}
    times = {name: times for name, times in medians.items() if times is not None}
    if not times:
        raise AssertionError(f"{problem}: no order is right")
    best, planned = min(times, key=lambda name: times[name]), planned_order(problem.task())
    distance = min(1.0, times.get(planned, 1.0)) / min(1.0, times[best])
    return {
        **found,
        "planned": planned,
        "times": times,
        "best": best,
        "distance": round(distance, 3),
        "near": distance <= NEAR,
    }


def _operator_call(task: Task, order: str) -> Call:
    _refuse_large_map(task.problem, order)
    leaves = task.leaves()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return efficient_attention(query, key, value, order=order)

    return Call(attend, tuple(leaves.values()), leaves)


def _module_call(task: Task, order: str) -> Call:
    _refuse_large_map(task.problem, order)
    return calling(task, _module(task, order))


def _module(task: Task, order: str) -> EfficientAttention2d:
    problem = task.problem
    assert isinstance(problem, Module)
    return EfficientAttention2d(
        problem.channels,
        problem.key_channels,
        problem.value_channels,
        num_heads=problem.heads,
        order=order,
    ).to(problem.device, getattr(torch, problem.dtype))


def _refuse_large_map(problem: Problem, order: str) -> None:
    size = problem.batch * problem.heads * problem.positions**2 * 4
    if order == "quadratic" and size > _LARGEST_MAP:
        raise Unavailable(f"its map takes {size >> 20:,} MiB, more than is measured")
