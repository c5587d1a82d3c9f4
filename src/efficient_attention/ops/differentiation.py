"""Gradients of functions that PyTorch can differentiate, where a gradient written by hand does not serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pull_back(
    function: Callable, inputs: tuple[Tensor | None, ...], d_outputs: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)`` with respect to the inputs that need one."""

    def of_variables(*variables: Tensor) -> Any:
        given = iter(variables)
        return function(*(next(given) if n else x for x, n in zip(inputs, needs, strict=True)))

    variables = [x for x, n in zip(inputs, needs, strict=True) if n]
    found = iter(torch.func.vjp(of_variables, *variables)[1](d_outputs))
    return tuple(next(found) if n else None for n in needs)
