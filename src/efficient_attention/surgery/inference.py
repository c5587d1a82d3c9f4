"""What flows at a place, found by running a copy of the model on fake tensors: its layout, its channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .hosts import CHILD, appends, iterates


def observe_outputs(model: nn.Module, names: list[str], example: Any) -> dict[str, list[Any]]:
    """What modules return, call by call, when a copy of the model runs on fake tensors."""
    way = f"give in_channels= and dimensions= at {', '.join(map(repr, names))}"
    if example is None:
        raise ValueError(f"example must be an input of the model, to infer from; or {way}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    iterating = set()
    failure: Exception | None = None
    try:
        tensors = (*model.parameters(), *model.buffers())
        twin = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors}).eval()
        for name in names:
            host = twin.get_submodule(name)
            host.register_forward_hook(lambda _m, _i, out, name=name: outputs[name].append(out))
            if not appends(host):
                probe = nn.Identity()
                probe.register_forward_pre_hook(lambda _m, _i, name=name: iterating.add(name))
                host.register_module(CHILD, probe)
        fake = tree_map_only(Tensor, mode.from_tensor, example)
        args = fake if isinstance(fake, tuple) else () if isinstance(fake, dict) else (fake,)
        with mode, torch.no_grad():
            twin(*args, **(fake if isinstance(fake, dict) else {}))
    except Exception as error:
        # What needs values, as detection heads do, ends the run: no harm once all places were seen.
        failure = error
    for name in names:
        if name in iterating:
            raise ValueError(f"{name!r} is no place: {iterates(model.get_submodule(name))}")
        if not outputs[name]:
            why = f" before {type(failure).__name__}: {failure}" if failure else " in eval mode"
            raise ValueError(f"example must call {name!r}; it does not{why}; or {way}") from failure
    return outputs


def layout(model: nn.Module, name: str, options: dict[str, Any], output: Any) -> tuple[Any, int]:
    """Dimensions and channels of what a place returns."""
    if not isinstance(output, Tensor):
        got = type(output).__name__ + (f" of {list(output)}" if isinstance(output, Mapping) else "")
        raise TypeError(
            f"{name!r} must return a tensor; got {got}. Name one in or behind it; nn.MultiheadAttention: replace()"
        )
    shape, channels = tuple(output.shape), options.get("in_channels")
    dimensions: Any = options.get("dimensions")
    if dimensions is None:
        axis = _channel_axis(model.get_submodule(name), channels, shape)
        tokens = len(shape) == 3 and all(getattr(m, "batch_first", True) for m in model.modules())
        if axis == 0 or (axis == -1 and len(shape) == 3 and not tokens):
            raise ValueError(
                f"{name!r} must return [B, C, ...] or [B, ..., C] of 1 to 3 dimensions, or batch-first tokens "
                f"[B, N, C]; got {shape}, which the layers in it do not show to be one. Give dimensions, or choose "
                "another place"
            )
        last = "tokens" if len(shape) == 3 else "channels_last"
        dimensions = last if axis == -1 else len(shape) - 2
    ranks = {"tokens": (3,), "channels_last": (3, 4, 5)}.get(dimensions) or (2 + dimensions,)
    axis = 1 if isinstance(dimensions, int) else -1
    if len(shape) not in ranks or channels not in (None, shape[axis]):
        raise ValueError(f"{name!r} must return what fits {options}; got {shape}")
    return dimensions, shape[axis]


def _channel_axis(host: nn.Module, channels: Any, shape: tuple) -> int:
    """1 or -1, or 0 for unknown: ``[B, C, L]`` and ``[B, N, C]`` look alike, but the host's layers are made for C."""
    second, last = [channels], [channels]
    for module in host.modules():
        second += [getattr(module, a, None) for a in ("out_channels", "num_features")]
        last += [getattr(module, a, None) for a in ("out_features", "embedding_dim", "embed_dim")]
        normalized = getattr(module, "normalized_shape", ())
        last += normalized if len(normalized) == 1 else ()
    if len(shape) not in (3, 4, 5):
        return 0
    # Layers of the right kind count first; then any, as a convolution whose output is flattened to tokens.
    for of_second, of_last in ((second, last), (second + last, second + last)):
        if shape[1] in of_second and shape[-1] not in of_last:
            return 1
        if shape[-1] in of_last and shape[1] not in of_second:
            # As many rows as channels: a layer made for C says nothing of which is which.
            return 0 if len(shape) > 3 and shape[1] == shape[-1] else -1
    return 1 if len(shape) > 3 else 0


def placement(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the host's last parameter, or of what encloses it."""
    for parameter in reversed(list(model.get_submodule(name).parameters())):
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return placement(model, name.rpartition(".")[0]) if name else {}
