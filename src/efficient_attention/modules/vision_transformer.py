"""The self-attention of vision transformers, with one packed projection, at linear cost; interface and keys of timm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import efficient_attention
from ..ops.arguments import check_option, check_size
from ..ops.functional import NORMALIZATIONS, cheapest_order
from ..ops.planner import OPERATOR_ORDERS
from .folding import obstacle
from .key_weights import split_mask, weigh
from .tracing import one_operation

__all__ = ["ViTEfficientAttention"]


class ViTEfficientAttention(nn.Module):
    """Efficient attention with the interface of timm's ``Attention``, as its vision transformers take it.

    ``timm.create_model("vit_small_patch16_224", attn_layer=ViTEfficientAttention)`` builds a network with it, and
    :func:`replace` exchanges the attention of one that exists. Constructor, ``forward`` and the names of all parameters
    are those of timm, so that a state_dict loads; the map is another one, and needs training. With ``[q k v] = X Wqkv``
    in every head::

        Y = norm(rho_q(q_norm(q)) (rho_k(k_norm(k))^T v)) Wo,    times sigmoid(gate(X)) before Wo if gated

    Logits are not divided by ``sqrt(head_dim)``, as in the paper: the divisor keeps a sum of ``head_dim`` products in
    the range of one, and here no product is taken before the softmax. What it would divide are single channels, whose
    softmax would then be nearly flat, and all positions alike.

    Args:
        dim: channels of the tokens.
        num_heads: heads.
        attn_head_dim: channels of a head; default ``dim // num_heads``.
        dim_out: channels of the output; default ``dim``.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_norm: normalize queries and keys.
        scale_norm: normalize what was attended to, before the projection.
        proj_bias: whether the output projection has a bias.
        gated: gate what was attended to by a sigmoid of the input.
        attn_drop: must be 0: there is no N x M matrix of weights to drop from.
        proj_drop: dropout of the output.
        norm_layer: what ``qk_norm`` and ``scale_norm`` normalize with; called with a number of channels.
        device: of the parameters.
        dtype: of the parameters.
        normalization: ``"softmax"`` or ``"scaling"``.
        order: ``"auto"``, ``"linear"`` or ``"quadratic"``, as in :func:`efficient_attention`.

    ``forward(x, attn_mask=None, is_causal=False)``: ``x`` is ``[B, N, dim]``. ``attn_mask`` hides keys from all queries
    alike: ``[B, N]``, or ``[B, H, 1, N]`` with B and H perhaps 1; bool, True = attend, or added to logits, where it is
    the logarithm of how many times a key counts, -inf on padding. A mask of N x N is refused, and so is causality.
    Returns ``[B, N, dim_out]``.

    Raises:
        ValueError: sizes that do not fit together, unknown options, a mask that may be one of N x N.
        TypeError: a mask that is no tensor, or neither bool nor floating.
        NotImplementedError: something that has no linear form.

    Example:
        >>> attention = efficient_attention.ViTEfficientAttention(192, num_heads=3, qkv_bias=True)
        >>> attention(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 192])

    Paper: Shen et al. 2021, Sec. 3.2; the layer is that of Dosovitskiy et al. 2021.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalization: str = "softmax",
        order: str = "auto",
    ):
        super().__init__()
        check_size("dim", dim)
        check_size("num_heads", num_heads)
        for name, size in (("attn_head_dim", attn_head_dim), ("dim_out", dim_out)):
            if size is not None:
                check_size(name, size)
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads = {num_heads}; got {dim}")
        if attn_drop:
            raise NotImplementedError(
                f"attn_drop must be 0: the N x M weights that it would drop from are never built; got {attn_drop}. "
                "Use proj_drop instead"
            )
        if norm_layer is None and (qk_norm or scale_norm):
            raise ValueError("norm_layer must be given with qk_norm or scale_norm; got None")
        check_option("normalization", normalization, NORMALIZATIONS)
        check_option("order", order, ("auto", *OPERATOR_ORDERS))
        self.dim = dim
        self.num_heads = num_heads
        self.normalization = normalization
        self.order = order

        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        inner = num_heads * self.head_dim
        placed = {"device": device, "dtype": dtype}

        def norm(channels: int, wanted: bool) -> nn.Module:
            return norm_layer(channels, **placed) if norm_layer and wanted else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **placed)
        self.q_norm = norm(self.head_dim, qk_norm)
        self.k_norm = norm(self.head_dim, qk_norm)
        self.norm = norm(inner, scale_norm)
        self.gate = nn.Linear(dim, inner, bias=qkv_bias, **placed) if gated else None
        self.proj = nn.Linear(inner, dim if dim_out is None else dim_out, bias=proj_bias, **placed)
        self.proj_drop = nn.Dropout(proj_drop)

    @one_operation
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Let every token attend to all of them; see the class."""
        if is_causal:
            raise NotImplementedError(
                "is_causal must be False: the paper's keys are normalized over all positions, so that every position "
                "sees every other. Keep dot-product attention here"
            )
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.dim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must have shape [B, N, C] with C = {self.dim}; got {got}")
        key_mask = _key_mask(attn_mask, x.shape[0], x.shape[1])

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            mask, log_weight = split_mask(key_mask, key.dtype)
            if mask is not None and log_weight is not None:
                key = weigh(key, mask, log_weight, self.normalization)
            return efficient_attention(
                query,
                key,
                value,
                key_mask=mask,
                normalization=self.normalization,
                order=self.order,
            )

        return self.surround(attend, x)

    def surround(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """The layers of this module around any attention over heads ``[B, H, N, D]``."""
        packed = self._project(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
        attended = attention(self.q_norm(query), self.k_norm(key), value)
        y = self.norm(attended.transpose(1, 2).flatten(2))  # [B, N, H D]
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _project(self, x: Tensor) -> Tensor:
        # Softmax over positions does not see the key bias: its gradient is zero, not rounding noise.
        is_idle = (
            self.normalization == "softmax"
            and isinstance(self.k_norm, nn.Identity)
            and obstacle(self.qkv, nn.Linear) is None
            and self.qkv.bias is not None
        )
        if not is_idle:
            return self.qkv(x)
        bias_q, bias_k, bias_v = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat((bias_q, bias_k.detach(), bias_v)))

    def planned_order(self, x: Tensor, *_masks: Tensor | None) -> str:
        """The order in which ``forward`` computes for these inputs."""
        if self.order != "auto":
            return self.order
        return cheapest_order(
            heads=self.num_heads,
            queries=x.shape[1],
            keys=x.shape[1],
            key_channels=self.head_dim,
            value_channels=self.head_dim,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalization={self.normalization!r}, order={self.order!r}"


def _key_mask(attn_mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """``attn_mask`` as ``[B or 1, H or 1, N]``, if it says the same to every query."""
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor; got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating; got {attn_mask.dtype}")
    shape = tuple(attn_mask.shape)
    if attn_mask.dim() == 4 and shape[2] == 1 and shape[0] in (1, batch) and shape[3] == keys:
        return attn_mask.squeeze(2)
    if attn_mask.dim() == 2 and shape in ((batch, keys), (1, keys)):
        if batch == keys > 1 and shape[0] == batch:
            raise ValueError(
                f"attn_mask must not be of N x N, and {shape} may be one, because B = N; for a mask of keys give "
                "[B, 1, 1, N]"
            )
        return attn_mask.unsqueeze(1)
    if attn_mask.dim() >= 2 and shape[-2:] == (keys, keys):
        raise NotImplementedError(
            f"attn_mask must be one of keys, [B, N] or [B, 1, 1, N]; got {shape}: a mask of N x N has no linear form, "
            "because no N x N map is ever built. Hide keys from all queries alike (timm's NaFlexVit: "
            "use_key_only_attn_mask=True), or keep dot-product attention here"
        )
    raise ValueError(
        f"attn_mask must have shape [B, N] or [B, 1, 1, N] for B, N = {(batch, keys)}; got {shape}"
    )
