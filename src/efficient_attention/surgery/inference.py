"""What flows at a place, found by running a copy of the model on fake tensors: its layout, its channels, its dtype."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from .evidence import channel_axis
from .hosts import CHILD, appends, iterates

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def observe_outputs(
    model: nn.Module, names: list[str], example: Any, known: Collection[str]
) -> dict[str, list[Any]]:
    """What modules return, call by call, when a copy of the model runs on fake tensors.

    A name in ``known``, whose channels and dimensions are given, is without calls where the run needs values before
    it: they are taken as given.
    """
    unknown = [name for name in names if name not in known]
    way = f"give in_channels= and dimensions= at {', '.join(map(repr, unknown))}"
    way = way if unknown else "give no example"
    if example is None:
        raise ValueError(f"example must be an input of the model, to infer from; or {way}")
    outputs, iterating, failure = _dry_run(model, names, example)
    for name in names:
        if name in iterating:
            raise ValueError(f"{name!r} is no place: {iterates(model.get_submodule(name))}")
        if not outputs[name] and not (name in known and isinstance(failure, _NEEDS_VALUES)):
            why = f" before {type(failure).__name__}: {failure}" if failure else " in eval mode"
            raise ValueError(f"example must call {name!r}; it does not{why}; or {way}") from failure
    return outputs


def _dry_run(
    model: nn.Module, names: list[str], example: Any
) -> tuple[dict[str, list[Any]], set[str], Exception | None]:
    """The outputs of modules, which of them go over their children, and what ended the run early."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    iterating: set[str] = set()
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
        return outputs, iterating, error
    return outputs, iterating, None


def layout(model: nn.Module, name: str, options: dict[str, Any], output: Any) -> tuple[Any, int]:
    """Dimensions and channels of what a place returns."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = type(output).__name__ + (f" of {list(output)}" if isinstance(output, Mapping) else "")
        got = f"one of {output.dtype}" if isinstance(output, Tensor) else got
        raise TypeError(
            f"{name!r} must return a tensor of real numbers; got {got}. Name one in or behind it; "
            "nn.MultiheadAttention: replace()"
        )
    shape, channels = tuple(output.shape), options.get("in_channels")
    dimensions: Any = options.get("dimensions")
    if dimensions is None:
        axis = channel_axis(model, name, channels, shape)
        tokens = len(shape) == 3 and all(getattr(m, "batch_first", True) for m in model.modules())
        if axis == 0 or (axis == -1 and len(shape) == 3 and not tokens):
            raise ValueError(
                f"{name!r} must return [B, C, ...] or [B, ..., C] of 1 to 3 dimensions, or batch-first tokens "
                f"[B, N, C]; got {shape}, which the layers in it and around it do not show to be one. Give dimensions= "
                "(or in_channels=, where one axis alone has as many), or choose another place"
            )
        last = "tokens" if len(shape) == 3 else "channels_last"
        dimensions = last if axis == -1 else len(shape) - 2
    ranks = {"tokens": (3,), "channels_last": (3, 4, 5)}.get(dimensions) or (2 + dimensions,)
    axis = 1 if isinstance(dimensions, int) else -1
    if len(shape) not in ranks or channels not in (None, shape[axis]):
        raise ValueError(f"{name!r} must return what fits {options}; got {shape}")
    return dimensions, shape[axis]


def placement(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the host's last parameter, or of what encloses it."""
    for parameter in reversed(list(model.get_submodule(name).parameters())):
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return placement(model, name.rpartition(".")[0]) if name else {}
