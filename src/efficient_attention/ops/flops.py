"""What the operators cost, for ``torch.utils.flop_counter``: two operations for each multiply-add.

That module imports triton where it is installed, and this package must not; so the formulas are registered at the
moment when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"


def summarize_flops(key_shape, value_shape, *_, **__):
    batch, heads, keys, key_channels = key_shape
    return 2 * batch * heads * keys * key_channels * value_shape[-1]


def summarize_backward_flops(d_mean_shape, d_log_weight_shape, key_shape, *others, **__):
    batch, heads, keys, key_channels = key_shape
    needs = others[-1]
    return 2 * sum(needs) * batch * heads * keys * key_channels * d_mean_shape[-1]


def attend_flops(query_shape, mean_shape, *_, **__):
    batch, heads, queries, key_channels = query_shape
    return 2 * batch * heads * queries * key_channels * mean_shape[-1]


def attend_backward_flops(d_output_shape, query_shape, mean_shape, *others, **__):
    needs = others[-1]
    return sum(needs) * attend_flops(query_shape, mean_shape)


def _register(counter: ModuleType) -> None:
    operators = torch.ops.efficient_attention
    counter.register_flop_formula(operators.summarize)(summarize_flops)
    counter.register_flop_formula(operators.summarize_backward)(summarize_backward_flops)
    counter.register_flop_formula(operators.attend)(attend_flops)
    counter.register_flop_formula(operators.attend_backward)(attend_backward_flops)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Has whoever loads the counter register the formulas afterwards, however often it is looked for or loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_counting() -> None:
    """Register the formulas now if the counter is loaded, and whenever it will be."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    sys.meta_path.insert(0, _RegisterOnImport())
