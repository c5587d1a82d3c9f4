"""Where channels and positions lie: tokens ``[B, N, C]`` and feature maps ``[B, C, *spatial]``.

A module computes on heads ``[B, h, n, c / h]``. Both layouts give them as views, whatever the memory format, and
the operators write their results in the memory order of their inputs, so that joining heads is a view again. Where
heads do not matter both are ``[B, C, n]``, ``positions``, again as views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Projection = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Tokens:
    """``[B, N, C]``: channels last, projected by ``nn.Linear``."""

    shape = "[B, N, C]"
    projection = nn.Linear

    def build_projection(self, in_channels: int, out_channels: int, **options: Any) -> Projection:
        return nn.Linear(in_channels, out_channels, **options)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, h, N, C / h]

    def join(self, heads: Tensor, like: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(2)  # [B, N, C]

    def positions(self, x: Tensor) -> Tensor:
        return x.mT  # [B, C, N]

    def restore(self, positions: Tensor, like: Tensor) -> Tensor:
        return positions.mT  # [B, N, C]

    def key_mask(self, mask: Tensor, like: Tensor) -> Tensor:
        return _checked_mask(mask, "[B, N]", like.shape[:2])

    def count(self, x: Tensor) -> int:
        return x.shape[1]

    def check(self, name: str, x: Tensor, channels: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {self.shape}; got {type(x).__name__}")
        if x.dim() != 3 or x.shape[-1] != channels:
            raise ValueError(
                f"{name} must have shape {self.shape} with C = {channels}; got {tuple(x.shape)}"
            )


@dataclass(frozen=True)
class FeatureMaps:
    """``[B, C, *spatial]`` of 1 to 3 dimensions: channels second, projected by convolutions of kernel size 1."""

    dimensions: int

    @property
    def shape(self) -> str:
        return "[B, C, " + ", ".join(("D", "H", "W")[-self.dimensions :]) + "]"

    @property
    def projection(self) -> type[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dimensions - 1]

    def build_projection(self, in_channels: int, out_channels: int, **options: Any) -> Projection:
        return self.projection(in_channels, out_channels, kernel_size=1, **options)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1](x, weight, bias)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.flatten(2).unflatten(1, (heads, -1)).mT  # [B, h, n, C / h]

    def positions(self, x: Tensor) -> Tensor:
        if _is_channels_last(x):
            return x.movedim(1, -1).flatten(1, -2).mT
        return x.flatten(2)  # [B, C, n]

    def restore(self, positions: Tensor, like: Tensor) -> Tensor:
        return positions.unflatten(2, like.shape[2:])  # [B, C, *spatial]

    def join(self, heads: Tensor, like: Tensor) -> Tensor:
        if _is_channels_last(like):
            joined = heads.transpose(1, 2).flatten(2).mT  # [B, C, n]
        else:
            joined = heads.mT.flatten(1, 2)  # [B, C, n]
        return joined.unflatten(2, like.shape[2:])  # [B, C, *spatial]

    def key_mask(self, mask: Tensor, like: Tensor) -> Tensor:
        shape = (like.shape[0], *like.shape[2:])
        return _checked_mask(mask, self.shape.replace("C, ", ""), shape).flatten(1)

    def count(self, x: Tensor) -> int:
        return math.prod(x.shape[2:])  # Size.numel() would make a traced size a constant

    def check(self, name: str, x: Tensor, channels: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {self.shape}; got {type(x).__name__}")
        if x.dim() != 2 + self.dimensions or x.shape[1] != channels:
            raise ValueError(
                f"{name} must have shape {self.shape} with C = {channels}; got {tuple(x.shape)}"
            )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) < x.stride(-1)


Features = Tokens | FeatureMaps


def coarsen(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask at another resolution: a position is True if any pixel that it stands for is.

    Strides are taken to be powers of two where these give ``size``, as in most networks: a map of stride s has
    ``ceil(extent / s)`` positions, also for the part of it that one picture of a batch takes.

    Args:
        mask: bool ``[B, *spatial]`` of 1 to 3 dimensions.
        size: the extents wanted.

    Returns:
        bool ``[B, *size]``.

    Example:
        >>> coarsen(torch.tensor([[True, True, True, False, False, False]]), (3,))
        tensor([[ True,  True, False]])

    Not part of the paper.
    """
    extents = tuple(mask.shape[1:])
    if extents == tuple(size):
        return mask
    pixels = mask.unsqueeze(1).float()
    found = [_stride(extent, wanted) for extent, wanted in zip(extents, size, strict=True)]
    strides = [stride for stride in found if stride]
    if len(strides) == len(found):
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(size) - 1]
        return pool(pixels, strides, strides, ceil_mode=True).squeeze(1) > 0
    adaptive = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
    return adaptive[len(size) - 1](pixels, size).squeeze(1) > 0


def _stride(extent: int, wanted: int) -> int | None:
    """A stride that makes ``wanted`` positions of ``extent`` pixels."""
    candidates = [1 << power for power in range(16)]
    if wanted:
        candidates.append(-(-extent // wanted))
    return next((stride for stride in candidates if -(-extent // stride) == wanted), None)


def _checked_mask(mask: Tensor, letters: str, shape: Sequence[int]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_mask must be a bool tensor {letters}; got {got}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"key_mask must have shape {letters} = {tuple(shape)}; got {tuple(mask.shape)}"
        )
    return mask
