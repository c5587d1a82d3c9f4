"""Random scenes: rooms, streets, hung cloth, and things in them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from .choices import pick
from .layers import Layer, Scene
from .materials import Light, MaterialSource
from .objects import KINDS, LOWEST, Stage
from .surfaces import Quadric, Relief, Surface

__all__ = ["random_scene"]

Random = np.random.Generator


def random_scene(
    random: Random,
    size: tuple[int, int],
    max_disparity: float,
    *,
    seed: int,
    photographs: Callable[[int], Tensor] | None = None,
) -> Scene:
    """A scene that fills both views.

    Args:
        random: of all choices.
        size: height and width of the image.
        max_disparity: all disparities are below, in pixels.
        seed: of the textures.
        photographs: tiles of them, by number.
    """
    # With more than this hardly anything would be in both views.
    most = min(max_disparity, 0.45 * size[1]) - LOWEST
    nearest = most * math.exp(random.uniform(math.log(0.25), 0))
    material = MaterialSource(random, seed, photographs)
    focal_length = size[1] * random.uniform(0.7, 1.6)
    parts, ground = pick(random, _BACKDROPS)(random, size, nearest)
    surfaces = [surface for surface, _ in parts]

    def backdrop(x: float, y: float) -> float:
        point = np.array([[x]]), np.array([[y]])
        return max(LOWEST, *(surface.disparity(*point).item() for surface in surfaces))

    stage = Stage(random, material, size, nearest, backdrop, ground, focal_length)
    layers = [Layer(surface, material(contrast=contrast)) for surface, contrast in parts]
    for _ in range(int(random.integers(6, 22))):
        layers += pick(random, KINDS)(stage)
    return Scene(
        layers, _random_light(random, size, focal_length), nearest + 1, _random_shadow(random)
    )


def _random_light(random: Random, size: tuple[int, int], focal_length: float) -> Light:
    direction = np.array([random.normal(0, 0.5), random.uniform(0, 0.9), 1.0])
    i, j, k = (direction / np.linalg.norm(direction)).tolist()
    x, y = random.uniform(0, size[1]), random.uniform(-0.2, 0.7) * size[0]
    spot = (x, y, size[1] * random.uniform(0.4, 1.5))
    return Light((i, j, k), random.uniform(0.35, 0.8), spot, focal_length)


def _random_shadow(random: Random) -> tuple[float, float, float]:
    aside, below = random.normal(0, 0.4), random.uniform(0, 0.4)
    # Under a cloudy sky there are none.
    return max(0.0, random.uniform(-0.2, 0.45)), aside, below


# Surfaces with the contrast of their textures, and the row where something of a disparity stands.
Backdrop = tuple[list[tuple[Surface, float]], Callable[[float], float] | None]


def _room(random: Random, size: tuple[int, int], nearest: float) -> Backdrop:
    """A wall, mostly a floor or a table before it, and now and then a wall beside it.

    The nearest of several planes is the room's inside; they meet where they are equally near.
    """
    height, width = size
    far = nearest * random.uniform(0.08, 0.5)
    tilt = far * random.uniform(-0.4, 0.4) / width, far * random.uniform(-0.15, 0.15) / height
    parts: list[tuple[Surface, float]] = [
        (Quadric((width / 2, height / 2), far, tilt), random.uniform(0.2, 1))
    ]
    ground = None
    if random.random() < 0.8:
        start = height * random.uniform(0.45, 0.95)
        floor, ground = _floor(random, size, start, far, nearest)
        parts.append((floor, random.uniform(0.4, 1)))
    if random.random() < 0.25:
        side = pick(random, ((-1, 1), (1, 1)))
        corner = width * (0.5 + side * random.uniform(0.2, 0.45))
        steep = random.uniform(0, 0.9 * nearest - far) / (width / 2)
        wall = Quadric((corner, height / 2), far, (side * steep, 0.0))
        parts.append((wall, random.uniform(0.2, 1)))
    return parts, ground


def _street(random: Random, size: tuple[int, int], nearest: float) -> Backdrop:
    """A plane to the horizon, and what is far behind it."""
    height, width = size
    far = min(random.uniform(LOWEST, 4), 0.3 * nearest)
    sky = Quadric((width / 2, height / 2), far)
    road, ground = _floor(random, size, height * random.uniform(0.25, 0.6), far, nearest)
    return [(sky, random.uniform(0.05, 0.8)), (road, random.uniform(0.4, 1))], ground


def _floor(
    random: Random, size: tuple[int, int], start: float, far: float, nearest: float
) -> tuple[Quadric, Callable[[float], float]]:
    """A plane that leaves what is far at the row ``start``, and the row where something of a disparity stands on it."""
    height, width = size
    end = random.uniform(far + 0.2 * (nearest - far), 0.9 * nearest)
    steep = (end - far) / (height - start)
    slope = end * random.uniform(-0.05, 0.05) / width

    def ground(level: float) -> float:
        return min(start + (level - far) / steep, 1.2 * height)

    return Quadric((width / 2, start), far, (slope, steep)), ground


def _cloth(random: Random, size: tuple[int, int], nearest: float) -> Backdrop:
    """A surface with folds or hills."""
    height, width = size
    level = nearest * random.uniform(0.15, 0.6)
    slope = level * random.uniform(-0.4, 0.4) / width, level * random.uniform(-0.3, 0.3) / height
    plane = Quadric((width / 2, height / 2), level, slope)
    count = int(random.integers(2, 6))
    periods = width * np.exp(random.uniform(math.log(0.12), math.log(1.2), (count, 2)))
    # Waves of a share of their length, all together neither too steep nor out of bounds.
    amplitudes = random.normal(0, 0.03, count) * periods.min(1)
    total = float(np.abs(amplitudes).sum())
    steepness = float((np.abs(amplitudes) * 2 * math.pi / periods[:, 0]).sum())
    room = min(level, nearest - level) - 0.35 * level
    amplitudes *= min(1.0, 0.35 / max(steepness, 1e-9), 0.9 * room / max(total, 1e-9))
    phases = random.uniform(0, 2 * math.pi, (count, 2))
    frequencies = 2 * math.pi / periods
    waves = np.stack([frequencies[:, 0], phases[:, 0], frequencies[:, 1], phases[:, 1]], axis=1)
    return [(Relief(plane, amplitudes, waves, size, nearest), 1.0)], None


_BACKDROPS = ((_room, 0.5), (_street, 0.2), (_cloth, 0.3))
