"""The operator: efficient attention as an algebra of mergeable contexts."""

from .context import Context
from .functional import attend, dot_product_attention, efficient_attention, summarize

__all__ = ["Context", "attend", "dot_product_attention", "efficient_attention", "summarize"]
