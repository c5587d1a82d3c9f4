"""Which axis of a feature map holds channels: layers are made for a number of channels, and so tell.

``[B, C, L]`` and ``[B, N, C]`` look alike, and so do ``[B, C, H, W]`` and ``[B, H, W, C]``. Convolutions have channels
second, linear layers last; a place without layers of its own, as an activation, is as the modules before and around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_SECOND = ("out_channels", "num_features")
_LAST = ("out_features", "embedding_dim", "embed_dim")
# What takes a number of channels shows the layout as well, around a place but not in it.
_INPUTS = ("in_channels",), ("in_features",)


def channel_axis(model: nn.Module, name: str, channels: Any, shape: tuple[int, ...]) -> int:
    """1 or -1, or 0 for unknown.

    Args:
        model: the model.
        name: of the place.
        channels: their number, where it is given: the last thing to go by, since it may be wrong.
        shape: of what the place returns.
    """
    if len(shape) not in (3, 4, 5):
        return 0
    axis = _from_numbers(model, name, shape)
    if axis is None:
        axis = _from_kinds(model, name) if len(shape) > 3 else 0
    if axis == 0:
        fitting = [a for a in (1, -1) if shape[a] == channels]
        axis = fitting[0] if len(fitting) == 1 else 0
    return axis


def _from_numbers(model: nn.Module, name: str, shape: tuple[int, ...]) -> int | None:
    """The axis with as many entries as nearby layers have channels; 0 if both may be, ``None`` if neither."""
    for module, is_parent in _nearest_first(model, name):
        second, last = _numbers(module.modules(), _SECOND), _numbers(module.modules(), _LAST)
        final = (second + last)[-1:] if not (second and last) else []
        if is_parent:
            second += _numbers(module.modules(), _INPUTS[0])
            last += _numbers(module.modules(), _INPUTS[1])
        if shape[1] in second and shape[-1] not in last:
            return 1
        if shape[-1] in last:
            if shape[1] in second or (len(shape) > 3 and shape[1] == shape[-1]):
                return 0
            if len(shape) == 3 or shape[1] not in last:
                return -1
            # Channel attention in a convolutional network may be as narrow as a small map is wide.
            continue
        # A convolution whose output is flattened to tokens, or a linear layer whose output is transposed.
        if not is_parent and shape[1] != shape[-1] and {shape[1], shape[-1]} & {*final}:
            converted = -1 if shape[-1] in final else 1
            # With more axes it may as well be a coincidence.
            return converted if len(shape) == 3 else 0
    return None


def _from_kinds(model: nn.Module, name: str) -> int:
    """The axis of which alone the nearest layers are, whatever their numbers: what concatenates has its own."""
    for module, is_parent in _nearest_first(model, name):
        second, last = _numbers(module.modules(), _SECOND), _numbers(module.modules(), _LAST)
        if second and not last:
            return 1
        if last and not second:
            return -1
        if is_parent and (second or last):
            return 0
    return 0


def _nearest_first(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, bool]]:
    """The place, those before it in its parent, the parent, those before that; and whether it is around the place."""
    yield model.get_submodule(name), False
    while name:
        name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(name)
        children = [*parent._modules]
        before = reversed(children[: children.index(leaf)])
        siblings = (parent._modules[child] for child in before)
        yield from ((sibling, False) for sibling in siblings if sibling is not None)
        yield parent, True


def _numbers(layers: Iterable[nn.Module], attributes: Iterable[str]) -> list[int]:
    found = []
    for layer in layers:
        found += [getattr(layer, a) for a in attributes if isinstance(getattr(layer, a, None), int)]
        normalized = getattr(layer, "normalized_shape", ())
        # A LayerNorm of several axes, perhaps of all, may have channels in any.
        if attributes is _LAST and len(normalized) == 1:
            found += normalized
    return found
