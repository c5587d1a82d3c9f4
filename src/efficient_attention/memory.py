"""Peak memory of a computation, counted exactly from what the allocators report."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

# The profiler's own chatter; read when the profiler first runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``function()`` holds at one time, beyond those alive before the call.

    On the CPU every allocation and release is recorded, temporaries inside PyTorch's own operators included, so the
    count is deterministic. With a GPU in use, its allocator's peak is added. What the call returns counts.

    Args:
        function: called once, without arguments.

    Returns:
        Bytes.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).sum())
        4004

    Not part of the paper; its claim on memory (Sec. 3.2, O(d n + d^2)) is checked with this.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    peak = alive = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
    if cuda:
        torch.cuda.synchronize()
        peak += torch.cuda.max_memory_allocated() - before
    return peak
