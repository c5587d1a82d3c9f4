"""Efficient attention: global attention at linear cost. Shen et al., WACV 2021, arXiv 1812.01243.

Where ``torch`` is loaded already, all that is public comes at once; else with the first name that is asked for, as
``torch`` takes its time, and help and errors of the command line do not wait for it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import create_model, list_models, load_checkpoint
    from .modules import (
        EfficientAttention,
        EfficientAttention1d,
        EfficientAttention2d,
        EfficientAttention3d,
        EfficientAttentionChannelsLast,
        MultiheadEfficientAttention,
        NonLocal1d,
        NonLocal2d,
        NonLocal3d,
        ViTEfficientAttention,
        attend_tiles,
        freeze,
        import_attention,
        masked,
    )
    from .ops import (
        Context,
        attend,
        build_native,
        dot_product_attention,
        efficient_attention,
        summarize,
    )
    from .planning import Plan, plan  # type: ignore[no-redef] # mypy knows the file plan.py by it
    from .surgery import Report, insert, remove, replace

__version__ = "0.1.0"
__all__ = [
    "Context",
    "EfficientAttention",
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "EfficientAttentionChannelsLast",
    "MultiheadEfficientAttention",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "Plan",
    "Report",
    "ViTEfficientAttention",
    "attend",
    "attend_tiles",
    "build_native",
    "create_model",
    "dot_product_attention",
    "efficient_attention",
    "freeze",
    "import_attention",
    "insert",
    "list_models",
    "load_checkpoint",
    "masked",
    "plan",
    "remove",
    "replace",
    "summarize",
]
_PARTS = ("ops", "modules", "surgery", "planning", "models")


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


def _load() -> None:
    for part in (import_module(f"{__name__}.{part}") for part in _PARTS):
        globals().update({key: getattr(part, key) for key in part.__all__ if key in __all__})


# Its operators are then registered, for whoever counts what they cost or runs a program that has them.
if "torch" in sys.modules:
    _load()
