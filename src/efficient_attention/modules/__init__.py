"""The modules: efficient attention with its projections, on tokens and on feature maps; and the baseline."""

from .attention import EfficientAttention
from .channels_last import EfficientAttentionChannelsLast
from .diffusion import DiffusionEfficientAttention
from .freezing import freeze
from .importing import import_attention
from .masking import masked
from .multihead import MultiheadEfficientAttention
from .non_local import EfficientNonLocal
from .spatial import (
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    NonLocal1d,
    NonLocal2d,
    NonLocal3d,
)
from .tiles import attend_tiles
from .vision_transformer import ViTEfficientAttention

__all__ = [
    "DiffusionEfficientAttention",
    "EfficientAttention",
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "EfficientAttentionChannelsLast",
    "EfficientNonLocal",
    "MultiheadEfficientAttention",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "ViTEfficientAttention",
    "attend_tiles",
    "freeze",
    "import_attention",
    "masked",
]
