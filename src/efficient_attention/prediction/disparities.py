"""The disparity of a pair of pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.colours import normalized
from .forward import device_of, inference

__all__ = ["predict_disparity", "scaled_size"]


def predict_disparity(
    network: Any,
    left: Tensor,
    right: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The disparity of every pixel of the left view.

    Under a scale below 1 the views are shrunk, each pixel to the mean of what it covers, and the disparities enlarged
    between the centres of pixels and multiplied by the ratio of the widths, so that those of a slanted plane stay
    exact. It takes less memory, and reaches disparities up to ``max_disparity / scale``; details are lost.

    Args:
        network: a :class:`~efficient_attention.models.psmnet.PSMNet` in evaluation mode.
        left: ``[3, H, W]``, uint8, or floating-point in [0, 1].
        right: as ``left``; rectified: what is at column x on the left is at ``x - disparity`` on the right, in the row.
        scale: of the views that the network sees, in (0, 1].
        dtype: float32, or bfloat16 for autocast.

    Returns:
        ``[H, W]`` float32 on the CPU, in pixels of the views as they are given.

    Raises:
        ValueError: views of other shapes, a scale outside its range, a network in training mode, or one that predicts
            what is not finite.

    Example:
        >>> import efficient_attention
        >>> network = efficient_attention.create_model("psmnet_small").eval()
        >>> left, right = torch.rand(2, 3, 60, 100)
        >>> predict_disparity(network, left, right, scale=0.5).shape
        torch.Size([60, 100])

    Paper: Shen et al. 2021, Sec. 4 (EA-PSMNet).
    """
    for name, view in (("left", left), ("right", right)):
        if view.dim() != 3 or view.shape[0] != 3 or view.shape != left.shape:
            raise ValueError(
                f"left and right must have one shape [3, H, W]; got {name} {tuple(view.shape)}"
            )
    height, width = left.shape[1:]
    size = scaled_size((height, width), scale)
    with inference(network, dtype):
        device = device_of(network)
        seen = [_seen(view.to(device), size) for view in (left, right)]
        disparity = network(*seen).float()  # [1, h, w]
        if size != (height, width):
            enlarged = F.interpolate(disparity[None], (height, width), mode="bilinear")
            disparity = enlarged[0] * (width / size[1])
        disparity = disparity[0].cpu()
    if not disparity.isfinite().all():
        raise ValueError("the network must predict finite disparities; got NaN or infinite ones")
    # Not a tensor of inference mode, which autograd would refuse.
    return disparity.clone()


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width in whole pixels under a scale in (0, 1].

    Example:
        >>> scaled_size((375, 1242), 0.5)
        (188, 621)
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1]; got {scale}")
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def _seen(view: Tensor, size: tuple[int, int]) -> Tensor:
    """A view as the network takes it, ``[1, 3, h, w]``."""
    colours = view.unsqueeze(0).float() / (255 if view.dtype == torch.uint8 else 1)
    if size != tuple(view.shape[1:]):
        colours = F.interpolate(colours, size, mode="bilinear", antialias=True)
    return normalized(colours)
