"""In which precision sums are kept, and how autocast is kept out of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and contexts: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the factors of products over positions.

    bfloat16 for bfloat16, whose products are twice as fast or more. Not float16 for float16: weighted sums of values
    may exceed its largest number, 65,504.
    """
    return dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast would choose the precision of products on a device; it knows no meta device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region in which the dtypes of products are those of their inputs."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()
