"""Efficient attention: global attention at linear cost. Shen et al., WACV 2021, arXiv 1812.01243."""

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
from .ops import Context, attend, dot_product_attention, efficient_attention, summarize
from .planning import Plan, plan
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
