"""Batches of pictures of several sizes: whose pixels are whose, and convolutions that do not see what is padded.

A convolution pads a picture that comes alone with zeros. In a batch, behind the edge of a smaller picture there are
features of nothing instead, which leak into it layer by layer. Set to zero before every layer that looks beyond its own
position, they are what the picture would see alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..modules.features import coarsen

__all__ = ["PaddedGroupNorm", "inside", "zero_outside"]

# Hooks are pickled with their numbers, and every process counts from 0: a hook of this number is never replaced.
_HOOK = -1
_MASK = "_inside_mask"


def inside(
    sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Which pixels of a padded batch are of its pictures: bool ``[B, H, W]``; None if all are.

    Args:
        sizes: height and width of each picture.
        canvas: height and width of the batch.
        device: of the result.
    """
    if all(tuple(size) == tuple(canvas) for size in sizes):
        return None
    heights, widths = torch.tensor(sizes, device=device).unsqueeze(-1).unbind(1)  # [B, 1]
    rows = torch.arange(canvas[0], device=device) < heights
    columns = torch.arange(canvas[1], device=device) < widths
    return rows.unsqueeze(2) & columns.unsqueeze(1)


@contextmanager
def zero_outside(network: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Inside this context, what is padded does not reach the positions of a picture through a convolutional network.

    Convolutions and pools that look beyond their own position see zeros where ``mask`` is False;
    :class:`PaddedGroupNorm` leaves these positions out of its moments. Not for two threads on one network at a time.

    Args:
        network: any, of convolutions and pools as ``nn`` has them.
        mask: bool ``[B, H, W]`` at the resolution of the input; extents divisible by all strides. None: no change.
    """
    layers = [] if mask is None else list(_concerned(network))
    before = [getattr(layer, _MASK, None) for layer in layers]
    try:
        for layer in layers:
            if not isinstance(layer, PaddedGroupNorm):
                layer._forward_pre_hooks[_HOOK] = _zero_padding
            setattr(layer, _MASK, mask)
        yield
    finally:
        for layer, outer in zip(layers, before, strict=True):
            setattr(layer, _MASK, outer)


class PaddedGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose moments are those of each picture of a padded batch, inside :func:`zero_outside`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [B, C, H, W]``."""
        mask = getattr(self, _MASK, None)
        if mask is None:
            return super().forward(x)
        counted = coarsen(mask, x.shape[2:]).unsqueeze(1)  # [B, 1, H, W]
        groups = x.unflatten(1, (self.num_groups, -1)).float() if x.dtype.itemsize < 4 else x
        groups = groups.reshape(len(x), self.num_groups, -1, *x.shape[2:])  # [B, G, C / G, H, W]
        weight = counted.unsqueeze(1).to(groups.dtype)
        count = weight.sum((2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * weight).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * weight).sum((2, 3, 4), keepdim=True) / count
        y = ((groups - mean) * (variance + self.eps).rsqrt()).reshape(x.shape).to(x.dtype)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def _zero_padding(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    mask = getattr(layer, _MASK, None)
    if mask is None:
        return None
    (x,) = inputs  # [B, C, H / s, W / s]
    # Behind a ReLU, zeros are also what max pooling does not see.
    return (x.masked_fill(~coarsen(mask, x.shape[2:]).unsqueeze(1), 0),)


def _concerned(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            size = module.kernel_size
            if max(size if isinstance(size, tuple) else (size,)) > 1:
                yield module
        elif isinstance(module, PaddedGroupNorm):
            yield module
