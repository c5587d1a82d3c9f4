"""What arguments must be, and what is said when they are something else.

Shapes: B batch, H heads, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .precision import DTYPES


def check_option(name: str, got: str, valid: tuple[str, ...]) -> None:
    if got not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}; got {got!r}")


def check_size(name: str, got: Any) -> None:
    # To Python a bool is an integer.
    if type(got) is bool or not isinstance(got, Integral) or got < 1:
        raise ValueError(f"{name} must be a positive integer; got {got!r}")


def canonical_mask(key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """``key_mask`` as ``[B or 1, H or 1, M]``."""
    if key_mask is None:
        return None
    batch, heads, keys, _ = key.shape
    expected = f"bool [B, M] or [B, H, M], B and H perhaps 1, for B, H, M = {(batch, heads, keys)}"
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor, {expected}; got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be {expected}; got {key_mask.dtype}")
    if key_mask.device != key.device:
        raise ValueError(f"key_mask must be on key's device {key.device}; got {key_mask.device}")
    mask = key_mask.unsqueeze(1) if key_mask.dim() == 2 else key_mask
    mask = mask.reshape((1,) * (3 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 3 else mask
    fits = mask.dim() == 3 and all(
        size == whole or (size == 1 and not last)
        for size, whole, last in zip(
            mask.shape, (batch, heads, keys), (False, False, True), strict=True
        )
    )
    if not fits:
        raise ValueError(f"key_mask must be {expected}; got shape {tuple(key_mask.shape)}")
    return mask


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor [B, H, positions, channels]; got {type(x).__name__}"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {x.layout}")
    if x.dtype not in DTYPES:
        valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have dtype {valid}; got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(
            f"{name} must have shape [B, H, positions, channels]; got {tuple(x.shape)}"
        )


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must have {like_name}'s dtype and device {like.dtype} {like.device}; got {x.dtype} {x.device}"
        )


def check_shape(
    name: str, x: Tensor, expected: tuple[int | None, ...], letters: str, like: str
) -> None:
    if x.dim() != 4 or any(
        e is not None and e != got for e, got in zip(expected, x.shape, strict=True)
    ):
        known = tuple(e for e in expected if e is not None)
        raise ValueError(
            f"{name} must have shape {letters} matching {like} = {known}; got {tuple(x.shape)}"
        )


def check_attention_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    for name, x in (("key", key), ("value", value)):
        check_like(name, x, "query", query)
    b, h, _, dk = query.shape
    check_shape("key", key, (b, h, None, dk), "[B, H, M, Dk]", "query's B, H, Dk")
    check_shape("value", value, (*key.shape[:3], None), "[B, H, M, Dv]", "key's B, H, M")


def check_out(out: Tensor, query: Tensor, value_channels: int, *others: Tensor) -> None:
    """Whether ``out`` can take the result for a query and other inputs."""
    check_tensor("out", out)
    check_like("out", out, "query", query)
    sizes = (*query.shape[:3], value_channels)
    check_shape("out", out, sizes, "[B, H, N, Dv]", "the result's B, H, N, Dv")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, query, *others)):
        raise ValueError("out must be None where gradients are recorded; got a tensor")
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out must not overlap with itself; got strides {out.stride()}")
