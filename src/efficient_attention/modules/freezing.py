"""Fix the orders of computation of a network before it is exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.planner import FOLDS_OUTPUT, FOLDS_VALUES, MODULE_ORDERS
from .multihead import MultiheadEfficientAttention
from .non_local import EfficientNonLocal
from .projected import EfficientModule
from .vision_transformer import ViTEfficientAttention

__all__ = ["freeze"]

Plannable = (
    EfficientModule | MultiheadEfficientAttention | ViTEfficientAttention | EfficientNonLocal
)


def freeze(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Name the order that every efficient attention in a model takes for an example input, in place of ``"auto"``.

    The model runs once, in evaluation mode and without gradients, so that nothing in it changes. Afterwards the
    orders are constants: the same for every length, and known to whoever compiles or exports the model. Set
    ``module.order = "auto"`` to plan again. Modules that are used through ``summarize`` and ``attend`` are planned
    too, both sides together; what the example does not reach stays ``"auto"``.

    Args:
        model: any module.
        args: the model's example inputs.
        kwargs: the model's example keyword inputs.

    Returns:
        The order of each attention module that was ``"auto"`` and ran, by qualified name.

    Raises:
        ValueError: one module was called with inputs whose cheapest orders differ; name its order yourself.

    Example:
        >>> model = torch.nn.Sequential(efficient_attention.EfficientAttention2d(64))
        >>> efficient_attention.freeze(model, torch.randn(1, 64, 128, 128))
        {'0': 'folded'}

    Planning is not part of the paper; every order is exact (see Sec. 3.2, associativity).
    """
    unplanned = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Plannable) and module.order == "auto"
    }
    calls: dict[str, list[_Call]] = {name: [] for name in unplanned}
    training = [module for module in model.modules() if module.training]
    with ExitStack() as recording, torch.no_grad():
        for name, module in unplanned.items():
            recording.enter_context(_recorded(module, calls[name]))
        try:
            model.eval()
            model(*args, **kwargs)
        finally:
            for trained in training:
                trained.training = True
    chosen = {name: _common_order(name, seen) for name, seen in calls.items() if seen}
    for name, order in chosen.items():
        unplanned[name].order = order
    return chosen


class _Call(NamedTuple):
    """The order that was planned for one call, and the sides of the attention that the call had at hand."""

    order: str
    has_queries: bool = True
    has_keys: bool = True

    def takes(self, order: str) -> bool:
        """Whether the call would compute the same in another order."""
        if self.has_queries and self.has_keys:
            return order == self.order
        # Through a context, of which each side knows only its own half.
        folds = FOLDS_OUTPUT if self.has_queries else FOLDS_VALUES
        return order != "quadratic" and (order in folds) == (self.order in folds)


@contextmanager
def _recorded(module: Plannable, calls: list[_Call]) -> Iterator[None]:
    if not isinstance(module, EfficientModule):
        hook = module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(_Call(module.planned_order(*args, **kwargs))),
            with_kwargs=True,
        )
        try:
            yield
        finally:
            hook.remove()
        return

    # forward, summarize and attend all ask this method, and it knows which sides there are.
    resolve = module._resolve

    def recording(queries: int | None, keys: int | None, **options: bool) -> str:
        order = resolve(queries, keys, **options)
        calls.append(_Call(order, queries is not None, keys is not None))
        return order

    module._resolve = recording  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module._resolve


def _common_order(name: str, calls: Sequence[_Call]) -> str:
    """The order in which every call computes as it was planned to."""
    candidates = [calls[0].order, *MODULE_ORDERS]
    fitting = [order for order in candidates if all(call.takes(order) for call in calls)]
    if not fitting:
        orders = " and ".join(repr(order) for order in dict.fromkeys(call.order for call in calls))
        raise ValueError(
            f"{name or 'model'} is called with inputs whose cheapest orders differ ({orders}); set its order by name"
        )
    return fitting[0]
