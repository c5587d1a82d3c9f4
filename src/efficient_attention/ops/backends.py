"""Which implementation computes an operator: the one that ``backend`` names, or what serves the tensors best."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import blocked, native_launch, native_module_launch, streamed
from .precision import DTYPES, without_autocast
from .tiling import why_not, why_not_module

# What "auto" is on a GPU. To be "triton", where that serves the call, once a GPU has shown the kernels to be right and
# faster; so far they have run in Triton's interpreter alone: docs/gpu.md.
AUTO_ON_CUDA = "blocked"


def implementation(automatic: str, name: str) -> Callable:
    """An operator by the backend that is named; for ``"auto"`` by ``automatic`` where that serves the call.

    It keeps an active autocast from choosing the precision of the products inside.
    """

    @functools.wraps(getattr(_file_of("blocked", name), name))
    def run(*args: Any, backend: str = "auto") -> Any:
        device, chosen = args[0].device, backend
        if backend == "auto":
            chosen = "native" if _is_preferred(name, *args) else automatic
        if chosen != "blocked" and (reason := _why_not(chosen, name, *args)):
            if backend == chosen:
                raise NotImplementedError(f"backend={backend!r}: {reason}; use backend='auto'")
            chosen = "blocked"
        with without_autocast(device):
            return getattr(_file_of(chosen, name), name)(*args)

    return run


def on_cpu(x: Tensor) -> ModuleType:
    """The implementation that ``"auto"`` is on a CPU, for queries or keys ``x [B, H, N, Dk]``."""
    return native_launch if native_launch.is_preferred(x) else blocked


def serves_module(weights: Sequence[Tensor], num_heads: int, backend: str) -> bool:
    """Whether ``folded`` serves a module with these weights as one operator, or its steps are better run one by one."""
    device, dtype = weights[0].device, weights[0].dtype
    if backend == "auto":
        backend = AUTO_ON_CUDA if device.type == "cuda" else "blocked"
    if backend == "triton":
        return (_why_not_on(device) or _why_not_folded(weights, num_heads)) is None
    # Whether the machine has the native kernels is for the operator to say: here programs are traced.
    return backend in ("blocked", "native") and device.type == "cpu" and dtype in DTYPES


def _is_preferred(name: str, *args: Any) -> bool:
    """Whether the native kernels are what ``"auto"`` is."""
    return native_launch.is_preferred(_POSITIONS[name](*args))


def _why_not(backend: str, name: str, *args: Any) -> str | None:
    """Why kernels cannot serve a call of an operator, or ``None`` if they can."""
    if backend == "triton":
        return _why_not_on(args[0].device) or _OBSTACLES[name](*args)
    return native_launch.why_not(_POSITIONS[name](*args))


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        # In Triton's interpreter, which is for tests, kernels run on any device.
        from .triton_blocks import INTERPRETED

        return None if INTERPRETED else f"it runs on CUDA devices; got {device.type}"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs; this torch is for those of AMD"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0; this device has {major}.{minor}"
    return None


def _file_of(backend: str, name: str) -> ModuleType:
    """What computes an operator; its names are those of the operators."""
    module = name.startswith("folded")
    if backend == "blocked":
        return streamed if module else blocked
    if backend == "native":
        return native_module_launch if module else native_launch
    # They import triton, which is optional and slow to load.
    if module:
        from . import triton_module_launch

        return triton_module_launch
    from . import triton_launch

    return triton_launch


def _why_not_folded(weights: Sequence[Tensor], num_heads: int) -> str | None:
    """Why the Triton kernels cannot serve a folded module with these weights, or ``None`` if they can."""
    key_channels, channels = weights[0].shape[:2]
    return why_not_module(weights[0].dtype, key_channels, channels, num_heads)


# Queries, keys or features among the arguments of each operator.
_POSITIONS: dict[str, Callable[..., Tensor]] = {
    "summarize": lambda key, *_: key,
    "summarize_backward": lambda d_mean, d_log_weight, key, *_: key,
    "attend": lambda query, *_: query,
    "attend_backward": lambda d_output, query, *_: query,
    "folded": lambda x, *_: x,
    "folded_": lambda x, *_: x,
    "folded_backward": lambda d_output, x, *_: x,
}
# For each operator, why the Triton kernels do not serve its arguments.
_OBSTACLES: dict[str, Callable[..., str | None]] = {
    "summarize": lambda key, value, *_: why_not(key.dtype, key.shape[-1], value.shape[-1], 1),
    "summarize_backward": lambda d_mean, d_log_weight, *args: _OBSTACLES["summarize"](*args),
    "attend": lambda query, mean, normalization, num_groups: why_not(
        query.dtype, query.shape[-1], mean.shape[-1], num_groups
    ),
    "attend_backward": lambda d_output, *args: _OBSTACLES["attend"](*args[:4]),
    "folded": lambda x, source, mask, weights, biases, normalization, num_heads, *_: (
        _why_not_folded(weights, num_heads)
    ),
    "folded_": lambda *args: _OBSTACLES["folded"](*args),
    "folded_backward": lambda d_output, *args: _OBSTACLES["folded"](*args),
}
