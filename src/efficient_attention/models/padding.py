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

__all__ = ["inside", "watch_padding", "zero_outside"]

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


def watch_padding(network: nn.Module) -> None:
    """Make every layer of a network that looks beyond its own position obey :func:`zero_outside`."""
    for module in _wide_layers(network):
        module._forward_pre_hooks[_HOOK] = _zero_padding


@contextmanager
def zero_outside(network: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Inside this context, the watched layers of a network see zeros where ``mask`` is False.

    Args:
        network: see :func:`watch_padding`.
        mask: bool ``[B, H, W]`` at the resolution of the input; extents divisible by all strides. None: no zeros.
    """
    layers = [] if mask is None else list(_wide_layers(network))
    try:
        for layer in layers:
            setattr(layer, _MASK, mask)
        yield
    finally:
        for layer in layers:
            delattr(layer, _MASK)


def _zero_padding(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    mask = getattr(layer, _MASK, None)
    if mask is None:
        return None
    (x,) = inputs  # [B, C, H / s, W / s]
    # Behind a ReLU, zeros are also what max pooling does not see.
    return (x.masked_fill(~coarsen(mask, x.shape[2:]).unsqueeze(1), 0),)


def _wide_layers(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            size = module.kernel_size
            if max(size if isinstance(size, tuple) else (size,)) > 1:
                yield module
