"""How this project compares numbers: for its tests, its benchmark's gate, and whoever adds a backend.

A tolerance is never chosen by hand. An implementation may err from the float64 truth at most twice as much as the
plain equations do when they are run in the same low precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_precise_as_plain", "make_inputs", "plain_attention", "relative_error"]


def make_inputs(
    batch: int = 2,
    heads: int = 3,
    queries: int = 37,
    keys: int = 53,
    key_channels: int = 8,
    value_channels: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal ``query [B, H, N, Dk]``, ``key [B, H, M, Dk]`` and ``value [B, H, M, Dv]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, key_channels),
        (batch, heads, keys, key_channels),
        (batch, heads, keys, value_channels),
    )
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    for x in (query, key, value):
        x.requires_grad_(requires_grad)
    return query, key, value


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    normalization: str = "softmax",
) -> Tensor:
    """The equations as a user would type them, every step in the inputs' dtype; ``key_mask`` is ``[B, M]``."""
    if normalization == "softmax":
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        return query.softmax(-1) @ (key.softmax(-2).mT @ value)
    if key_mask is None:
        return query @ ((key / key.shape[-2]).mT @ value)
    value = value.masked_fill(~key_mask[:, None, :, None], 0)
    count = key_mask.sum(-1)[:, None, None, None].to(key.dtype)
    return query @ ((key / count).mT @ value)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``|got - truth| / |truth|`` in the Frobenius norm, computed in float64."""
    truth = truth.detach().double()
    distance = (got.detach().double() - truth).norm()
    return (distance / truth.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def assert_as_precise_as_plain(got: Tensor, plain: Tensor, truth: Tensor, what: str = "") -> None:
    """``got`` errs at most twice as much as ``plain`` from the float64 ``truth``, or by one rounding of its dtype.

    Raises:
        AssertionError: with both errors, and ``what`` was compared.
    """
    error, allowed = relative_error(got, truth), 2 * relative_error(plain, truth)
    allowed = max(allowed, torch.finfo(got.dtype).eps)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
