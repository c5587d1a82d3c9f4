"""Efficient attention: global attention at linear cost. Shen et al., WACV 2021, arXiv 1812.01243."""

from .ops import Context, attend, dot_product_attention, efficient_attention, summarize

__version__ = "0.1.0"
__all__ = ["Context", "attend", "dot_product_attention", "efficient_attention", "summarize"]
