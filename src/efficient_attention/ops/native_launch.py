"""The native kernels (native/operators.c) as the operators of ``blocked.py``: their signatures, gradients and shapes.

The kernels are called with addresses, strides and sizes, and allocate nothing but scratch memory; so all that is
returned is PyTorch's. Storage is float32 or bfloat16. Sums are float32, and products take bfloat16 as it is where the
processor can, so that then weights are rounded to it, as in the plain equations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from . import native_build
from .layout import empty_gradient, empty_output

DTYPES = (torch.float32, torch.bfloat16)
_Argument = Any  # what ctypes passes on, of types that it keeps to itself
# What is longer goes past the caches to memory: nobody would find it there.
_LONGEST_IN_CACHE = 8 << 20


class _Problem(ctypes.Structure):
    """Sizes, and what is asked for; as in native/blocks.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "positions")),
        *((name, c_int64) for name in ("key_channels", "value_channels", "groups")),
        *((name, c_int32) for name in ("bfloat16", "softmax", "stream", "threads")),
    ]


class _View(ctypes.Structure):
    """The memory of a tensor ``[B, H, N, D]`` and its strides; as in native/blocks.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "head", "position", "channel")),
    ]


def why_not(x: Tensor) -> str | None:
    """Why the native kernels cannot serve queries or keys ``x [B, H, N, Dk]``, or ``None`` if they can."""
    if x.device.type != "cpu":
        return f"it runs on CPUs; got {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it takes float32 and bfloat16; got {x.dtype}"
    return None if native_build.is_built() else native_build.why_not()


def is_preferred(x: Tensor) -> bool:
    """Whether ``"auto"`` takes the native kernels for ``x [B, H, N, Dk]``: they have been built, and serve it."""
    serves = x.device.type == "cpu" and x.dtype in DTYPES and native_build.is_built()
    return serves and not native_build.is_aside()


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean ``[B, H, Dk, Dv]`` and log_weight, shift, total ``[B, H, Dk]``, as :func:`.blocked.summarize`."""
    batch, heads, positions, key_channels = key.shape
    problem = _problem(key, value.shape[-1], normalization)
    sizes = batch, heads, key_channels
    weighted = key.new_empty(*sizes, value.shape[-1], dtype=torch.float32)
    shift, total = (key.new_empty(sizes, dtype=torch.float32) for _ in range(2))
    views = (_view(key), _view(value), _mask(key_mask, key))
    _run("summarize", problem, *views, _address(weighted), _address(shift), _address(total))
    if normalization == "scaling":
        total.fill_(positions)
        if key_mask is not None:
            total.copy_(key_mask.sum(-1, keepdim=True))
    # 1 where nothing has any weight: the heaviest key alone weighs 1, as does each that is counted.
    mean = weighted.div_(total.clamp(min=1).unsqueeze(-1))
    return mean, total.log() + shift, shift, total


def summarize_backward(
    d_mean: Tensor,
    d_log_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    mean: Tensor,
    shift: Tensor,
    total: Tensor,
    normalization: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to key and value, in their dtypes and layouts, as :func:`.blocked.summarize_backward`."""
    d_key, d_value = empty_gradient(key, needs[0]), empty_gradient(value, needs[1])
    total = total.clamp(min=1)
    correction = (d_mean * mean).sum(-1)  # [B, H, Dk]
    if d_log_weight is not None:
        correction = correction - d_log_weight
    correction = (correction / total).contiguous()
    d_mean = (d_mean / total.unsqueeze(-1)).contiguous()
    shift = shift.contiguous()
    _run(
        "summarize_backward",
        _problem(key, value.shape[-1], normalization),
        *(_view(key), _view(value), _mask(key_mask, key)),
        *(_address(d_mean), _address(shift), _address(correction)),
        *(_view(d_key if needs[0] else None), _view(d_value if needs[1] else None)),
    )
    return d_key, d_value


def attend(
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    out: Tensor | None = None,
) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``, as :func:`.blocked.attend`; ``out`` may be the query."""
    output = empty_output(query, mean.shape[-1]) if out is None else out
    mean = mean.contiguous()
    problem = _problem(query, mean.shape[-1], normalization, num_groups)
    _run("attend", problem, _view(query), _address(mean), _view(output))
    return output


def attend_backward(
    d_output: Tensor,
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to query and the context's mean, as :func:`.blocked.attend_backward`."""
    d_query, d_mean = empty_gradient(query, needs[0]), empty_gradient(mean, needs[1])
    sums = d_mean.contiguous()
    mean = mean.contiguous()
    _run(
        "attend_backward",
        _problem(query, mean.shape[-1], normalization, num_groups),
        *(_view(d_output), _view(query), _address(mean)),
        *(_view(d_query if needs[0] else None), _address(sums if needs[1] else None)),
    )
    return d_query, d_mean if sums is d_mean else d_mean.copy_(sums)


def _run(name: str, *arguments: object) -> None:
    if getattr(native_build.load(), name)(*arguments) != 0:
        raise MemoryError(f"the native kernels have no memory for the scratch space of {name}")


def _problem(x: Tensor, value_channels: int, normalization: str, num_groups: int = 1) -> _Argument:
    batch, heads, positions, channels = x.shape
    longest = batch * heads * positions * max(channels, value_channels) * x.itemsize
    return byref(
        _Problem(
            *(batch, heads, positions, channels, value_channels, num_groups),
            bfloat16=x.dtype == torch.bfloat16,
            softmax=normalization == "softmax",
            stream=longest > _LONGEST_IN_CACHE,
            threads=torch.get_num_threads(),
        )
    )


def _view(x: Tensor | None) -> _Argument:
    return byref(_View() if x is None else _View(x.data_ptr(), *x.stride()))


def _mask(mask: Tensor | None, key: Tensor) -> _Argument:
    # A mask of one row or head is read again for each: its stride is 0.
    return _view(None if mask is None else mask.expand(*key.shape[:3]).unsqueeze(-1))


def _address(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())
