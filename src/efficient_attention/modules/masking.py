"""One mask for all attention in a network, at whatever resolution each works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .channels_last import EfficientAttentionChannelsLast
from .diffusion import DiffusionEfficientAttention
from .features import FeatureMaps
from .non_local import EfficientNonLocal
from .projected import ProjectedAttention

__all__ = ["attention_over", "masked"]


@contextmanager
def masked(model: nn.Module, key_mask: Tensor | None) -> Iterator[None]:
    """Inside this context, no attention over feature maps in a model attends to masked positions of its input.

    A batch of pictures of several sizes is padded to the largest; without a mask, what attends to all positions attends
    to padding, and a picture's result depends on its batch mates. A network passes no mask along; this does. A mask
    that is given to a module itself goes first. Not for two threads on one model at a time.

    Args:
        model: any module with attention over feature maps inside, however it came there: that of :func:`insert` and
            :func:`replace`, but for attention on tokens.
        key_mask: bool ``[B, *spatial]``, True = attend, at the resolution of the model's input. Attention of the same
            number of dimensions takes it at its own resolution: a position counts if any pixel that it stands for does.
            None: no mask.

    Raises:
        TypeError: ``key_mask`` is not a bool tensor.
        ValueError: there is no attention of its number of dimensions in the model.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(8)
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2, stride=2), attention)
        >>> pictures = torch.randn(2, 3, 64, 64)
        >>> inside = torch.ones(2, 64, 64, dtype=torch.bool)
        >>> inside[1, 40:] = False
        >>> with efficient_attention.masked(network, inside):
        ...     y = network(pictures)

    Not part of the paper, which does not treat padding.
    """
    if key_mask is None:
        yield
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor [B, *spatial]; got {got}")
    dimensions = key_mask.dim() - 1
    concerned = attention_over(model, dimensions)
    if not concerned:
        raise ValueError(
            f"key_mask must have the dimensions of attention in the model; got {tuple(key_mask.shape)}, and there is "
            f"none on [B, C, ...] of {dimensions}"
        )
    before = [module.shared_mask for module in concerned]
    try:
        for module in concerned:
            module.shared_mask = key_mask
        yield
    finally:
        for module, mask in zip(concerned, before, strict=True):
            module.shared_mask = mask


def attention_over(model: nn.Module, dimensions: int) -> list[Any]:
    """The modules of a model that attend over feature maps of so many dimensions, and take masks."""
    features = FeatureMaps(dimensions)
    return [module for module in model.modules() if _takes(module, features)]


def _takes(module: nn.Module, features: FeatureMaps) -> bool:
    # These see how many dimensions they have when they are called, and pass over a mask of another number.
    if isinstance(module, EfficientAttentionChannelsLast | EfficientNonLocal):
        return True
    takes_masks = isinstance(module, ProjectedAttention | DiffusionEfficientAttention)
    return takes_masks and module._features == features
