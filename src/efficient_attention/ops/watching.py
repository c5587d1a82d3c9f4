"""Who could notice how a value is computed: only where nobody could may it be computed without PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether only the values count of what is computed from plain tensors on a CPU, not how, and no gradient."""
    return are_plain(*tensors) and not records(*tensors)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on a CPU, and nobody follows their operators, but perhaps for gradients."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
    )
    return not watched and all(map(_is_its_memory, tensors))


def records(*tensors: Tensor) -> bool:
    """Whether gradients are recorded for one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _is_its_memory(x: Tensor) -> bool:
    # A subclass or a parameter may be more than its values; a negative view is other than what is in memory; what is
    # sparse has no strides; and zeros that were never written, or one of a batch of gradients
    # (``torch.autograd.grad(..., is_grads_batched=True)``), have no memory of their own.
    plain = type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.is_neg()
    return plain and not (x._is_zerotensor() or torch._C._functorch.is_legacy_batchedtensor(x))
