"""A drop-in for ``nn.MultiheadAttention``: its constructor, call, results and state_dict, at linear cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import efficient_attention
from ..ops.arguments import check_option, check_size
from ..ops.functional import NORMALIZATIONS, cheapest_order
from ..ops.planner import OPERATOR_ORDERS
from ..ops.reference import attention_weights
from .key_weights import split_mask, weigh
from .tracing import one_operation

__all__ = ["MultiheadEfficientAttention"]


class MultiheadEfficientAttention(nn.Module):
    """Efficient attention with the interface of ``nn.MultiheadAttention``.

    Constructor, ``forward`` and the names and shapes of all parameters are those of ``nn.MultiheadAttention``: its
    state_dict loads, and layers such as ``nn.TransformerEncoderLayer`` work with this module as ``self_attn``. The
    map is another one: a network that was trained with dot-product attention needs fine-tuning after the exchange.
    Queries are not divided by ``sqrt(head_dim)``; there is no product of N x M to keep in range.

    What has no linear form is refused, with the reason: attention masks of N x M, causality, dropout on the weights.

    Args:
        embed_dim: channels of queries and of the output, E.
        num_heads: heads; divides ``embed_dim``.
        dropout: must be 0: there is no N x M matrix of weights to drop from. Drop from the output instead.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim: channels of keys; default ``embed_dim``.
        vdim: channels of values; default ``embed_dim``.
        batch_first: tensors are ``[B, N, E]`` rather than ``[N, B, E]``.
        device: of the parameters.
        dtype: of the parameters.
        normalization: ``"softmax"`` or ``"scaling"``.
        order: ``"auto"``, ``"linear"`` or ``"quadratic"``, as in :func:`efficient_attention`.

    ``forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False)`` returns ``(output, weights)``. ``key_padding_mask`` is True on
    *padding*, as there, or float ``[B, M]``, the logarithm of how many times a key counts, -inf on padding.
    ``need_weights=True``, the default
    there and so here, builds the matrix ``rho_q(Q) rho_k(K)^T``, ``[B, N, M]`` (per head ``[B, h, N, M]``): pass
    False where N is large, and get ``None``.

    Raises:
        ValueError: sizes that do not fit together, unknown options.
        NotImplementedError: something that has no linear form.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> layer.self_attn = efficient_attention.MultiheadEfficientAttention(64, 4, batch_first=True)
        >>> layer(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])

    Paper: Shen et al. 2021, Sec. 3.2; multi-head attention as in Vaswani et al. 2017.
    """

    # nn.TransformerEncoderLayer reads this name to decide whether it may skip forward() and run dot-product attention
    # on our weights. It may not.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalization: str = "softmax",
        order: str = "auto",
    ):
        super().__init__()
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, size in sizes.items():
            check_size(name, size)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads = {num_heads}; got {embed_dim}"
            )
        if dropout:
            raise NotImplementedError(
                f"dropout must be 0: the N x M weights that it would drop from are never built; got {dropout}. "
                "Apply nn.Dropout to the output instead"
            )
        check_option("normalization", normalization, NORMALIZATIONS)
        check_option("order", order, ("auto", *OPERATOR_ORDERS))
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.kdim = kdim
        self.vdim = vdim
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.normalization = normalization
        self.order = order

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # The names and shapes of nn.MultiheadAttention, absent ones as None.
        packed = self.kdim == self.vdim == embed_dim
        self.in_proj_weight = parameter(3 * embed_dim, embed_dim) if packed else None
        self.q_proj_weight = None if packed else parameter(embed_dim, embed_dim)
        self.k_proj_weight = None if packed else parameter(embed_dim, self.kdim)
        self.v_proj_weight = None if packed else parameter(embed_dim, self.vdim)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, embed_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, embed_dim) if add_bias_kv else None
        self._initialize()

    def reset_parameters(self) -> None:
        """Initialize all parameters anew, as the constructor did."""
        self.out_proj.reset_parameters()
        self._initialize()

    def _initialize(self) -> None:
        """Xavier for what goes in, zero for the biases: as ``nn.MultiheadAttention``, draw for draw."""
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for appended in (self.bias_k, self.bias_v):
            if appended is not None:
                nn.init.xavier_normal_(appended)

    @one_operation
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and return ``(output, weights or None)``; see the class."""
        _refuse_maps(attn_mask, is_causal)
        self._check_inputs(query, key, value, key_padding_mask)
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = self._transposed(query, key, value)

        q, k, v = self._project(query, key, value)  # [B, N, E], [B, M, E], [B, M, E]
        mask, log_weight = split_mask(_attends(key_padding_mask), k.dtype)
        k, v, mask = self._append(k, v, mask)
        if mask is not None and log_weight is not None:
            appended = k.shape[1] - log_weight.shape[1]  # each counts once
            k = weigh(k, mask, F.pad(log_weight, (0, appended)), self.normalization)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        output = efficient_attention(
            q, k, v, key_mask=mask, normalization=self.normalization, order=self.order
        )  # [B, h, N, E / h]
        output = self.out_proj(output.transpose(1, 2).flatten(2))  # [B, N, E]

        weights = None
        if need_weights:
            head_mask = None if mask is None else mask.unsqueeze(1)
            weights = attention_weights(q, k, head_mask, self.normalization).to(output.dtype)
            if average_attn_weights:
                weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def planned_order(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> str:
        """The order in which ``forward`` computes for these inputs."""
        if self.order != "auto":
            return self.order
        axis = -2 if self.batch_first or query.dim() == 2 else 0
        extra = (self.bias_k is not None) + self.add_zero_attn
        return cheapest_order(
            heads=self.num_heads,
            queries=query.shape[axis],
            keys=key.shape[axis] + extra,
            key_channels=self.head_dim,
            value_channels=self.head_dim,
        )

    @staticmethod
    def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From sequence first to batch first; what was one tensor stays one, so that it is projected once."""
        query_t = query.transpose(0, 1)
        key_t = query_t if key is query else key.transpose(0, 1)
        value_t = key_t if value is key else value.transpose(0, 1)
        return query_t, key_t, value_t

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias: Tensor | None = self.in_proj_bias
        if bias is not None and self.normalization == "softmax":
            # Softmax over positions does not see the key bias: its gradient is zero, not rounding noise.
            bias_q, bias_k, bias_v = bias.chunk(3)
            bias = torch.cat((bias_q, bias_k.detach(), bias_v))
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), self._input_weights(), biases)
        return q, k, v

    def _input_weights(self) -> Sequence[Tensor]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [weight for weight in apart if weight is not None]

    def _append(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the positions that ``add_bias_kv`` and ``add_zero_attn`` ask for."""
        batch, _, channels = k.shape
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.expand(batch, 1, -1), self.bias_v.expand(batch, 1, -1)))
        if self.add_zero_attn:
            zeros = k.new_zeros(batch, 1, channels)
            extra.append((zeros, zeros))
        if extra:
            k = torch.cat((k, *(key.to(k.dtype) for key, _ in extra)), dim=1)
            v = torch.cat((v, *(value.to(v.dtype) for _, value in extra)), dim=1)
            mask = None if mask is None else F.pad(mask, (0, len(extra)), value=True)
        return k, v, mask

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        channels = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
            if x.is_nested:
                raise NotImplementedError(
                    f"{name} must not be nested; pad it and pass key_padding_mask "
                    "(nn.TransformerEncoder: enable_nested_tensor=False)"
                )
            if x.dim() != query.dim() or x.dim() not in (2, 3) or x.shape[-1] != channels[name]:
                axes = "[B, N, E]" if self.batch_first else "[N, B, E]"
                raise ValueError(
                    f"{name} must have shape {axes}, or [N, E] in every argument, with E = {channels[name]}; "
                    f"got {tuple(x.shape)}"
                )
        batch_axis = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch_axis] != query.shape[batch_axis]:
            raise ValueError(
                f"key must have B = {query.shape[batch_axis]}, as query; got {key.shape[batch_axis]}"
            )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value must have as many positions and samples as key, {tuple(key.shape[:-1])}; "
                f"got {tuple(value.shape[:-1])}"
            )
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
                raise TypeError(
                    f"key_padding_mask must be bool or float; got {key_padding_mask.dtype}"
                )
            keys = key.shape[-2] if self.batch_first or key.dim() == 2 else key.shape[0]
            batch = () if key.dim() == 2 else (key.shape[0 if self.batch_first else 1],)
            if tuple(key_padding_mask.shape) != (*batch, keys):
                raise ValueError(
                    f"key_padding_mask must have shape {(*batch, keys)}; got {tuple(key_padding_mask.shape)}"
                )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, "
            f"normalization={self.normalization!r}, order={self.order!r}"
        )


def _attends(key_padding_mask: Tensor | None) -> Tensor | None:
    """PyTorch's bool masks are True on padding; ours, and float ones, are high where keys attend."""
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool:
        return key_padding_mask
    return ~key_padding_mask


def _refuse_maps(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask must be None: a mask of N x M has no linear form, because no N x M map is ever built. "
            "To hide keys from all queries use key_padding_mask; otherwise keep nn.MultiheadAttention here"
        )
    if is_causal:
        raise NotImplementedError(
            "is_causal must be False: the paper's keys are normalized over all positions, so that every position "
            "sees every other. Keep nn.MultiheadAttention here"
        )
