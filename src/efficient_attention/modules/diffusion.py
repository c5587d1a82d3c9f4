"""Efficient attention of diffusion models' U-nets: normalized, with a learned memory; keys of lucidrains' module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Context, attend, summarize
from ..ops.arguments import check_size
from .features import FeatureMaps, coarsen
from .tracing import one_operation

__all__ = ["DiffusionEfficientAttention"]


class ChannelNorm(nn.Module):
    """Every position's channels divided by their root mean square, times ``g [1, C, ...]``."""

    def __init__(
        self,
        channels: int,
        dimensions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = (1, channels) + (1,) * dimensions
        self.g = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class DiffusionEfficientAttention(nn.Module):
    """Efficient attention as U-nets of diffusion models have it: ``LinearAttention`` of denoising-diffusion-pytorch.

    Names and shapes of all parameters are those of that module; see :func:`import_attention`. A few learned keys and
    values join those of the input. They are a context of their own, made once for a batch of any size and merged::

        q, k, v = heads of to_qkv(norm(x))
        y       = to_out(E(q, memory.merge(summarize(k, v))) / sqrt(Dk)),    to_out: a projection, and a norm

    There is no residual; hosts add one.

    Args:
        in_channels: C.
        num_heads: heads.
        head_channels: Dk = Dv, channels of one head.
        num_memory: how many keys and values are learned; may be 0.
        dimensions: 1, 2 or 3, of the feature map.
        device: of the parameters.
        dtype: of the parameters.

    ``forward(x)``: ``x`` is ``[B, C, *spatial]``. Returns its shape.

    Raises:
        ValueError: sizes that are not positive, an input of another shape.

    Example:
        >>> attention = DiffusionEfficientAttention(64, num_heads=4)
        >>> attention(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 64, 32, 32])

    Paper: Shen et al. 2021, Sec. 3.2; the memory, the norms and the scale are not in it.
    """

    #: See :func:`masked`.
    shared_mask: Tensor | None = None
    norm: nn.Module
    to_out: nn.Module
    mem_kv: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        num_heads: int = 4,
        head_channels: int = 32,
        *,
        num_memory: int = 4,
        dimensions: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "num_heads": num_heads, "head_channels": head_channels}
        for name, size in sizes.items():
            check_size(name, size)
        if dimensions not in (1, 2, 3):
            raise ValueError(f"dimensions must be 1, 2 or 3; got {dimensions!r}")
        inner = num_heads * head_channels
        placed: dict = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.head_channels = head_channels
        self.residual = False
        self._features = FeatureMaps(dimensions)

        project = self._features.build_projection
        self.norm = ChannelNorm(in_channels, dimensions, **placed)
        self.mem_kv = nn.Parameter(
            torch.randn(2, num_heads, head_channels, num_memory, **placed)
        )  # [keys and values, H, Dk, number]
        self.to_qkv = project(in_channels, 3 * inner, bias=False, **placed)
        self.to_out = nn.Sequential(
            project(inner, in_channels, bias=True, **placed),
            ChannelNorm(in_channels, dimensions, **placed),
        )

    @one_operation
    def forward(self, x: Tensor) -> Tensor:
        """Let every position of ``x`` attend to all of them and to the memory; see the class."""
        features, heads = self._features, self.num_heads
        features.check("x", x, self.in_channels)
        query, key, value = (
            features.split(part, heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        shared = self.shared_mask
        key_mask = None if shared is None else coarsen(shared, x.shape[2:]).flatten(1)
        context = self._with_memory(summarize(key, value, key_mask=key_mask))
        attended = attend(query, context) * self.head_channels**-0.5  # [B, H, N, Dv]
        y = self.to_out(features.join(attended, like=x))
        return x + y if self.residual else y

    def _with_memory(self, context: Context) -> Context:
        if self.mem_kv is None:
            return context
        key, value = self.mem_kv.mT.unsqueeze(1)  # [1, H, number, Dk] each
        memory = summarize(key, value)
        return context.merge(
            Context(
                memory.mean.expand_as(context.mean), memory.log_weight.expand_as(context.log_weight)
            )
        )

    def extra_repr(self) -> str:
        memory = 0 if self.mem_kv is None else self.mem_kv.shape[-1]
        return f"{self.in_channels}, num_heads={self.num_heads}, num_memory={memory}"
