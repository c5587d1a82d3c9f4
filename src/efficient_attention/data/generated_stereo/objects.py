"""Things that stand, lie and hang in a scene, each of one layer or more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from . import shapes
from .choices import pick
from .layers import Layer, Placement
from .materials import Material, MaterialSource
from .surfaces import Quadric

__all__ = ["KINDS", "LOWEST", "Stage", "visible_faces"]

Array = np.ndarray
Random = np.random.Generator

# The corners of a square, around it.
_SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
# Nothing is farther away than this, in pixels of disparity.
LOWEST = 0.25


class Stage(NamedTuple):
    """Where things are put.

    Attributes:
        random: of all choices.
        material: new materials.
        size: height and width of the image.
        nearest: disparity that nothing exceeds.
        backdrop: disparity behind a point ``(x, y)``.
        ground: row where something of a disparity stands, or ``None`` if nothing stands.
        focal_length: in pixels.
    """

    random: Random
    material: MaterialSource
    size: tuple[int, int]
    nearest: float
    backdrop: Callable[[float, float], float]
    ground: Callable[[float], float] | None
    focal_length: float

    def place(self, tallest: float = 0.35) -> tuple[float, float, float, float]:
        """Somewhere before the backdrop: x and y of a centre, disparity, and half a height."""
        random, (height, width) = self.random, self.size
        x, y = random.uniform(-0.05, 1.1) * width, random.uniform(-0.05, 1.05) * height
        behind = self.backdrop(x, y)
        nearness = random.beta(1.2, 1.8)
        level = behind + (self.nearest - behind) * (0.04 + 0.92 * nearness)
        # What is near looks large.
        half = (
            height * math.exp(random.uniform(math.log(0.06), math.log(tallest))) * (0.5 + nearness)
        )
        if self.ground is not None and random.random() < 0.75:
            y = self.ground(level) - half
        return x, y, level, half

    def lay(
        self, shape: shapes.Shape, placement: Placement, surface: Quadric, material: Material
    ) -> Layer:
        """A layer that is bent no more than keeps it between the farthest and the nearest."""
        fitted = surface.fitted(placement.box, LOWEST, self.nearest)
        return Layer(fitted, material, shape, placement)


def solid(stage: Stage) -> list[Layer]:
    """A thing with an outline: flat, tilted or round."""
    random = stage.random
    x, y, level, half = stage.place()
    breadth = half * math.exp(random.normal(0, 0.5))
    angle = random.normal(0, 0.15) if random.random() < 0.6 else random.uniform(-math.pi, math.pi)
    placement = Placement(x, y, breadth, half, angle)
    shape = pick(random, _SOLIDS)(random)
    surface = _bent(random, placement, level)
    return [stage.lay(shape, placement, surface, stage.material())]


def wire(stage: Stage) -> list[Layer]:
    """A wire or a pole, a few pixels wide."""
    random = stage.random
    x, y, level, half = stage.place()
    upright = math.pi / 2 + random.normal(0, 0.1)
    angle = pick(random, ((upright, 1), (random.uniform(0, math.pi), 1)))
    placement = Placement(x, y, random.uniform(1, 5) * half, random.uniform(0.5, 2.5), angle)
    surface = Quadric((x, y), level, (random.normal(0, 0.1), random.normal(0, 0.1)))
    return [stage.lay(shapes.bar(), placement, surface, stage.material())]


def filigree(stage: Stage) -> list[Layer]:
    """A ring, a frame, a fence, a wheel: a few pixels wide, and what is behind shows."""
    random = stage.random
    x, y, level, half = stage.place(0.6)
    placement = Placement(x, y, half * random.uniform(0.7, 1.5), half, random.normal(0, 0.2))
    thickness = random.uniform(1.0, 5.0)
    width, height = (min(0.5, thickness / side) for side in (placement.length, placement.breadth))
    columns, rows = (int(n) for n in random.integers(0, 7, 2))
    kinds = (
        shapes.ring(height),
        shapes.frame(width, height),
        shapes.lattice(columns, max(rows, 2) if columns == 0 else rows, width, height),
        shapes.wheel(int(random.integers(2, 6)), height),
    )
    surface = Quadric((x, y), level, (random.normal(0, 0.1), random.normal(0, 0.1)))
    return [stage.lay(kinds[random.integers(4)], placement, surface, stage.material())]


def plant(stage: Stage) -> list[Layer]:
    """Leaves from one root, some towards the eye and some away."""
    random = stage.random
    x, y, level, half = stage.place()
    root = y + half
    material, narrow = stage.material(contrast=0.7), random.uniform(0.06, 0.25)
    layers = []
    for angle in np.linspace(-0.95 * math.pi, -0.05 * math.pi, int(random.integers(4, 9))).tolist():
        angle += random.normal(0, 0.15)
        length = half * random.uniform(0.6, 1.4)
        dx, dy = math.cos(angle), math.sin(angle)
        placement = Placement(x + dx * length, root + dy * length, length, length * 0.5, angle)
        towards = level * random.normal(0, 0.12) / length
        middle = min(max(level + towards * length, 2 * LOWEST), stage.nearest - LOWEST)
        surface = Quadric((placement.x, placement.y), middle, (towards * dx, towards * dy))
        shape = shapes.leaf(narrow, random.normal(0, 0.2), random.uniform(0, 0.9))
        layers.append(stage.lay(shape, placement, surface, material))
    return layers


def box_of(stage: Stage) -> list[Layer]:
    """A box, a book, a house: the visible faces of a cuboid, exactly as perspective has them."""
    random = stage.random
    x, y, level, half = stage.place()
    height, width = stage.size
    centre = np.array([x - width / 2, y - height / 2, stage.focal_length]) / level
    edges = _turn(random.uniform(-0.8, 0.8), random.normal(0, 0.06))
    sizes = half * np.exp(random.normal(0, 0.4, 3)) / level
    nearest_corner = centre[2] - np.abs(edges[2] * sizes).sum()
    if nearest_corner * stage.nearest <= stage.focal_length:
        return solid(stage)
    material, layers = stage.material(), []
    for outline, (b, c, level) in visible_faces(centre, edges, sizes, stage.focal_length):
        low, high = outline.min(0), outline.max(0)
        (p, q), (w, h) = ((low + high) / 2).tolist(), ((high - low) / 2).tolist()
        if min(w, h) > 0.5:
            placement = Placement(p + width / 2, q + height / 2, w, h)
            surface = Quadric((placement.x, placement.y), level + b * p + c * q, (b, c))
            look = stage.material() if random.random() < 0.4 else material
            shape = shapes.polygon((outline - [p, q]) / [w, h])
            layers.append(Layer(surface, look, shape, placement))
    return layers


def visible_faces(
    centre: Array, edges: Array, sizes: Array, focal_length: float
) -> Iterator[tuple[Array, tuple[float, float, float]]]:
    """The faces of a cuboid that are turned to both cameras.

    In space, with the distance between the cameras as unit, a pixel shows ``(x, y, focal_length) / disparity``, x and y
    counted from the middle of the image.

    Args:
        centre: ``[3]`` in space.
        edges: their directions, of length 1, in the columns of ``[3, 3]``.
        sizes: half the lengths of the edges, ``[3]``.
        focal_length: in pixels.

    Yields:
        The corners ``[4, 2]`` in the left image and the disparity ``b x + c y + level``, as ``(b, c, level)``.
    """
    for axis in range(3):
        across, along = (edges[:, other] * sizes[other] for other in range(3) if other != axis)
        for outward in (-edges[:, axis], edges[:, axis]):
            corners = (
                centre + outward * sizes[axis] + _SQUARE[:, :1] * across + _SQUARE[:, 1:] * along
            )
            # All points of a face have one product with its normal; so d = normal . (x, y, focal length) / product.
            product = outward @ corners[0]
            b, c, level = (outward * [1, 1, focal_length] / product).tolist()
            # The first is about the left camera; the second about the right one, with a margin.
            if product < 0 and b < 0.9:
                yield corners[:, :2] * (focal_length / corners[:, 2:]), (b, c, level)


def _turn(yaw: float, pitch: float) -> Array:
    """A rotation around the upright axis, and then around the one from left to right."""
    c, s, u, v = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    level = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[1, 0, 0], [0, u, -v], [0, v, u]]) @ level


def _bent(random: Random, placement: Placement, level: float) -> Quadric:
    """Flat to the eye, tilted, a column, or round."""
    box = placement.box
    kind = pick(random, (("flat", 0.3), ("tilted", 0.4), ("column", 0.15), ("round", 0.15)))
    slope, curve = (0.0, 0.0), (0.0, 0.0, 0.0)
    if kind == "tilted":
        slope = (random.normal(0, 0.15), random.normal(0, 0.15))
    elif kind != "flat":
        depth = -level * random.uniform(0.05, 0.3) * (1 if random.random() < 0.85 else -1)
        curve = (depth / box.width**2, 0.0, depth / box.height**2 if kind == "round" else 0.0)
    return Quadric((placement.x, placement.y), level, slope, curve)


def _random_blob(random: Random) -> shapes.Shape:
    return shapes.blob(random.normal(0, 0.08, (5, 2)))


def _random_leaf(random: Random) -> shapes.Shape:
    return shapes.leaf(random.uniform(0.3, 0.9), random.normal(0, 0.2), random.uniform(-1, 1))


def _random_star(random: Random) -> shapes.Shape:
    waves = np.zeros((int(random.integers(3, 9)), 2))
    waves[-1, 0] = random.uniform(0.1, 0.5)
    return shapes.blob(waves)


def _random_foliage(random: Random) -> shapes.Shape:
    count = int(random.integers(6, 16))
    radii = random.uniform(0.08, 0.4, count)
    reach, angles = random.uniform(0, 1, count) * (1 - radii), random.uniform(0, 6.3, count)
    return shapes.scatter(np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1), radii)


def _random_polygon(random: Random) -> shapes.Shape:
    angles = np.sort(random.uniform(0, 2 * math.pi, int(random.integers(3, 7))))
    return shapes.polygon(np.stack([np.cos(angles), np.sin(angles)], axis=1))


_SOLIDS: tuple[tuple[Callable[[Random], shapes.Shape], float], ...] = (
    (lambda random: shapes.bar(), 3),
    (lambda random: shapes.pebble(1), 2),
    (lambda random: shapes.pebble(int(random.integers(2, 4))), 2),
    (_random_leaf, 1),
    (_random_star, 0.6),
    (_random_blob, 2),
    (_random_foliage, 1),
    (_random_polygon, 1),
)
# What a scene is filled with, and how often.
KINDS: tuple[tuple[Callable[[Stage], list[Layer]], float], ...] = (
    (solid, 0.52),
    (box_of, 0.2),
    (filigree, 0.12),
    (wire, 0.06),
    (plant, 0.1),
)
