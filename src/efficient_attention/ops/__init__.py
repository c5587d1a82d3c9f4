"""The operator: efficient attention as an algebra of mergeable contexts."""

from .context import Context
from .functional import attend, dot_product_attention, efficient_attention, summarize
from .native_build import build_native

__all__ = [
    "Context",
    "attend",
    "build_native",
    "dot_product_attention",
    "efficient_attention",
    "summarize",
]
