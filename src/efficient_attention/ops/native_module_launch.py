"""The native kernels (native/module.c) as the folded module of ``streamed.py``: its signatures, gradients and shapes.

Sums are float32. Products take bfloat16 as it is where the processor can, as ``native_launch.py`` says. Sizes and
strides are put together once for each shape: on short inputs a good part of the time would be Python's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from . import native_build
from .chunks import module_chunk_length, sums_of_chunks
from .layout import empty_gradient, empty_like
from .native_calls import LONGEST_IN_CACHE, Argument, Problem, View, run

Biases = Sequence[Tensor | None]
Places = Sequence[Tensor | None]

# What lies in memory: views of tensors, and what has the size of a context.
_MAPS = ("source", "mask", "x", "output", "d_source", "d_x")
_PARAMETERS = ("weights", "biases", "d_weights", "d_biases")
_SUMMARY = ("pooled", "shift", "total", "column_sums")
_NOTHING = (None,) * 4


class _Module(ctypes.Structure):
    """As in native/module.c."""

    _fields_ = [
        *((name, Problem) for name in ("keys", "queries")),
        *((name, c_int64) for name in ("heads", "value_channels", "residual", "trains")),
        *((name, View) for name in _MAPS),
        *((name, View * 4) for name in _PARAMETERS),
    ]


# As in native/module.c; the last is scratch memory.
_Memory = c_void_p * (len(_MAPS) + 4 * len(_PARAMETERS) + len(_SUMMARY) + 1)


def folded(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and pooled inputs, shift, total and column sums, as :func:`.streamed.folded`."""
    output = empty_like(x)
    module = _Options(normalization, num_heads, residual)
    return output, *_forward(output, x, source, key_mask, weights, biases, module)


def folded_(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
) -> None:
    """:func:`folded`, written over x."""
    module = _Options(normalization, num_heads, residual)
    _forward(x, x, source, key_mask, weights, biases, module)


def folded_backward(
    d_output: Tensor,
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    normalization: str,
    num_heads: int,
    residual: bool,
    pooled: Tensor,
    shift: Tensor,
    total: Tensor,
    column_sums: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, of source, of the four weights, of the four biases, as :func:`.streamed.folded_backward`."""
    module = _Options(normalization, num_heads, residual, trains=needs[2])
    d_x = empty_gradient(x, needs[0])
    d_source = x.new_empty(0) if source is None else empty_gradient(source, needs[1])
    d_weights = [torch.empty_like(w) if needs[2] else None for w in weights]
    d_biases = [torch.empty_like(b) if needs[2] and b is not None else None for b in biases]
    written = list(d_biases)
    if normalization == "softmax":
        written[1] = None  # softmax over positions does not see it
        if d_biases[1] is not None:
            d_biases[1].zero_()
    elif d_biases[3] is not None:
        d_biases[3].copy_(d_output.sum((0, 2), dtype=torch.float32))
    to_x = d_x if needs[0] else None
    to_source = to_x if source is None else d_source if needs[1] else None
    maps = x if source is None else source, key_mask, x, d_output, to_source, to_x
    summary = [s.contiguous() for s in (pooled, shift, total, column_sums)]
    _call("module_backward", module, maps, (*weights, *biases, *d_weights, *written), summary)
    gradients = (d_x, d_source, *d_weights, *d_biases)
    return tuple(x.new_empty(0) if d is None else d for d in gradients)


class _Options(NamedTuple):
    """What a module is, beside its layers; and whether their gradients are wanted."""

    normalization: str
    num_heads: int
    residual: bool
    trains: bool = False


def _forward(
    output: Tensor,
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Biases,
    module: _Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes ``X + M^T rho_q(Q)`` into output, which may be x; returns what the backward pass asks for."""
    attended = x if source is None else source
    batch, channels, _ = attended.shape
    key_channels = len(weights[1])
    pooled = x.new_empty(batch, key_channels, channels, dtype=torch.float32)
    shift, total, column_sums = (pooled.new_empty(batch, key_channels) for _ in range(3))
    summary = pooled, shift, total, column_sums
    maps = attended, key_mask, x, output, None, None
    _call("module_forward", module, maps, (*weights, *biases, *_NOTHING, *_NOTHING), summary)
    if biases[3] is not None and module.normalization == "scaling":
        output.add_(biases[3].unsqueeze(-1))
    return summary


def _call(
    name: str,
    module: _Options,
    maps: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None],
    parameters: Places,
    summary: Sequence[Tensor],
) -> None:
    """Run a kernel; maps, parameters and summary in the order of their names."""
    source, mask, x, *written = maps
    if mask is not None:
        mask = mask.expand(
            len(source), -1
        )  # one row is read again for each sample: its stride is 0
    places = (source, mask, x, *written, *parameters)
    kind = native_build.load(), name, module, x.dtype, torch.get_num_threads()
    layouts = [None if place is None else place.stride() for place in places]
    key_weight, value_weight = parameters[1:3]
    assert key_weight is not None
    assert value_weight is not None
    sizes, numbers = _plan(
        *kind, x.shape, source.shape, len(key_weight), len(value_weight), *layouts
    )
    scratch = summary[0].new_empty(numbers)
    addresses = [None if place is None else place.data_ptr() for place in places]
    run(name, sizes, _Memory(*addresses, *(s.data_ptr() for s in (*summary, scratch))))


@functools.lru_cache(maxsize=1024)
def _plan(
    library: ctypes.CDLL,
    name: str,
    module: _Options,
    dtype: torch.dtype,
    threads: int,
    x: torch.Size,
    source: torch.Size,
    key_channels: int,
    value_channels: int,
    *layouts: tuple[int, ...] | None,
) -> tuple[Argument, int]:
    """The sizes and strides of a kernel's call, and how many numbers of scratch memory it takes."""

    def problem(shape: torch.Size, parts: int) -> Problem:
        batch, channels, positions = shape
        length = module_chunk_length(positions, key_channels, dtype.itemsize)
        sizes = positions, length, key_channels, channels
        together = sums_of_chunks(batch, *sizes, parts, threads=threads).together
        return Problem(
            *(batch, 1, *sizes[:2], together, key_channels, channels, module.num_heads),
            bfloat16=dtype == torch.bfloat16,
            softmax=module.normalization == "softmax",
            stream=batch * positions * max(sizes[2:]) * dtype.itemsize > LONGEST_IN_CACHE,
            threads=threads,
        )

    maps = [_map_view(strides) for strides in layouts[: len(_MAPS)]]
    parameters = [_parameter_view(strides) for strides in layouts[len(_MAPS) :]]
    layers = [(View * 4)(*parameters[i : i + 4]) for i in range(0, len(parameters), 4)]
    problems = problem(source, 1), problem(x, 2 if module.trains else 1)
    layer_sizes = module.num_heads, value_channels, module.residual, module.trains
    sizes = ctypes.byref(_Module(*problems, *layer_sizes, *maps, *layers))
    scratch = library[f"{name}_scratch"]
    scratch.restype = c_int64
    return sizes, scratch(sizes)


def _map_view(strides: tuple[int, ...] | None) -> View:
    """``[B, C, N]``, whose positions are those of one head, or a mask ``[B, M]``."""
    if strides is None:
        return View()
    batch, *channel, position = strides
    return View(None, batch, 0, position, *channel)


def _parameter_view(strides: tuple[int, ...] | None) -> View:
    """A weight ``[out, in]``, or a bias ``[out]``."""
    return View() if strides is None else View(None, 0, 0, *(0, *strides)[-2:])
