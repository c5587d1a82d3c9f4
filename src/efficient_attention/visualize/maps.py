"""The rows and columns of ``rho_q(Q) rho_k(K)^T``, in time and memory linear in the positions.

Shapes: B batch, h heads, dk key channels of all heads, C channels, ``*spatial`` positions of a
feature map (``N`` for tokens), M of them attended to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

import torch
from torch import Tensor

from ..modules.features import Tokens
from ..modules.projected import EfficientModule
from ..ops.reference import matmul, normalized_keys, normalized_queries

__all__ = ["attention_map", "template_maps"]


def template_maps(module: EfficientModule, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The template attention maps ``rho_k(K)``: what each key channel attends to.

    Args:
        module: an ``EfficientAttention1d``, ``2d``, ``3d`` or ``EfficientAttention``.
        x: what is attended to, laid out as the input of the module: ``[B, C, *spatial]`` or, for
            tokens, ``[B, N, C]``.
        key_mask: bool, True = attend, as in the module's ``forward``; masked positions get 0.

    Returns:
        ``[B, dk, *spatial]``, float32 (float64 for float64 inputs). Under softmax every map is
        non-negative and sums to one over the positions; under scaling it is ``K / M``. The channels
        of one head are neighbours.

    Raises:
        TypeError: the module is no efficient attention, or an argument is not a tensor.
        ValueError: shapes do not fit together.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(64, key_channels=8)
        >>> template_maps(attention, torch.randn(1, 64, 32, 48)).shape
        torch.Size([1, 8, 32, 48])

    Paper: Shen et al. 2021, Sec. 3.4.
    """
    _check_module(module)
    keys = _key_weights(module, x, "x", key_mask)  # [B, h, M, dk / h]
    return keys.mT.flatten(1, 2).unflatten(2, _spatial(module, x))


def attention_map(
    module: EfficientModule,
    x: Tensor,
    position: int | Sequence[int],
    key_mask: Tensor | None = None,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """What the query at one position takes from every position: a row of ``rho_q(Q) rho_k(K)^T``.

    It is a mixture of the template maps, weighted by the query. The N x M matrix is never built.

    Args:
        module: an ``EfficientAttention1d``, ``2d``, ``3d`` or ``EfficientAttention``.
        x: the input of the module, ``[B, C, *spatial]`` or tokens ``[B, N, C]``.
        position: where the query is: an index for each spatial dimension, ``(row, column)`` in 2d;
            for sequences and tokens one number. The same in every sample.
        key_mask: bool, True = attend, as in the module's ``forward``; masked positions get 0.
        context: for ``EfficientAttention``: the tokens ``[B, M, context_dim]`` attended to, if not
            ``x``.

    Returns:
        ``[B, h, *spatial]``, or ``[B, h, M]`` for another context; float32 (float64 for float64
        inputs). Under softmax the map of every head is non-negative and sums to one.

    Raises:
        TypeError: the module is no efficient attention, or an argument has the wrong type.
        ValueError: shapes do not fit together, or the position lies outside.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(64, num_heads=2)
        >>> attention_map(attention, torch.randn(1, 64, 32, 48), (10, 20)).shape
        torch.Size([1, 2, 32, 48])

    Paper: Shen et al. 2021, Sec. 3.3: these rows stand where dot-product attention has those of
    ``softmax(Q K^T)``.
    """
    _check_module(module)
    features = module._features
    features.check("x", x, module.in_channels)
    source, name = (x, "x") if context is None else (context, "context")
    keys = _key_weights(module, source, name, key_mask)  # [B, h, M, dk / h]

    query = module.queries(_at(module, x, position))
    query = features.split(query, module.num_heads)  # [B, h, 1, dk / h]
    row = matmul(normalized_queries(query, module.normalization), keys.mT)  # [B, h, 1, M]
    return row.squeeze(2).unflatten(2, _spatial(module, source))


def _key_weights(
    module: EfficientModule, source: Tensor, name: str, key_mask: Tensor | None
) -> Tensor:
    """``rho_k(K)``, ``[B, h, M, dk / h]``."""
    features = module._features
    features.check(name, source, module.source_channels)
    key = features.split(module.keys(source), module.num_heads)
    mask = module._key_mask(key_mask, source)  # [B, M]
    mask = None if mask is None else mask.unsqueeze(1)
    return normalized_keys(key, mask, module.normalization)


def _spatial(module: EfficientModule, x: Tensor) -> torch.Size:
    return x.shape[1:2] if isinstance(module._features, Tokens) else x.shape[2:]


def _at(module: EfficientModule, x: Tensor, position: int | Sequence[int]) -> Tensor:
    """The input at one position, laid out as the input."""
    spatial = _spatial(module, x)
    indices = tuple(map(index, position if isinstance(position, Iterable) else (position,)))
    if len(indices) != len(spatial) or not all(
        0 <= i < size for i, size in zip(indices, spatial, strict=True)
    ):
        raise ValueError(
            f"position must be {len(spatial)} indices inside {tuple(spatial)}; got {position}"
        )
    first = 1 if isinstance(module._features, Tokens) else 2
    for dimension, i in enumerate(indices, start=first):
        x = x.narrow(dimension, i, 1)
    return x


def _check_module(module: EfficientModule) -> None:
    if not isinstance(module, EfficientModule):
        raise TypeError(
            "module must be an EfficientAttention1d, 2d, 3d or EfficientAttention; "
            f"got {type(module).__name__}"
        )
