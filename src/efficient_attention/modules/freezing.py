"""Fix the orders of computation of a network before it is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .multihead import MultiheadEfficientAttention
from .projected import EfficientModule

__all__ = ["freeze"]

Plannable = EfficientModule | MultiheadEfficientAttention


def freeze(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Name the order that every efficient attention in a model takes for an example input, in place of ``"auto"``.

    The model runs once, in evaluation mode and without gradients, so that nothing in it changes. Afterwards the
    orders are constants: the same for every length, and known to whoever compiles or exports the model. Set
    ``module.order = "auto"`` to plan again.

    Args:
        model: any module.
        args: the model's example inputs.
        kwargs: the model's example keyword inputs.

    Returns:
        The order of each attention module that was ``"auto"``, by qualified name.

    Raises:
        ValueError: one module was called with inputs whose cheapest orders differ; name its order yourself.

    Example:
        >>> model = torch.nn.Sequential(efficient_attention.EfficientAttention2d(64))
        >>> efficient_attention.freeze(model, torch.randn(1, 64, 128, 128))
        {'0': 'folded'}

    Planning is not part of the paper; every order is exact (see Sec. 3.2, associativity).
    """
    chosen: dict[str, str] = {}
    unplanned = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Plannable) and module.order == "auto"
    }
    hooks = [
        module.register_forward_pre_hook(_recorder(name, chosen), with_kwargs=True)
        for name, module in unplanned.items()
    ]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    for name, order in chosen.items():
        unplanned[name].order = order
    return chosen


def _recorder(name: str, chosen: dict[str, str]) -> Callable[[Any, tuple, dict], None]:
    def record(module: Plannable, args: tuple, kwargs: dict) -> None:
        order = module.planned_order(*args, **kwargs)
        if chosen.setdefault(name, order) != order:
            raise ValueError(
                f"{name or 'model'} is called with inputs whose cheapest orders differ "
                f"({chosen[name]!r} and {order!r}); set its order by name"
            )

    return record
