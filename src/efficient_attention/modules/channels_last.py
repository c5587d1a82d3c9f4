"""Attention over grids of tokens, ``[B, ..., C]``: feature maps of networks that keep their channels last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Tokens, _checked_mask, coarsen
from .projected import EfficientModule
from .tracing import one_operation

__all__ = ["EfficientAttentionChannelsLast"]


@dataclass(frozen=True)
class Grid(Tokens):
    """``[B, *spatial, C]`` of any number of dimensions: tokens, when its positions are counted in one row."""

    shape = "[B, ..., C]"

    def split(self, x: Tensor, heads: int) -> Tensor:
        return super().split(x.flatten(1, -2), heads)  # [B, h, N, C / h]

    def join(self, heads: Tensor, like: Tensor) -> Tensor:
        return super().join(heads, like).unflatten(1, like.shape[1:-1])  # [B, *spatial, C]

    def positions(self, x: Tensor) -> Tensor:
        return super().positions(x.flatten(1, -2))  # [B, C, N]

    def restore(self, positions: Tensor, like: Tensor) -> Tensor:
        return super().restore(positions, like).unflatten(1, like.shape[1:-1])  # [B, *spatial, C]

    def key_mask(self, mask: Tensor, like: Tensor) -> Tensor:
        return _checked_mask(mask, "[B, ...]", like.shape[:-1]).flatten(1)

    def count(self, x: Tensor) -> int:
        return math.prod(x.shape[1:-1])

    def check(self, name: str, x: Tensor, channels: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {self.shape}; got {type(x).__name__}")
        if x.dim() < 3 or x.shape[-1] != channels:
            raise ValueError(
                f"{name} must have shape {self.shape} with C = {channels}; got {tuple(x.shape)}"
            )


class EfficientAttentionChannelsLast(EfficientModule):
    """Efficient attention over all positions of a feature map ``[B, ..., C]``, as Swin transformers have them.

    :class:`EfficientAttention2d` with its axes, projections and keys of :class:`EfficientAttention`: linear layers,
    channels last. This is about the axes; the *memory format* of that name is taken by
    :class:`EfficientAttention2d`, whose axes are ``[B, C, H, W]`` in either format.

    Args:
        in_channels: C.
        key_channels: channels of queries and keys, all heads together; default ``in_channels // 2``, the paper's.
        value_channels: channels of values, all heads together; default ``in_channels``, the paper's.
        num_heads: heads; divides ``key_channels`` and ``value_channels``.
        normalization: ``"softmax"`` or ``"scaling"``.
        residual: add the input to the output.
        bias: whether the projections have biases.
        init: as in :class:`EfficientAttention2d`.
        order: as in :class:`EfficientAttention2d`.
        device: of the parameters.
        dtype: of the parameters.

    ``forward(x, *, key_mask=None)``: ``x`` is ``[B, ..., C]``; ``key_mask``, bool ``[B, ...]``, is True where a
    position may be attended to. Returns the shape of ``x``.

    Raises:
        ValueError: sizes that do not fit together, unknown options.
        NotImplementedError: an order that was named cannot be taken.

    Example:
        >>> attention = efficient_attention.EfficientAttentionChannelsLast(96, num_heads=3)
        >>> attention(torch.randn(2, 56, 56, 96)).shape
        torch.Size([2, 56, 56, 96])

    Paper: Shen et al. 2021, Sec. 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        value_channels: int | None = None,
        *,
        num_heads: int = 1,
        normalization: str = "softmax",
        residual: bool = True,
        bias: bool = True,
        init: str = "zero",
        order: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            Grid(),
            in_channels,
            in_channels // 2 if key_channels is None else key_channels,
            in_channels if value_channels is None else value_channels,
            num_heads=num_heads,
            normalization=normalization,
            residual=residual,
            bias=bias,
            init=init,
            order=order,
            device=device,
            dtype=dtype,
        )

    @one_operation
    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Let every position of ``x [B, ..., C]`` attend to all of them; see the class."""
        return self._run(x, x, key_mask)

    def _key_mask(self, key_mask: Tensor | None, source: Tensor) -> Tensor | None:
        shared = self.shared_mask
        if key_mask is None and shared is not None and shared.dim() == source.dim() - 1:
            key_mask = coarsen(shared, source.shape[1:-1])
        return None if key_mask is None else self._features.key_mask(key_mask, like=source)
