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


def folded_flops(
    x_shape, source_shape, mask_shape, weight_shapes, biases, norm, num_heads, *_, **__
):
    (key_channels, in_channels), (_, source_channels), (value_channels, _), _ = weight_shapes
    batch, _, queries = x_shape
    keys = queries if source_shape is None else source_shape[2]
    # Each side projects and multiplies by a context; the projections of values and outputs meet contexts only.
    positions = 2 * key_channels * (queries * in_channels + keys * source_channels)
    head = value_channels // num_heads
    return 2 * batch * (positions + key_channels * head * (in_channels + source_channels))


def folded_backward_flops(
    d_output_shape,
    x_shape,
    source_shape,
    mask_shape,
    weight_shapes,
    biases,
    norm,
    num_heads,
    *others,
    **__,
):
    (key_channels, in_channels), (_, source_channels), (value_channels, _), _ = weight_shapes
    needs_x, needs_source, needs_parameters = others[-1]
    batch, _, queries = x_shape
    keys = queries if source_shape is None else source_shape[2]
    needs_source = needs_x if source_shape is None else needs_source
    # Queries, the gradients of their softmax and of the context; keys and the gradients of their softmax.
    query_side = queries * in_channels * (3 + needs_x + needs_parameters)
    key_side = keys * source_channels * (2 + 2 * needs_source + needs_parameters)
    head = value_channels // num_heads
    # The context is folded again; each fold has two gradients.
    contexts = 3 * key_channels * head * (in_channels + source_channels)
    return 2 * batch * (key_channels * (query_side + key_side) + contexts)


def _register(counter: ModuleType) -> None:
    operators = torch.ops.efficient_attention
    counter.register_flop_formula(operators.summarize)(summarize_flops)
    counter.register_flop_formula(operators.summarize_backward)(summarize_backward_flops)
    counter.register_flop_formula(operators.attend)(attend_flops)
    counter.register_flop_formula(operators.attend_backward)(attend_backward_flops)
    counter.register_flop_formula(operators.folded)(folded_flops)
    counter.register_flop_formula(operators.folded_)(folded_flops)
    counter.register_flop_formula(operators.folded_backward)(folded_backward_flops)


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
