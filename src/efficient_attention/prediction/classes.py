"""What a picture shows as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.image_folders import view
from ..training.colours import normalized
from .forward import device_of, inference

__all__ = ["predict_classes"]


def predict_classes(
    network: Any, picture: Tensor, *, size: int = 224, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The probability of every class, as it is evaluated in training: of the middle of the picture.

    Args:
        network: a :class:`~efficient_attention.models.resnet.ResNet` in evaluation mode.
        picture: ``[3, H, W]`` uint8.
        size: of the square that the network sees, in pixels, see :func:`efficient_attention.data.image_folders.view`.
        dtype: float32, or bfloat16 for autocast.

    Returns:
        ``[classes]`` float32 on the CPU, which sum to one.

    Raises:
        ValueError: another shape or dtype, a network in training mode, or one that predicts NaN.

    Example:
        >>> import efficient_attention
        >>> network = efficient_attention.create_model("resnet_small", num_classes=10).eval()
        >>> predict_classes(network, torch.zeros(3, 40, 30, dtype=torch.uint8), size=32).shape
        torch.Size([10])

    Paper: Shen et al. 2021, Sec. 4 (ImageNet).
    """
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8:
        raise ValueError(
            f"picture must be uint8 [3, H, W]; got {picture.dtype} {tuple(picture.shape)}"
        )
    square = view(size, training=False)(picture).unsqueeze(0)  # [1, 3, size, size]
    with inference(network, dtype):
        square = square.to(device_of(network)).float() / 255
        probabilities = network(normalized(square)).float().softmax(1)[0].cpu()
    if not probabilities.isfinite().all():
        raise ValueError("the network must predict finite probabilities; got NaN")
    return probabilities.clone()
