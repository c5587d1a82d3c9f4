"""Memory: the peak of a computation, counted exactly from what the allocators report, and what a device has."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

__all__ = ["available_bytes", "device_bytes", "peak_bytes", "refuse_beyond"]


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
    # The profiler's own chatter; read when the profiler first runs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
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


def device_bytes(device: torch.device) -> int | None:
    """All the memory that a device has, used or not: on the CPU within the limits of the process's control group.

    Args:
        device: a CPU or CUDA device.

    Returns:
        Bytes, or ``None`` where it cannot be told.

    Example:
        >>> device_bytes(torch.device("cpu")) > 2**20
        True

    Not part of the paper.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _machine_bytes() if device.type == "cpu" else None


def available_bytes(device: torch.device) -> int | None:
    """The memory of a device that can be had now: what nobody uses, and caches that the system would give up.

    Args:
        device: a CPU or CUDA device.

    Returns:
        Bytes, on the CPU within the limits of the process's control group; ``None`` where it cannot be told.

    Example:
        >>> available_bytes(torch.device("cpu")) <= device_bytes(torch.device("cpu"))
        True

    Not part of the paper.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    there = [1024 * int(found[1])] if found else []
    return min([*there, *_control_group_room()], default=_machine_bytes())


def refuse_beyond(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Raise an error in place of an allocation that a device cannot hold, for which the system may end the process.

    Args:
        needed: bytes of the allocation.
        device: where it is made.
        what: names the allocation, as the subject of a sentence.
        way_out: what to do instead, as a sentence without its full stop.

    Raises:
        MemoryError: ``needed`` is more than all of the device's memory.

    Example:
        >>> refuse_beyond(2**60, torch.device("cpu"), "the map", "Use another")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        MemoryError: the map takes 1,073,741,824.0 GiB, and cpu has ... GiB in all. Use another

    Not part of the paper.
    """
    there = device_bytes(device)
    if there is not None and needed > there:
        raise MemoryError(
            f"{what} takes {needed / 2**30:,.1f} GiB, and {device} has {there / 2**30:,.1f} GiB in all. {way_out}"
        )


@functools.cache
def _machine_bytes() -> int | None:
    try:
        physical = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        # Not a POSIX system, or one that does not tell.
        physical = []
    return min([*physical, *_control_group_limits()], default=None)


def _control_group_limits(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Limits of memory, in bytes, of the control groups that this process is in and of those around them."""
    return [limit for _, limit in _limited_control_groups(membership, mount)]


def _control_group_room(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that each of these groups may still take, what its caches hold included."""
    room = []
    for file, limit in _limited_control_groups(membership, mount):
        name = {"memory.max": "memory.current"}.get(file.name, "memory.usage_in_bytes")
        used, stat = _text(file.with_name(name)), _text(file.with_name("memory.stat"))
        counts = {key: int(count) for key, count in re.findall(r"^(\w+) (\d+)$", stat, re.M)}
        # In version 1 the groups inside count under names of their own.
        total = "total_" if "total_active_file" in counts else ""
        caches = sum(counts.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
        if used.isdigit():
            room.append(min(limit, limit - int(used) + caches))
    return room


def _limited_control_groups(membership: Path, mount: Path) -> list[tuple[Path, int]]:
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    files = []
    for _, controllers, group in groups:
        # Version 2 has one hierarchy, whose line names no controllers; version 1 has one for memory.
        root, name = (
            (mount, "memory.max")
            if not controllers
            else (mount / "memory", "memory.limit_in_bytes")
        )
        if not controllers or "memory" in controllers.split(","):
            inside = PurePosixPath(group.lstrip("/"))
            files += [root / around / name for around in (inside, *inside.parents)]
    limits = [(file, _text(file)) for file in files]
    return [(file, int(text)) for file, text in limits if text.isdigit()]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
