"""Attention on tokens ``[B, N, C]``: to themselves, to other tokens, or to a context that was kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Context
from ..ops.arguments import check_size
from .features import Tokens
from .projected import EfficientModule
from .tracing import one_operation

__all__ = ["EfficientAttention"]


class EfficientAttention(EfficientModule):
    """Efficient attention on tokens, with cross-attention and contexts that can be kept.

    Linear layers project to queries, keys and values and back; :func:`efficient_attention` runs in between. The
    order of the computation is chosen as in :class:`EfficientAttention2d`. The map is equivariant to permutations of
    the tokens: positional information has to come with the tokens.

    Args:
        embed_dim: C, channels of the tokens that attend, and of the output.
        num_heads: heads; divides ``key_channels`` and ``value_channels``.
        key_channels: channels of queries and keys, all heads together; default ``embed_dim``.
        value_channels: channels of values, all heads together; default ``embed_dim``.
        context_dim: channels of the tokens attended to; default ``embed_dim``.
        normalization: ``"softmax"`` or ``"scaling"``.
        residual: add the input to the output.
        bias: whether the projections have biases.
        init: ``"official"``: PyTorch's default for every layer; ``"zero"``: the reprojection starts at zero.
        order: as in :class:`EfficientAttention2d`; ``"quadratic"`` cannot serve a ready-made context.
        device: of the parameters.
        dtype: of the parameters.

    ``forward(x, context=None, *, key_mask=None)``: ``x`` is ``[B, N, embed_dim]``. ``context`` is what it attends
    to: ``None`` for itself, tokens ``[B, M, context_dim]``, or a :class:`Context` from :meth:`summarize`, whose size
    does not depend on M. ``key_mask``, bool ``[B, M]``, is True where a token may be attended to. Returns the shape
    of ``x``.

    Raises:
        ValueError: sizes that do not fit together, unknown options, a ``key_mask`` beside a ready-made context.
        NotImplementedError: an order that was named cannot be taken.

    Example:
        >>> attention = efficient_attention.EfficientAttention(64, num_heads=4, context_dim=32)
        >>> image, text = torch.randn(2, 4096, 64), torch.randn(2, 77, 32)
        >>> memory = attention.summarize(text)  # once, for any number of calls
        >>> attention(image, memory).shape
        torch.Size([2, 4096, 64])

    Paper: Shen et al. 2021, Sec. 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        context_dim: int | None = None,
        normalization: str = "softmax",
        residual: bool = False,
        bias: bool = True,
        init: str = "official",
        order: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_size("embed_dim", embed_dim)
        if context_dim is not None:
            check_size("context_dim", context_dim)
        super().__init__(
            Tokens(),
            embed_dim,
            embed_dim if key_channels is None else key_channels,
            embed_dim if value_channels is None else value_channels,
            source_channels=context_dim,
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
    def forward(
        self, x: Tensor, context: Tensor | Context | None = None, *, key_mask: Tensor | None = None
    ) -> Tensor:
        """Let the tokens of ``x`` attend to ``context``; see the class."""
        if isinstance(context, Context) and key_mask is not None:
            raise ValueError(
                "key_mask must be None with a ready-made Context, which was masked when it was summarized; "
                f"got {tuple(key_mask.shape)}"
            )
        return self._run(x, x if context is None else context, key_mask)
