"""Who may be timed: an entry of the same formula that is right, and one of another that gives what it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...testing import plain_attention, relative_error
from .entries import Call, Unavailable
from .module_entries import paper_module
from .problems import Module, Problem, Task

__all__ = ["OUTPUT", "PARAMETERS", "Truth", "admit", "results", "truth"]

#: Beside the names of inputs, whose gradients are compared.
OUTPUT, PARAMETERS = "output", "parameters"

# In which the plain equations are computed for a problem with inputs of at most so many bytes.
_ORDERS = 4
_SMALL_BYTES = 16 << 20


class Truth(NamedTuple):
    """What is right, and how far from it the plain equations are in the dtype of the problem.

    Attributes:
        values: by name, in float64: the output and, where the problem has a backward pass, the gradient of each input,
            and that of all parameters as one vector.
        allowed: by name, the relative error that is let in.
    """

    values: dict[str, Tensor]
    allowed: dict[str, float]


def results(call: Call, task: Task) -> dict[str, Tensor]:
    """The output of a call and, where the problem has a backward pass, gradients as :class:`Truth` has them."""
    if call.before is not None:
        call.before()
    output = call.function(*call.inputs)
    found = {OUTPUT: output.detach()}
    if task.trains and call.leaves:
        # An entry of another layout has as many numbers in another shape.
        d_output = task.d_output.reshape(output.shape)
        gradients = torch.autograd.grad(
            output, list(call.leaves.values()), d_output, allow_unused=True
        )
        named = {n: g for n, g in zip(call.leaves, gradients, strict=True) if g is not None}
        found |= {name: named.pop(name) for name in task.inputs if name in named}
        if named:
            # One by one, sums that cancel would be held to digits that no order of summation has.
            found[PARAMETERS] = torch.cat([named[name].flatten() for name in sorted(named)])
    return found


def truth(task: Task) -> Truth:
    """The plain equations in float64, and their error in the dtype of the task.

    An entry may err twice as much as the plain equations do, or by one rounding. The error of a few long sums is a
    matter of chance: of small problems it is the largest of several orders of the positions.
    """
    problem, dtype = task.problem, task.d_output.dtype
    values = _plain(task, torch.float64)
    allowed = dict.fromkeys(values, torch.finfo(dtype).eps)
    orders = _ORDERS if problem.input_bytes <= _SMALL_BYTES else 1
    for shift in (problem.positions * i // orders for i in range(orders)):
        plain = _plain(_rolled(task, shift), dtype)
        for name, value in values.items():
            here = plain[name] if name == PARAMETERS else _roll(problem, plain[name], -shift)
            allowed[name] = max(allowed[name], 2 * relative_error(here, value))
    return Truth(values, allowed)


def admit(call: Call, task: Task, formula: str, right: Truth) -> float | None:
    """Run a call once.

    Args:
        call: of an entry.
        task: that it is for.
        formula: of the entry.
        right: what those of the same formula are compared with; if empty, none is.

    Returns:
        The largest relative error of its results, each as a share of what is allowed; ``None`` if not compared.

    Raises:
        Unavailable: it is wrong, gives another number of values than it must, or some that are not finite.

    Not part of the paper.
    """
    found = results(call, task)
    if formula == "floor":
        return None
    output = found[OUTPUT]
    if output.numel() != task.d_output.numel() or not output.isfinite().all():
        raise Unavailable(
            f"wrong: {task.d_output.numel()} finite numbers expected; got {tuple(output.shape)}, "
            f"of which {int((~output.isfinite()).sum())} are not finite"
        )
    if formula == "other" or not right.values:
        return None
    shares = {n: relative_error(found[n], v) / right.allowed[n] for n, v in right.values.items()}
    worst = max(shares, key=lambda name: shares[name])
    # As a negation, which NaN does not pass.
    if not shares[worst] <= 1:
        allowed = right.allowed[worst]
        raise Unavailable(
            f"wrong: {worst} is off by {shares[worst] * allowed:.1e} of its norm; at most {allowed:.1e} is right"
        )
    return shares[worst]


def _rolled(task: Task, shift: int) -> Task:
    """The same with every position moved on by so many, the last to the front."""
    inputs = {name: _roll(task.problem, x, shift) for name, x in task.inputs.items()}
    return replace(task, inputs=inputs, d_output=_roll(task.problem, task.d_output, shift))


def _roll(problem: Problem, x: Tensor, shift: int) -> Tensor:
    if isinstance(problem, Module):
        return x.flatten(2).roll(shift, 2).unflatten(2, x.shape[2:])
    return x.roll(shift, 2)


def _plain(task: Task, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain equations; of the operator head by head, so that long inputs fit in float64."""
    if isinstance(task.problem, Module):
        return _plain_results(task, dtype)
    heads = [
        _plain_results(
            replace(
                task,
                inputs={name: x[:, head, None] for name, x in task.inputs.items()},
                d_output=task.d_output[:, head, None],
            ),
            dtype,
        )
        for head in range(task.problem.heads)
    ]
    return {name: torch.cat([head[name] for head in heads], 1) for name in heads[0]}


def _plain_results(task: Task, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {n: x.detach().to(dtype).requires_grad_(task.trains) for n, x in task.inputs.items()}
    function: Callable[..., Tensor] = plain_attention
    leaves: Mapping[str, Tensor] = inputs
    if isinstance(task.problem, Module):
        module = paper_module(task.problem).to(task.problem.device, dtype)
        module.load_state_dict(task.weights)
        function, leaves = module, {**inputs, **dict(module.named_parameters())}
    wide = replace(task, inputs=inputs, d_output=task.d_output.to(dtype))
    return results(Call(function, tuple(inputs.values()), leaves), wide)
