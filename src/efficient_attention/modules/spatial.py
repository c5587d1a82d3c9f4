"""Attention over every position of a feature map, in one, two and three dimensions; and the baseline it replaces.

Parameter names (``keys``, ``queries``, ``values``, ``reprojection``) are those of the paper authors' module: its
state_dict loads into :class:`EfficientAttention2d` as it is.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..ops.arguments import check_size
from .dot_product import DotProductModule
from .features import FeatureMaps
from .projected import EfficientModule, ProjectedAttention
from .tracing import one_operation

__all__ = [
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
]


class _OnFeatureMaps(ProjectedAttention):
    """The constructor of all modules here."""

    _dimensions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        value_channels: int | None = None,
        *,
        num_heads: int = 1,
        normalization: str = "softmax",
        residual: bool = True,
        init: str = "zero",
        order: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_size("in_channels", in_channels)
        super().__init__(
            FeatureMaps(self._dimensions),
            in_channels,
            in_channels // 2 if key_channels is None else key_channels,
            in_channels if value_channels is None else value_channels,
            num_heads=num_heads,
            normalization=normalization,
            residual=residual,
            init=init,
            order=order,
            device=device,
            dtype=dtype,
        )


class _EfficientAttentionNd(_OnFeatureMaps, EfficientModule):
    @one_operation
    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Let every position of ``x [B, C, *spatial]`` attend to all of them; see the class."""
        return self._run(x, x, key_mask)


class EfficientAttention2d(_EfficientAttentionNd):
    """Efficient attention over all positions of a feature map ``[B, C, H, W]``, in place of a non-local block.

    Queries, keys and values are 1x1 convolutions of the input; :func:`efficient_attention` runs over all H * W
    positions; a 1x1 convolution maps back to C channels. Time and memory are linear in H * W. The order of the
    computation is chosen for every input size by its multiply-adds; where it is cheaper, the projection to values
    and the reprojection are folded into the context, exactly, unless something would notice (hooks, wrapped or
    parametrized layers). Any memory format is taken and kept.

    Args:
        in_channels: C.
        key_channels: channels of queries and keys, all heads together; default ``in_channels // 2``, the paper's.
        value_channels: channels of values, all heads together; default ``in_channels``, the paper's.
        num_heads: heads; divides ``key_channels`` and ``value_channels``.
        normalization: ``"softmax"`` or ``"scaling"``.
        residual: add the input to the output.
        init: ``"zero"``: the reprojection is zero, so that a residual module starts as the identity and can be put
            into a trained network; ``"official"``: PyTorch's default for every layer, as the authors' module has.
        order: ``"auto"``, or an exact order by name: ``"linear"``, ``"quadratic"``, ``"folded"``,
            ``"folded_values"``, ``"folded_output"``; see :func:`freeze`.
        device: of the parameters.
        dtype: of the parameters.

    ``forward(x, *, key_mask=None)``: ``x`` is ``[B, C, H, W]``; ``key_mask``, bool ``[B, H, W]``, is True where a
    position may be attended to (False on padding). Returns the shape of ``x``.

    Raises:
        ValueError: sizes that do not fit together, unknown options.
        NotImplementedError: an order that was named cannot be taken.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(64, num_heads=4)
        >>> attention(torch.randn(2, 64, 128, 128)).shape
        torch.Size([2, 64, 128, 128])

    Paper: Shen et al. 2021, Sec. 3.2 and Fig. 1; folding follows from the associativity that Sec. 3.2 rests on.
    """

    _dimensions = 2


class EfficientAttention1d(_EfficientAttentionNd):
    """Efficient attention over all positions of a sequence ``[B, C, L]``; see :class:`EfficientAttention2d`."""

    _dimensions = 1


class EfficientAttention3d(_EfficientAttentionNd):
    """Efficient attention over all positions of a volume ``[B, C, D, H, W]``; see :class:`EfficientAttention2d`."""

    _dimensions = 3


class _NonLocalNd(_OnFeatureMaps, DotProductModule):
    @one_operation
    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Let every position of ``x [B, C, *spatial]`` attend to all of them; see the class."""
        return self._run(x, key_mask)


class NonLocal2d(_NonLocalNd):
    """The non-local block that :class:`EfficientAttention2d` replaces, over the same parameters: the baseline.

    ``normalization="softmax"`` is the embedded-Gaussian block, computed by PyTorch's fused attention, quadratic in
    time; ``"scaling"`` is the dot-product block, quadratic in time and memory, whose result
    ``EfficientAttention2d(normalization="scaling")`` gives in linear time from the same state_dict.

    Arguments as in :class:`EfficientAttention2d`; ``order`` is ``"auto"`` or ``"quadratic"``, the only one there is.

    Example:
        >>> block = efficient_attention.NonLocal2d(64)
        >>> block(torch.randn(1, 64, 16, 16)).shape
        torch.Size([1, 64, 16, 16])

    Paper: Shen et al. 2021, Sec. 3.1; Wang et al. 2018 (arXiv 1711.07971).
    """

    _dimensions = 2


class NonLocal1d(_NonLocalNd):
    """The non-local block over a sequence ``[B, C, L]``; see :class:`NonLocal2d`."""

    _dimensions = 1


class NonLocal3d(_NonLocalNd):
    """The non-local block over a volume ``[B, C, D, H, W]``; see :class:`NonLocal2d`."""

    _dimensions = 3
