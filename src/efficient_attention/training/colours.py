"""Colours as networks that began on ImageNet take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalized"]

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


def normalized(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean colour and divide by its deviation.

    Args:
        images: ``[..., 3, H, W]``, colours in [0, 1].

    Returns:
        The same shape, dtype and device.

    Example:
        >>> normalized(torch.zeros(3, 1, 1)).flatten()
        tensor([-2.1179, -2.0357, -1.8044])
    """
    mean, deviation = (
        torch.tensor(colour, dtype=images.dtype, device=images.device).view(3, 1, 1)
        for colour in (_MEAN, _DEVIATION)
    )
    return (images - mean) / deviation
