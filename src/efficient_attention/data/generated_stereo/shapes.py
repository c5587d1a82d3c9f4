"""Shapes that bound a surface: what is inside, in coordinates of their own.

A shape lies in the square ``[-1, 1]^2``. Sizes of what is thin are shares of it, so that whoever draws a shape decides
how many pixels they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = [
    "Shape",
    "bar",
    "blob",
    "frame",
    "lattice",
    "leaf",
    "pebble",
    "polygon",
    "ring",
    "scatter",
    "wheel",
]

Array = np.ndarray
# Points to bool.
Shape = Callable[[Array, Array], Array]


def bar() -> Shape:
    """All of the square."""
    return lambda p, q: (np.abs(p) < 1) & (np.abs(q) < 1)


def pebble(doublings: int) -> Shape:
    """Between an ellipse and a rectangle: ``|p|^n + |q|^n < 1`` with ``n = 2^doublings``."""

    def inside(p: Array, q: Array) -> Array:
        for _ in range(doublings):
            p, q = p * p, q * q
        return p + q < 1

    return inside


def ring(width: float) -> Shape:
    def inside(p: Array, q: Array) -> Array:
        square = p * p + q * q
        return (square < 1) & (square > (1 - width) ** 2)

    return inside


def frame(width: float, height: float) -> Shape:
    """A rectangle with a rectangular hole; its borders are so wide, and so high."""

    def inside(p: Array, q: Array) -> Array:
        across, down = np.abs(p), np.abs(q)
        return (across < 1) & (down < 1) & ((across > 1 - width) | (down > 1 - height))

    return inside


def lattice(columns: int, rows: int, width: float, height: float) -> Shape:
    """Bars across each other; 0 columns or rows: only bars along the other axis."""

    def inside(p: Array, q: Array) -> Array:
        upright = np.abs((p + 1) * columns / 2 % 1 - 0.5) < width * columns / 4
        level = np.abs((q + 1) * rows / 2 % 1 - 0.5) < height * rows / 4
        return (np.abs(p) < 1) & (np.abs(q) < 1) & (upright | level)

    return inside


def wheel(spokes: int, width: float) -> Shape:
    """A rim with spokes."""
    rim = ring(width)
    directions = np.pi * np.arange(spokes) / spokes

    def inside(p: Array, q: Array) -> Array:
        found = rim(p, q)
        disc = p * p + q * q < 1
        for angle in directions:
            found |= disc & (np.abs(p * np.sin(angle) - q * np.cos(angle)) < width / 2)
        return found

    return inside


def scatter(centres: Array, radii: Array) -> Shape:
    """Discs beside and over each other, such as foliage; ``[N, 2]`` and ``[N]``."""

    def inside(p: Array, q: Array) -> Array:
        found: Array = np.zeros(np.broadcast(p, q).shape, dtype=bool)
        for (x, y), radius in zip(centres.tolist(), radii.tolist(), strict=True):
            found |= (p - x) ** 2 + (q - y) ** 2 < radius * radius
        return found

    return inside


def blob(waves: Array) -> Shape:
    """A disc whose radius has waves of 1, 2, 3, ... periods around: ``r = 1 + sum_k c_k cos(k t) + s_k sin(k t)``.

    ``waves`` is ``[K, 2]``, ``c`` and ``s``. One entry alone makes a star.
    """
    scale = 1 + float(np.hypot(*waves.T).sum())

    def inside(p: Array, q: Array) -> Array:
        distance = np.sqrt(p * p + q * q) + np.float32(1e-6)
        # The angle's cosine and sine give those of its multiples.
        cosine, sine = p / distance, q / distance
        c, s = cosine, sine
        radius: Array | float = 1.0
        for number, (of_cosine, of_sine) in enumerate(waves.tolist()):
            if number:
                c, s = c * cosine - s * sine, s * cosine + c * sine
            if of_cosine or of_sine:
                radius = radius + of_cosine * c + of_sine * s
        return distance * scale < radius

    return inside


def leaf(width: float, bend: float, skew: float) -> Shape:
    """From p = -1 to 1; wider before its middle for a positive ``skew``, in [-1, 1]; bent by so much of its length."""

    def inside(p: Array, q: Array) -> Array:
        square = p * p
        half = width * (1 - square) * (1 - skew * p)
        return np.abs(q - bend * (square - 0.5)) < half

    return inside


def polygon(corners: Array) -> Shape:
    """A convex polygon ``[N, 2]``, its corners in order."""
    start, end = corners, np.roll(corners, -1, axis=0)
    (dx, dy), (x, y) = (end - start).T, start.T
    area = float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())
    turn = np.sign(area) or 1.0

    def inside(p: Array, q: Array) -> Array:
        found: Array = np.ones(np.broadcast(p, q).shape, dtype=bool)
        for a, b, i, j in zip(dx, dy, x, y, strict=True):
            found &= (float(a) * (q - float(j)) - float(b) * (p - float(i))) * turn > 0
        return found

    return inside
