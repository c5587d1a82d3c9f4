"""Prediction for people: disparities, objects and classes of pictures on disk, without a recipe.

The commands ``stereo``, ``detect`` and ``classify`` are made of what is here. Importing this loads none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Calibration",
    "FoundObjects",
    "depth_of",
    "draw_disparity",
    "draw_objects",
    "load_network",
    "points_of",
    "predict_classes",
    "predict_disparity",
    "predict_objects",
    "read_calibration",
    "read_picture",
    "write_depth_png",
    "write_ply",
]

if TYPE_CHECKING:
    from .calibration import Calibration, read_calibration
    from .classes import predict_classes
    from .depth import depth_of, points_of, write_depth_png, write_ply
    from .disparities import predict_disparity
    from .disparity_picture import draw_disparity
    from .networks import load_network
    from .object_picture import draw_objects
    from .objects import FoundObjects, predict_objects
    from .pictures import read_picture

_HOME = {
    "Calibration": "calibration",
    "FoundObjects": "objects",
    "depth_of": "depth",
    "draw_disparity": "disparity_picture",
    "draw_objects": "object_picture",
    "load_network": "networks",
    "points_of": "depth",
    "predict_classes": "classes",
    "predict_disparity": "disparities",
    "predict_objects": "objects",
    "read_calibration": "calibration",
    "read_picture": "pictures",
    "write_depth_png": "depth",
    "write_ply": "depth",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
