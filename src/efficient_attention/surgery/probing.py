"""What a module computes, found by running a copy of it: names of classes and attributes promise nothing.

Two libraries give the same parts to blocks that compute different maps, and one library changes a block under its name.
So parts only suggest what a module may be; it is that if a copy with random weights returns, on random inputs, what the
suggested equations do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Two ways to compute one map in float64 differ by less, two maps by more.
_TOLERANCE = 1e-9


def random_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in float64 on the CPU, with random parameters and buffers; small, whatever the device.

    Random, because blocks are often initialized to return their input, and because ``module`` may be on ``meta``.

    Raises:
        ValueError: it cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, Any] = {}
    for parameter in module.parameters():
        fan_in = math.prod(parameter.shape[1:])
        values = _normal(tuple(parameter.shape), generator) / max(fan_in, 1) ** 0.5
        drawn[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        # Positive, as variances are.
        if buffer.is_floating_point():
            drawn[id(buffer)] = _normal(tuple(buffer.shape), generator).abs() + 0.5
    try:
        return copy.deepcopy(module, drawn).eval()
    except Exception as error:
        raise ValueError(f"it cannot be copied, to see what it computes: {error}") from error


def random_input(*shape: int) -> Tensor:
    return _normal(shape, torch.Generator().manual_seed(1))


def computes(module: nn.Module, x: Tensor, *maps: Callable[[Tensor], Tensor]) -> int | None:
    """Which of ``maps`` returns what ``module`` does, or ``None``: also if it cannot be run so."""
    got = _outcome(module, x)
    if not isinstance(got, Tensor):
        return None
    return next((i for i, f in enumerate(maps) if _are_same(got, _outcome(f, x))), None)


def _outcome(f: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.no_grad():
        try:
            return f(x)
        except Exception:
            # What wants another shape, or cannot be put together, is not what its parts suggest.
            return None


def _are_same(got: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
