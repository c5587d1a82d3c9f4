"""Floors: a part of the work that nobody gets around, done into memory that is already there."""

from __future__ import annotations

import torch
from torch import Tensor

from .entries import Call
from .problems import Module, Operator, Task

__all__ = ["copy", "module_products", "operator_products"]

# The backward pass of a product is two products of its size.
_TIMES = {"forward": 1, "backward": 2, "training": 3}
# Beyond any cache of a GPU, whose bandwidth is measured with it.
_LARGE_BYTES = 512 << 20


def operator_products(task: Task) -> Call:
    """``K^T V`` and ``Q C``, so often as the mode has products of their size."""
    problem = task.problem
    assert isinstance(problem, Operator)
    query, key, value = (x.flatten(0, 1) for x in task.inputs.values())
    context = query.new_empty(query.shape[0], problem.key_channels, problem.value_channels)
    output = torch.empty_like(value)

    def run() -> Tensor:
        for _ in range(_TIMES[problem.mode]):
            torch.bmm(key.mT, value, out=context)
            torch.bmm(query, context, out=output)
        return output

    return Call(run, (), {})


def module_products(task: Task) -> Call:
    """The four products of the folded order: keys, pooled inputs, queries, outputs; heads have no part in them."""
    problem = task.problem
    assert isinstance(problem, Module)
    x = task.inputs["x"].flatten(2)  # [B, C, N]
    shape = (problem.batch, problem.key_channels, problem.channels)
    weight, context = (x.new_full(shape, 0.01) for _ in range(2))
    projected, output = x.new_empty(*shape[:2], problem.positions), torch.empty_like(x)

    def run() -> Tensor:
        for _ in range(_TIMES[problem.mode]):
            torch.bmm(weight, x, out=projected)
            torch.bmm(projected, x.mT, out=context)
            torch.bmm(weight, x, out=projected)
            torch.bmm(weight.mT, projected, out=output)
        return output

    return Call(run, (), {})


def copy(task: Task) -> Call:
    """Reading half of the fewest bytes and writing the other half; on a GPU from the bandwidth of a large copy."""
    problem = task.problem
    half = problem.minimal_bytes // 2
    size = half if problem.device == "cpu" else _LARGE_BYTES
    source, target = (torch.zeros(size, dtype=torch.uint8, device=problem.device) for _ in range(2))
    return Call(target.copy_, (source,), {}, scale=half / size)
