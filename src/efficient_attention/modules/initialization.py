"""How modules begin: as the identity, or as the paper authors' code does."""

from __future__ import annotations

import weakref

from torch import nn

INITIALIZATIONS = ("zero", "official")


def start_at_zero(layer: nn.Module) -> None:
    """Let a layer give nothing but zeros, now and after every ``reset_parameters``."""
    # Whoever resets all layers of a network comes to this one after the module that it is in.
    layer.reset_parameters = _Zeroing(layer)  # type: ignore[assignment]
    layer.reset_parameters()  # type: ignore[operator]


class _Zeroing:
    """A ``reset_parameters`` for one layer, whose class stays that of PyTorch.

    The layer is held weakly: in a cycle it would keep its memory until the next garbage collection.
    """

    def __init__(self, layer: nn.Module):
        self._layer = weakref.ref(layer)

    def __call__(self) -> None:
        layer = self._layer()
        assert layer is not None, "the layer calls its own attribute"
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)

    def __reduce__(self) -> tuple:
        return _Zeroing, (self._layer(),)
