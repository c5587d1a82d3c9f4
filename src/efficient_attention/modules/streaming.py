"""When a module runs as one operator that streams over positions, and how; see ops/streamed.py.

In the folded order, where an operator serves the device and nobody would notice: what stands for no layer that has
hooks, a parametrization or a class of its own, no transform and no recorded program, which run the module step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..ops import Context, backends, library
from ..ops.functional import is_traced
from ..ops.layout import share_memory
from ..ops.precision import autocast_is_on
from .features import Projection
from .folding import obstacle

if TYPE_CHECKING:
    from .projected import EfficientModule


def can_stream(module: EfficientModule) -> bool:
    """Whether the folded order of a module is streamed, as far as its layers and the call in progress tell."""
    layers = _layers(module)
    if any(obstacle(layer, module._features.projection) is not None for layer in layers):
        return False
    parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
    first = parameters[0]
    weights = [layer.weight for layer in layers]
    return (
        backends.serves_module(weights, module.num_heads, module.backend)
        and all(_is_plain(p) and p.dtype == first.dtype for p in parameters)
        and not autocast_is_on(first.device)
        # A program that is exported or traced must run where this package is not installed.
        and not (torch.compiler.is_exporting() or is_traced())
        and library.serves_plain_tensors_only() is None
    )


def takes(module: EfficientModule, x: Tensor) -> bool:
    """Whether an input is one that the operator takes."""
    weight = module.keys.weight
    return x.dtype == weight.dtype and x.device == weight.device and _is_plain(x)


def records_gradients(module: EfficientModule, x: Tensor, source: Tensor | Context) -> bool:
    """Whether a call is recorded for a backward pass, which needs the input as it is."""
    if not torch.is_grad_enabled():
        return False
    sources = source if isinstance(source, Context) else (source,)
    return any(t.requires_grad for t in (x, *sources, *module.parameters()))


def stream(
    module: EfficientModule, x: Tensor, source: Tensor, key_mask: Tensor | None, *, overwrite: bool
) -> Tensor:
    """The output of a module for ``x`` attending to ``source``; ``key_mask`` is ``[B, M]``.

    ``overwrite``: it may be written over x, and is where ``x [B, C, n]`` is a view; no gradient is recorded.
    """
    features, (weights, biases) = module._features, _parameters(module)
    positions = features.positions(x)
    attended = None if source is x else features.positions(source)
    options = (module.normalization, module.num_heads, module.residual)
    arguments = (positions, attended, key_mask, weights, biases, *options)
    named = {"backend": module.backend}
    if overwrite and share_memory(positions, x):
        library.folded_(*arguments, **named)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
        return x
    output, *_ = library.folded(*arguments, **named)
    return features.restore(output, like=x)


def _layers(module: EfficientModule) -> tuple[Projection, ...]:
    return module.queries, module.keys, module.values, module.reprojection


def _parameters(module: EfficientModule) -> tuple[list[Tensor], list[Tensor | None]]:
    layers = _layers(module)
    return [layer.weight.flatten(1) for layer in layers], [layer.bias for layer in layers]


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) or isinstance(x, FakeTensor)
