"""The modules: efficient attention with its projections, on tokens and on feature maps; and the baseline."""

from .attention import EfficientAttention
from .freezing import freeze
from .masking import masked
from .multihead import MultiheadEfficientAttention
from .spatial import (
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    NonLocal1d,
    NonLocal2d,
    NonLocal3d,
)
from .tiles import attend_tiles

__all__ = [
    "EfficientAttention",
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "MultiheadEfficientAttention",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "attend_tiles",
    "freeze",
    "masked",
]
