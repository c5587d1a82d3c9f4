"""The paper authors' formulation of the module, from the paper's equations: the one that ours is held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PaperModule"]


class PaperModule(nn.Module):
    """1x1 convolutions, attention head by head, concatenation, reprojection, residual; parameters as in ours.

    Args:
        channels: C.
        key_channels: of all heads together.
        value_channels: of all heads together.
        heads: divides both.

    Paper: Shen et al. 2021, Sec. 3.2 and Fig. 1.
    """

    def __init__(self, channels: int, key_channels: int, value_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.keys = nn.Conv2d(channels, key_channels, 1)
        self.queries = nn.Conv2d(channels, key_channels, 1)
        self.values = nn.Conv2d(channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, C, H, W]``, and its shape back."""
        projected = (layer(x).flatten(2) for layer in (self.keys, self.queries, self.values))
        heads = zip(*(p.chunk(self.heads, 1) for p in projected), strict=True)
        attended = []
        for key, query, value in heads:  # [B, channels of a head, N]
            context = key.softmax(2) @ value.mT
            attended.append(context.mT @ query.softmax(1))
        return self.reprojection(torch.cat(attended, 1).unflatten(2, x.shape[2:])) + x
