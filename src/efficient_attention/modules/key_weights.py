"""Masks as transformers give them, bool or additive, and what they mean to keys: how many times each one counts.

An additive mask of one number per key is the logarithm of a count: under softmax over positions,
``exp(k + log n) = n exp(k)``, a key that occurs n times. Of zero and minus infinity it is a bool mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_mask(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Which keys attend (bool, True = attend), and the logarithms of their counts, for keys of ``dtype``.

    Args:
        mask: bool, True = attend; or floating, added to logits, -inf or the lowest number of a dtype = hidden; or None.
        dtype: of the keys.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    # -inf, or the lowest number of a dtype, which many use for it.
    attends = mask.to(dtype) > torch.finfo(dtype).min
    return attends, mask.masked_fill(~attends, 0).to(dtype)


def weigh(key: Tensor, mask: Tensor, log_weight: Tensor, normalization: str) -> Tensor:
    """Keys of which position m counts ``exp(log_weight[m])`` times.

    Args:
        key: ``[..., M, D]``.
        mask: bool, broadcasts to ``[..., M]``; as :func:`split_mask` gives it.
        log_weight: as ``mask``.
        normalization: ``"softmax"`` or ``"scaling"``.
    """
    if normalization == "softmax":
        return key + log_weight.unsqueeze(-1)
    weight = log_weight.exp().masked_fill(~mask, 0)
    share = mask.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    return key * (weight * share).unsqueeze(-1).to(key.dtype)
