"""What surfaces look like: a tile of texture, laid on somehow, in colours; and light.

Colours are in [0, 1], as a camera stores them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .choices import pick
from .textures import TILE_SIZE, TILES, tile

__all__ = ["Laying", "Light", "Material", "MaterialSource", "fetch"]

Random = np.random.Generator
Array = np.ndarray
# Two rows: factors of x and of y, and what is added.
Laying = tuple[tuple[float, float, float], tuple[float, float, float]]


class Material(NamedTuple):
    """``colour(x, y) = base + colours @ tile(laying (x, y, 1))``.

    Attributes:
        tile: ``[C, h + 1, w + 1]``; the last row and column are the first ones again, and so it goes on beyond.
        laying: from x, y and 1 to pixels of the tile; x is where an eye between the cameras would see a point.
        colours: of the tile's channels, ``[3, C]``.
        base: ``[3]``.
        gloss: a highlight of so much brightness; it wanders over the surface as the eye moves.
    """

    tile: Tensor
    laying: Laying
    colours: Tensor
    base: Tensor
    gloss: float = 0.0

    def at(self, x: Tensor, y: Tensor) -> Tensor:
        """Colours ``[3, N]`` at points ``[N]`` of the surface."""
        height, width = (side - 1 for side in self.tile.shape[1:])
        across, down = (
            _fraction(torch.add(x * (a / side), y, alpha=b / side).add_(c / side)).mul_(side)
            for (a, b, c), side in zip(self.laying, (width, height), strict=True)
        )
        return torch.addmm(self.base[:, None], self.colours, fetch(self.tile, across, down))


class Light(NamedTuple):
    """One far light, what comes from everywhere, and a bright region.

    Attributes:
        direction: of the light along the slopes of disparity and towards the camera, of length 1. Its second part is
            positive when it comes from above.
        ambient: share that comes from everywhere.
        spot: x and y of the brightest point and the radius where half is left, in pixels.
        focal_length: in pixels; how much a slope of disparity tilts a surface.
    """

    direction: tuple[float, float, float]
    ambient: float
    spot: tuple[float, float, float]
    focal_length: float

    def shade(
        self, gradient: tuple[Array | float, Array | float], disparity: Array, x: Array, y: Array
    ) -> Array:
        """Brightness of a white surface there, about 1 where it faces the camera."""
        tilt = self.focal_length / np.maximum(disparity, 1)
        across, down = gradient[0] * tilt, gradient[1] * tilt
        i, j, k = self.direction
        cosine = (i * across + j * down + k) / np.sqrt(across * across + down * down + 1)
        lit = self.ambient + (1 - self.ambient) * np.maximum(cosine, 0) / max(k, 0.5)
        p, q, radius = self.spot
        return lit / (1 + ((x - p) ** 2 + (y - q) ** 2) * (0.3 / radius**2))


class MaterialSource:
    """Random materials that could belong to one scene.

    Args:
        random: of all choices.
        seed: of the textures.
        photographs: tiles ``[3, h, w]`` of them in [0, 1], which half of the materials then show.
    """

    def __init__(
        self, random: Random, seed: int, photographs: Callable[[int], Tensor] | None
    ) -> None:
        self._random, self._seed, self._photographs = random, seed, photographs
        # Rooms and streets have a few colours that come again.
        self._palette = [_natural_colour(random) for _ in range(5)]

    def __call__(self, *, contrast: float = 1.0) -> Material:
        """A new material; ``contrast`` scales what its texture does to its colour."""
        random = self._random
        number = int(random.integers(TILES))
        if self._photographs is not None and random.random() < 0.5:
            picture = self._photographs(number)
            mixed = np.eye(3) + random.normal(0, 0.06, (3, 3))
            gain = torch.from_numpy(random.uniform(0.6, 1.1) * mixed).float()
            return Material(picture, self._laying(), gain, torch.zeros(3), self._gloss())
        common = random.random() < 0.6
        base = self._palette[random.integers(5)] if common else _natural_colour(random)
        accent = _natural_colour(random)
        lightness = contrast * random.uniform(0.1, 0.55) * (0.25 + 0.75 * base)
        tint = contrast * random.uniform(0, 0.45) * (accent - base)
        colours = np.stack([lightness, tint], axis=1).astype(np.float32)  # [3, 2]
        return Material(
            tile(self._seed, number),
            self._laying(),
            torch.from_numpy(colours),
            torch.from_numpy(base.astype(np.float32)),
            self._gloss(),
        )

    def _laying(self) -> Laying:
        random = self._random
        # Most things are upright.
        angle = random.uniform(0, 2 * math.pi) if random.random() < 0.4 else random.normal(0, 0.06)
        scale = math.exp(random.uniform(math.log(0.55), math.log(1.7)))  # texels for a pixel
        stretch = math.exp(random.normal(0, 0.15))
        c, s = math.cos(angle) * scale, math.sin(angle) * scale
        dx, dy = random.uniform(0, 2 * TILE_SIZE, 2).tolist()
        return (c * stretch, s * stretch, dx), (-s / stretch, c / stretch, dy)

    def _gloss(self) -> float:
        return self._random.uniform(0.1, 0.6) if self._random.random() < 0.12 else 0.0


def fetch(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear values ``[C, N]`` of ``[C, h, w]`` at points ``[N]`` of it; beyond its border, those on it."""
    height, width = image.shape[1:]
    # Filled and not stacked: several times as fast.
    grid = x.new_empty(len(x), 2)
    torch.add(1 / width - 1, x, alpha=2 / width, out=grid[:, 0])
    torch.add(1 / height - 1, y, alpha=2 / height, out=grid[:, 1])
    found = F.grid_sample(
        image[None], grid[None, None], "bilinear", padding_mode="border", align_corners=False
    )
    return found[0, :, 0]


def _fraction(x: Tensor) -> Tensor:
    """In [0, 1), in place."""
    return x.sub_(x.floor())


# Wood and skin, leaves, sky, and anything.
_HUES = (((0.02, 0.14), 0.5), ((0.2, 0.42), 0.2), ((0.52, 0.68), 0.15), ((0.0, 1.0), 0.1))


def _natural_colour(random: Random) -> Array:
    """Mostly dull: walls, wood, stone, leaves, cloth; now and then paint."""
    hue = random.uniform(*pick(random, _HUES))
    saturation = (
        0.8 * random.beta(1.4, 4.0) if random.random() < 0.94 else random.uniform(0.4, 0.75)
    )
    return np.array(colorsys.hsv_to_rgb(hue, saturation, random.uniform(0.2, 0.95)))
