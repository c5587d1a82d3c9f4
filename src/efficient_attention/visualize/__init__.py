"""Attention maps: what templates attend to, what one position attends to, and pictures of both."""

from .drawing import Facts, Panel, draw_maps, draw_panels, overlay
from .maps import attention_map, template_maps

__all__ = [
    "Facts",
    "Panel",
    "attention_map",
    "draw_maps",
    "draw_panels",
    "overlay",
    "template_maps",
]
