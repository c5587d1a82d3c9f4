"""A scene as a list of layers, each a surface with a shape and a material."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .materials import Light, Material
from .shapes import Shape
from .surfaces import Box, Quadric, Surface

__all__ = ["Layer", "Placement", "Scene"]

Array = np.ndarray


class Placement(NamedTuple):
    """Where in the left image a shape's square ``[-1, 1]^2`` lies.

    Attributes:
        x: of its centre.
        y: of its centre.
        length: half of its first side, in pixels.
        breadth: half of its second side.
        angle: from the x axis to its first side, in radians.
    """

    x: float
    y: float
    length: float
    breadth: float
    angle: float = 0.0

    @property
    def box(self) -> Box:
        """The upright rectangle around it."""
        c, s = abs(math.cos(self.angle)), abs(math.sin(self.angle))
        width, height = self.length * c + self.breadth * s, self.length * s + self.breadth * c
        return Box(self.x, self.y, width, height)

    def local(self, x: Array, y: Array) -> tuple[Array, Array]:
        """The coordinates of the shape at points of the left image."""
        u, v = x - self.x, y - self.y
        if self.angle == 0:
            return u / self.length, v / self.breadth
        c, s = math.cos(self.angle), math.sin(self.angle)
        return (u * c + v * s) / self.length, (v * c - u * s) / self.breadth


class Layer(NamedTuple):
    """A surface in the scene.

    Attributes:
        surface: its disparity; a :class:`Quadric` around the placement's centre if it has one.
        material: its look.
        shape: what there is of it; ``None``: all.
        placement: of the shape.
    """

    surface: Surface
    material: Material
    shape: Shape | None = None
    placement: Placement | None = None

    def covers(self, x: Array, y: Array) -> Array:
        """Which points are inside its shape."""
        assert self.shape is not None
        assert self.placement is not None
        return self.shape(*self.placement.local(x, y))

    def extent(self, size: tuple[int, int], right: bool) -> tuple[slice, slice]:
        """Rows and columns of a view outside of which there is nothing of it; with a pixel to spare."""
        if self.placement is None:
            return slice(0, size[0]), slice(0, size[1])
        box = self.placement.box
        shifts = self.surface.range(box) if right and isinstance(self.surface, Quadric) else (0, 0)
        start, stop = box.x - box.width - shifts[1], box.x + box.width - shifts[0]
        rows = box.y - box.height, box.y + box.height
        return _within(*rows, size[0]), _within(start, stop, size[1])


class Scene(NamedTuple):
    """What two cameras look at.

    Attributes:
        layers: first the backdrop, which has no shapes: the inside of something convex, of which no part hides another.
        light: on all of them.
        highest: all disparities are below, in pixels.
        shadow: how much darker the backdrop is behind things, and how far aside for a pixel of disparity.
    """

    layers: list[Layer]
    light: Light
    highest: float
    shadow: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _within(start: float, stop: float, length: int) -> slice:
    first = min(max(math.floor(start) - 1, 0), length)
    return slice(first, min(max(math.ceil(stop) + 2, first), length))
