"""In which precision sums are kept, and how autocast is kept out of them."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and contexts: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the factors of products over positions, of inputs of a dtype.

    bfloat16 for bfloat16, whose products are twice as fast or more; but on processors that do not multiply it, where
    PyTorch's take ten times as long. Not float16 for float16: weighted sums of values may exceed its largest number,
    65,504.
    """
    if dtype == torch.bfloat16 and (device.type != "cpu" or multiplies_bfloat16()):
        return dtype
    return accumulation_dtype(dtype)


def is_widened(x: Tensor) -> bool:
    """Whether the numbers of a tensor are multiplied in a wider dtype."""
    return product_dtype(x.dtype, x.device) != x.dtype


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has matrix products of bfloat16 in oneDNN, PyTorch's library of them."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast would choose the precision of products on a device; it knows no meta device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region in which the dtypes of products are those of their inputs."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()
