"""Tiles that are timed where they run: off unless asked for, few, and remembered on disk.

Without it ``tiling.py`` decides, by counting. A tile that was timed differs from that in one thing (the positions of a
block, warps, or stages), so that memory, chunks and programs stay as they are. Blocks of other lengths round otherwise:
with it on, the last bits of a result depend on what was fastest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import replacing
from .tiling import Tile, candidates

__all__ = ["autotune", "chosen", "is_on"]

_REPETITIONS = 10

_folder: Path | None = None
_known: dict[str, Tile] = {}


def autotune(enabled: bool = True, *, folder: str | Path | None = None) -> None:
    """Have each Triton kernel time up to seven tiles when it first meets a kind of call, and keep to the fastest.

    A kind of call is a kernel with its dtypes, channels and options, which strides are 1, and the power of two of its
    programs, on a GPU of one name and by one version of triton. It is timed once, in some tenths of a second, most of
    which compiles; later processes read the result. Nothing is timed while a CUDA graph is captured.

    Args:
        enabled: whether kernels are timed from now on, or run as ``tiling.py`` says.
        folder: where results are kept; default: ``tiles`` in ``~/.cache/efficient-attention``, or in
            ``$XDG_CACHE_HOME/efficient-attention``.

    Example:
        >>> autotune()
        >>> autotune(False)

    Not part of the paper.
    """
    global _folder
    _known.clear()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    _folder = Path(folder or cache / "efficient-attention" / "tiles") if enabled else None


def is_on() -> bool:
    return _folder is not None


def chosen(
    tile: Tile,
    kind: Mapping[str, Any],
    device: torch.device,
    run: Callable[[Tile], None] | None,
    too_large: type[Exception],
) -> Tile:
    """The fastest tile for a kind of call; ``tile`` itself if nothing is or can be timed.

    Args:
        tile: what is taken without timing, and the first that is timed.
        kind: what tells this kind of call from others, that JSON can hold.
        device: where it runs.
        run: runs it in blocks of a tile, any number of times to the same effect; ``None``: it must not be repeated.
        too_large: what ``run`` raises for a tile that the device has no room for.
    """
    assert _folder is not None, "it is on"
    key = json.dumps({**kind, "tile": tile, **_where(device)}, sort_keys=True)
    path = _folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if key not in _known and path.exists():
        _known[key] = Tile(*json.loads(path.read_text())["tile"])
    if key not in _known:
        if run is None or _is_captured(device):
            return tile
        seconds = {t: _seconds(partial(run, t), device, too_large) for t in candidates(tile)}
        _known[key] = min(seconds, key=lambda t: seconds[t])
        _remember(path, key, seconds, _known[key])
    return _known[key]


def _remember(path: Path, key: str, seconds: Mapping[Tile, float], tile: Tile) -> None:
    """Written whole, for other processes may be at it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timed = [[*t, s if math.isfinite(s) else None] for t, s in seconds.items()]
    record = {"tile": tile, "kind": json.loads(key), "seconds": timed}
    with replacing(path) as file:
        file.write(json.dumps(record, indent=2).encode())


def _seconds(run: Callable[[], None], device: torch.device, too_large: type[Exception]) -> float:
    """Of one call, the median; the first, which compiles, is not counted."""
    try:
        run()
    except too_large:
        return math.inf
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    seconds = []
    for _ in range(_REPETITIONS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        seconds.append(first.elapsed_time(last) / 1000)
    return statistics.median(seconds)


def _where(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "triton": metadata.version("triton")}


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
