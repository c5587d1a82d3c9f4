"""Multiply-adds of operators: PyTorch's formulas, and those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def multiply_adds(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> int:
    """The multiply-accumulate operations of an operator's products and convolutions."""
    # Imported when needed: it imports triton where that is installed.
    from torch.utils.flop_counter import flop_registry

    packet = operator.overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        packet = _aten._scaled_dot_product_flash_attention
    if packet is _aten._native_multi_head_attention:
        return _multihead(args[0])
    if packet is _aten._transformer_encoder_layer_fwd:
        x, hidden = args[0], args[14].shape[0]
        return _multihead(x) + 2 * x.numel() * hidden
    formula = flop_registry.get(packet)
    # Operations come in pairs, a multiplication and an addition.
    return 0 if formula is None else formula(*args, **kwargs, out_val=result) // 2


def _multihead(x: Tensor) -> int:
    """Self-attention of ``x [B, N, C]``: four projections and two products of all pairs."""
    _, positions, channels = x.shape
    return x.numel() * (4 * channels + 2 * positions)
