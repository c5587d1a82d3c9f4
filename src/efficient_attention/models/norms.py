"""Normalization layers by name, for networks that leave the choice to their user."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from .padding import PaddedGroupNorm

__all__ = ["norm_layer"]

_GROUPS = 32


def norm_layer(name: str, eps: float = 1e-5) -> Callable[[int], nn.Module]:
    """What builds a normalization over C channels of ``[B, C, H, W]``.

    Args:
        name: ``"batch"``; ``"frozen"``, batch normalization by constants, for pretrained weights and few pictures a
            device; ``"group"``, of 32 groups or as many as divide C, for training from scratch with few.
        eps: added to the variance.

    Raises:
        ValueError: an unknown name.
    """
    layers: dict[str, Callable[[int], nn.Module]] = {
        "batch": partial(nn.BatchNorm2d, eps=eps),
        "frozen": partial(FrozenBatchNorm2d, eps=eps),
        "group": lambda channels: PaddedGroupNorm(math.gcd(_GROUPS, channels), channels, eps=eps),
    }
    if name not in layers:
        raise ValueError(f"norm must be one of {tuple(layers)}; got {name!r}")
    return layers[name]
