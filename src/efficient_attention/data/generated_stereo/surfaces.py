"""Surfaces as disparities over the left image, and where the right camera sees them.

A plane in space has a disparity that is linear in the pixel coordinates x and y, whatever its tilt; a quadric bends.
Coordinates are those of the left image, in pixels; they are float32 arrays that broadcast.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Box", "Quadric", "Relief", "Surface"]

Array = np.ndarray

# How fast a disparity may change from pixel to pixel. At 1 the right camera would see the surface edge-on.
STEEPEST = 0.6


class Box(NamedTuple):
    """A rectangle in the left image.

    Attributes:
        x: of the centre.
        y: of the centre.
        width: half of it.
        height: half of it.
    """

    x: float
    y: float
    width: float
    height: float


class Surface(Protocol):
    """What a surface can tell."""

    def disparity(self, x: Array, y: Array) -> Array:
        """At points of the left image."""

    def trace(self, column: Array, y: Array) -> Array:
        """The x that the right camera sees in a column: ``x - disparity(x, y) = column``; NaN where there is none."""

    def gradient(self, x: Array, y: Array) -> tuple[Array | float, Array | float]:
        """How the disparity changes along x and along y."""


class Quadric(NamedTuple):
    """``d = level + slope . r + r . curve . r`` with ``r = (x, y) - centre``, and ``curve`` symmetric.

    Attributes:
        centre: of the bulge, or any point of a plane.
        level: disparity there.
        slope: along x and y.
        curve: along x, of the product of both, and along y, as factors of ``rx^2, rx ry, ry^2``.
    """

    centre: tuple[float, float]
    level: float
    slope: tuple[float, float] = (0.0, 0.0)
    curve: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def is_plane(self) -> bool:
        return not any(self.curve)

    def disparity(self, x: Array, y: Array) -> Array:
        (p, q), (b, c), (e, f, g) = self.centre, self.slope, self.curve
        u, v = x - p, y - q
        flat = self.level + b * u + c * v
        if self.is_plane:
            return flat
        return flat + (e * u + f * v) * u + g * v * v

    def trace(self, column: Array, y: Array) -> Array:
        """The root of ``e u^2 - (1 - b - f v) u + (level + c v + g v^2 + column - p) = 0`` next to that of a plane.

        There the surface turns its front to both cameras; the other root is behind a fold.
        """
        (p, q), (b, c), (e, f, g) = self.centre, self.slope, self.curve
        v = y - q
        constant = column - p + (self.level + (c + g * v) * v)
        if self.is_plane:
            return p + constant * (1 / (1 - b))
        steep = 1 - b - f * v
        return p + 2 * constant / (steep + np.sqrt(steep * steep - 4 * e * constant))

    def gradient(self, x: Array, y: Array) -> tuple[Array | float, Array | float]:
        (p, q), (b, c), (e, f, g) = self.centre, self.slope, self.curve
        if self.is_plane:
            return b, c
        u, v = x - p, y - q
        return b + 2 * e * u + f * v, c + f * u + 2 * g * v

    def range(self, box: Box) -> tuple[float, float]:
        """Bounds of the disparity in a box around its centre."""
        (b, c), (e, f, g) = self.slope, self.curve
        w, h = box.width, box.height
        swing = abs(b) * w + abs(c) * h + abs(e) * w * w + abs(f) * w * h + abs(g) * h * h
        return self.level - swing, self.level + swing

    def fitted(self, box: Box, lowest: float, highest: float) -> Quadric:
        """Flattened as far as bounds need it: of its disparity in a box around its centre, and of its steepness."""
        (b, c), (e, f, g) = self.slope, self.curve
        swing = self.range(box)[1] - self.level
        steepness = abs(b) + 2 * abs(e) * box.width + abs(f) * box.height
        room = min(self.level - lowest, highest - self.level)
        factor = min(1.0, room / max(swing, 1e-9), STEEPEST / max(steepness, 1e-9))
        scaled = (b * factor, c * factor), (e * factor, f * factor, g * factor)
        return Quadric(self.centre, self.level, *scaled)


class Relief:
    """A plane with waves, as hanging cloth or hills: ``d = level + slope . (x, y) + sum_k a_k sin(..x) sin(..y)``.

    Args:
        plane: what the waves are on.
        amplitudes: in pixels of disparity, ``[K]``.
        waves: ``[K, 4]``: frequency and phase along x, then along y, in radians.
        size: height and width of the left image.
        highest: no disparity in the left image is above; the right one shows about so much more of the surface.
    """

    def __init__(
        self, plane: Quadric, amplitudes: Array, waves: Array, size: tuple[int, int], highest: float
    ) -> None:
        self.plane, self.amplitudes, self.waves = plane, amplitudes, waves
        self._columns = np.arange(size[1] + math.ceil(1.25 * highest) + 2.0)

    def disparity(self, x: Array, y: Array) -> Array:
        """At points of a grid: a row x and a column y."""
        return self.plane.disparity(x, y) + self._sines(1, y) @ (
            self._sines(0, x).T * self.amplitudes[:, None]
        )

    def trace(self, column: Array, y: Array) -> Array:
        # Between neighbouring pixels of a row the surface is taken to be straight. All rows at once, as one rising
        # function: every row starts where the one before has ended.
        seen = self._columns - self.disparity(self._columns[None], y)  # [H, W']
        apart = 4.0 * len(self._columns)
        starts = apart * np.arange(len(seen))[:, None]
        target = np.broadcast_to(column, (len(seen), column.shape[-1]))
        x = np.interp(
            (target + starts).ravel(), (seen + starts).ravel(), np.tile(self._columns, len(seen))
        )
        return x.reshape(target.shape).astype(np.float32)

    def gradient(self, x: Array, y: Array) -> tuple[Array, Array]:
        """At points of a grid, as for :meth:`disparity`."""
        b, c = self.plane.slope
        rows, columns = self._sines(1, y), self._sines(0, x).T * self.amplitudes[:, None]
        along_x = self._cosines(0, x).T * self.amplitudes[:, None]
        return b + rows @ along_x, c + self._cosines(1, y) @ columns

    def _sines(self, axis: int, points: Array) -> Array:
        frequency, phase = self.waves[:, 2 * axis], self.waves[:, 2 * axis + 1]
        return np.sin(points.reshape(-1, 1) * frequency + phase)  # [N, K]

    def _cosines(self, axis: int, points: Array) -> Array:
        frequency, phase = self.waves[:, 2 * axis], self.waves[:, 2 * axis + 1]
        return np.cos(points.reshape(-1, 1) * frequency + phase) * frequency
