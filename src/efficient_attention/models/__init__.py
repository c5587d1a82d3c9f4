"""The networks of the paper: EA ResNet (ImageNet), EA Mask R-CNN (MS-COCO), EA-PSMNet (Scene Flow); and small ones.

Importing this loads none of them, and nothing beside torch and safetensors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoints import load_checkpoint
from .registry import create_model, list_models

__all__ = ["Network", "Place", "create_model", "list_models", "load_checkpoint"]

if TYPE_CHECKING:
    from .network import Network, Place


def __getattr__(name: str) -> Any:
    if name in ("Network", "Place"):
        return getattr(import_module(".network", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
