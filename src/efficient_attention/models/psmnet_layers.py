"""Layers of PSMNet: normalized convolutions, features with pyramid pooling, and the hourglass. Paper: arXiv 1803.08669.

Names of children, and how they nest, are those of the authors' code, so that their checkpoints load. Widths are
multiples of one number, C, which is 32 in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Features", "Halves", "Hourglass", "convolution", "initialize", "normalization"]

_CONVOLUTIONS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS: dict[int, type[nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
# A pooled map may be a single position: a group needs channels enough to have a variance there.
_CHANNELS_OF_GROUP = 8
_POOLS = (64, 32, 16, 8)


def normalization(norm: str, dimensions: int, channels: int) -> nn.Module:
    """``"batch"``, or ``"group"``: as many groups as leave at least 8 channels in each; one for fewer than 16."""
    if norm == "batch":
        return _BATCH_NORMS[dimensions](channels)
    most = max(1, channels // _CHANNELS_OF_GROUP)
    groups = max(count for count in range(1, most + 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def convolution(
    dimensions: int,
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    norm: str,
    stride: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, and a normalization."""
    convolve = _CONVOLUTIONS[dimensions](
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=False,
    )
    return nn.Sequential(convolve, normalization(norm, dimensions, out_channels))


def initialize(network: nn.Module) -> None:
    """Normal weights that keep the variance of gradients; transposed convolutions keep PyTorch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two convolutions beside a shortcut, without a nonlinearity behind the sum."""

    def __init__(
        self, in_channels: int, channels: int, *, norm: str, stride: int = 1, dilation: int = 1
    ):
        super().__init__()
        first = convolution(2, in_channels, channels, norm=norm, stride=stride, dilation=dilation)
        self.conv1 = nn.Sequential(first, nn.ReLU(inplace=True))
        self.conv2 = convolution(2, channels, channels, norm=norm, dilation=dilation)
        same = stride == 1 and in_channels == channels
        self.downsample = (
            nn.Identity()
            if same
            else convolution(2, in_channels, channels, 1, norm=norm, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.downsample(x)


class _CellMeans(nn.Module):
    """Means over cells of ``size x size``, or over all rows, all columns, where there are fewer."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, [min(self.size, side) for side in x.shape[-2:]])

    def extra_repr(self) -> str:
        return str(self.size)


class Features(nn.Module):
    """Features of one view at a quarter of its size, with means over regions of four sizes (Sec. 3.2).

    ``forward(x)``: ``[B, 3, H, W]``, sides multiples of 4, to ``[B, C, H / 4, W / 4]``.

    Args:
        width: C.
        norm: see :func:`normalization`.
        align_corners: of the upsampling of means.
    """

    def __init__(self, width: int, *, norm: str, align_corners: bool):
        super().__init__()
        self.align_corners = align_corners
        self.firstconv = nn.Sequential(
            convolution(2, 3, width, norm=norm, stride=2),
            nn.ReLU(inplace=True),
            convolution(2, width, width, norm=norm),
            nn.ReLU(inplace=True),
            convolution(2, width, width, norm=norm),
            nn.ReLU(inplace=True),
        )
        self.layer1 = _stage(3, width, width, norm=norm)
        self.layer2 = _stage(16, width, 2 * width, norm=norm, stride=2)
        # The paper's Table 1 dilates these by 2 and 4; the code, and so every checkpoint, by 1 and 2.
        self.layer3 = _stage(3, 2 * width, 4 * width, norm=norm)
        self.layer4 = _stage(3, 4 * width, 4 * width, norm=norm, dilation=2)
        self.branch1, self.branch2, self.branch3, self.branch4 = (
            nn.Sequential(
                _CellMeans(size),
                convolution(2, 4 * width, width, 1, norm=norm),
                nn.ReLU(inplace=True),
            )
            for size in _POOLS
        )
        self.lastconv = nn.Sequential(
            convolution(2, 10 * width, 4 * width, norm=norm),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        near = self.layer2(self.layer1(self.firstconv(x)))  # [B, 2C, H / 4, W / 4]
        far = self.layer4(self.layer3(near))  # [B, 4C, H / 4, W / 4]
        means = (
            F.interpolate(
                branch(far), far.shape[-2:], mode="bilinear", align_corners=self.align_corners
            )
            for branch in (self.branch4, self.branch3, self.branch2, self.branch1)
        )
        return self.lastconv(torch.cat([near, far, *means], dim=1))


def _stage(
    blocks: int, in_channels: int, channels: int, *, norm: str, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    first = _Block(in_channels, channels, norm=norm, stride=stride, dilation=dilation)
    rest = (_Block(channels, channels, norm=norm, dilation=dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class Halves(NamedTuple):
    """What an hourglass hands on at half size, on its way down and on its way up: ``[B, 2C, D/2, H/2, W/2]``."""

    down: Tensor
    up: Tensor


class Hourglass(nn.Module):
    """Convolutions of a volume at half and at quarter size, and back (Sec. 3.4).

    ``forward(volume, down, up)``: ``[B, C, D, H, W]``, sides multiples of 4, to the same shape, and the halves.
    ``down`` is added on the way up in place of the hourglass's own, ``up`` on the way down: so hourglasses are stacked.

    Args:
        width: C.
        norm: see :func:`normalization`.
    """

    def __init__(self, width: int, *, norm: str):
        super().__init__()
        inner = 2 * width
        self.conv1 = nn.Sequential(
            convolution(3, width, inner, norm=norm, stride=2), nn.ReLU(inplace=True)
        )
        self.conv2 = convolution(3, inner, inner, norm=norm)
        self.conv3 = nn.Sequential(
            convolution(3, inner, inner, norm=norm, stride=2), nn.ReLU(inplace=True)
        )
        self.conv4 = nn.Sequential(convolution(3, inner, inner, norm=norm), nn.ReLU(inplace=True))
        self.conv5 = _doubling(inner, inner, norm=norm)
        self.conv6 = _doubling(inner, width, norm=norm)

    def forward(
        self, volume: Tensor, down: Tensor | None = None, up: Tensor | None = None
    ) -> tuple[Tensor, Halves]:
        half = self.conv2(self.conv1(volume))
        own = F.relu(half if up is None else half + up)
        quarter = self.conv4(self.conv3(own))
        risen = F.relu(self.conv5(quarter) + (own if down is None else down))
        return self.conv6(risen), Halves(own, risen)


def _doubling(in_channels: int, out_channels: int, *, norm: str) -> nn.Sequential:
    doubling = nn.ConvTranspose3d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False
    )
    return nn.Sequential(doubling, normalization(norm, 3, out_channels))
