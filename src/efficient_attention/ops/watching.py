"""Who could notice how a value is computed: only where nobody could may it be computed without PyTorch's dispatcher.

Every call asks, so that what an attribute costs is felt: names are bound once.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_is_compiling = torch.compiler.is_compiling
_is_transformed = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack
_is_autocast_enabled = torch.is_autocast_enabled
_trace = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_grad_enabled = torch.is_grad_enabled
_STRIDED = torch.strided
_shape = operator.attrgetter("shape")
# What programs by torch.compile ask before each call, and what they allocate by: nothing that PyTorch promises to keep.
_compiled: Any = sys.modules.get("torch._C._dynamo.guards")
_guards: Any = getattr(_compiled, "TensorGuards", None)

_Found = TypeVar("_Found")


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


#: Memory on a CPU, ``(size, stride, dtype)``, past the dispatcher.
empty_strided: Any = getattr(_compiled, "_empty_strided_cpu", _empty_strided)


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether only the values count of what is computed from plain tensors on a CPU, not how, and no gradient."""
    return are_plain(*tensors) and not records(*tensors)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on a CPU, and nobody follows their operators, but perhaps for gradients."""
    if is_followed() or _is_transformed() or _is_autocast_enabled("cpu") or _trace() is not None:
        return False
    # A subclass or a parameter may be more than its values; a negative view is other than what is in memory; what is
    # sparse has no strides; and zeros that were never written, or one of a batch of gradients
    # (``torch.autograd.grad(..., is_grads_batched=True)``), have no memory of their own.
    for x in tensors:
        if type(x) is not Tensor or not x.is_cpu or x.layout is not _STRIDED:
            return False
        if x.is_neg() or x._is_zerotensor() or _is_batched(x):
            return False
    return True


def is_followed() -> bool:
    """Whether operators are followed in a way that :class:`Recent` does not see."""
    return _is_compiling() or _count_modes() > 0 or forward_ad._current_level >= 0


class Recent(Generic[_Found]):
    """What was found out about plain tensors, for others that are alike: plain, and of the same dtypes and strides.

    Each alike in its need for gradients, too. That is one question in place of many, and leaves two to who asks:
    :func:`is_followed`, and whether gradients are recorded at all. The last of one kind, and so many kinds, are known.
    """

    MOST = 1024

    def __init__(self) -> None:
        self._known: dict[object, tuple[Callable[..., bool], _Found]] = {}

    def find(self, kind: object, *tensors: Tensor) -> _Found | None:
        """What is known of ``kind``, which says whatever tensors do not, and of tensors like these."""
        try:
            known = self._known.get((kind, *map(_shape, tensors)))
        except (AttributeError, RuntimeError, TypeError):
            # No tensor, or a nested one: asked whether that is like others, PyTorch would end the process.
            return None
        return None if known is None or not known[0](*tensors) else known[1]

    def add(self, found: _Found, kind: object, *tensors: Tensor) -> None:
        """Know this from now on, of plain tensors, unless PyTorch has no such question, or two of them are the same."""
        if len({*map(id, tensors)}) < len(tensors):
            return
        sizes, strides = [[*x.shape] for x in tensors], [[*x.stride()] for x in tensors]
        try:
            are_alike = _guards(
                *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
            ).check
        except (TypeError, AttributeError, RuntimeError):
            return
        if len(self._known) == self.MOST:
            self._known.clear()
        self._known[(kind, *map(_shape, tensors))] = are_alike, found


def records(*tensors: Tensor) -> bool:
    """Whether gradients are recorded for one of them."""
    if _is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False
