"""Plane figures by their equations: each function says which points of the unit disc are inside.

A point is ``u, v``; the figure fills the disc from side to side, and ``slim`` in (0, 1] is how much narrower it is
along ``v``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OUTLINES", "Outline", "Patch", "figure", "frame"]

Outline = Callable[[Tensor, Tensor], Tensor]

# Radius of the notches of a star, of the hole of a ring, half the width of the arms of a cross.
_NOTCH, _HOLE, _ARM = 0.45, 0.55, 0.3


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    return u.square() + v.square() <= 1


def _rectangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) <= math.sqrt(0.5)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    # Three lines at distance 1/2, one to each side.
    return torch.maximum(-u, u / 2 + v.abs() * math.sqrt(0.75)) <= 0.5


def _star(u: Tensor, v: Tensor) -> Tensor:
    # All ten edges are the one from a tip at angle 0 to a notch at angle pi / 5.
    fifth = 2 * math.pi / 5
    angle = torch.atan2(v, u)
    angle = (angle - fifth * (angle / fifth).round()).abs()
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin()
    notch_x, notch_y = _NOTCH * math.cos(fifth / 2), _NOTCH * math.sin(fifth / 2)
    return notch_y * x + (1 - notch_x) * y <= notch_y


def _ring(u: Tensor, v: Tensor) -> Tensor:
    radius = torch.hypot(u, v)
    return (radius <= 1) & (radius >= _HOLE)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    narrow, wide = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    return (narrow <= _ARM) & (wide <= math.sqrt(1 - _ARM**2))


def frame(u: Tensor, v: Tensor) -> Tensor:
    """A square without its middle."""
    wide = torch.maximum(u.abs(), v.abs())
    return (wide <= math.sqrt(0.5)) & (wide >= 0.4)


OUTLINES: dict[str, Outline] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


class Patch(NamedTuple):
    """A part of an image, ``image[..., rows, columns]``, and which of its pixels are meant: ``inside``, bool."""

    rows: slice
    columns: slice
    inside: Tensor


def figure(
    outline: Outline,
    size: tuple[int, int],
    *,
    centre: tuple[float, float],
    radius: float,
    angle: float = 0.0,
    slim: float = 1.0,
) -> Patch:
    """The pixels of an image whose centres are inside a figure.

    Args:
        outline: says which points of the unit disc are inside.
        size: ``(H, W)`` of the image.
        centre: ``(y, x)`` in pixels, where a pixel's own centre is at a half.
        radius: of the disc that the figure fills, in pixels.
        angle: by which it is turned, in radians.
        slim: its width against its length.

    Returns:
        The part of the image around the figure, whatever of it is in the image.

    Example:
        >>> patch = figure(OUTLINES["cross"], (9, 9), centre=(4.5, 4.5), radius=2.5)
        >>> patch.rows, patch.columns
        (slice(2, 7, None), slice(2, 7, None))
        >>> patch.inside.int().tolist()
        [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]
    """
    rows, columns = (
        slice(max(0, math.floor(c - radius)), max(0, min(length, math.ceil(c + radius))))
        for c, length in zip(centre, size, strict=True)
    )
    y = torch.arange(size[0], dtype=torch.float64)[rows, None] + 0.5 - centre[0]
    x = torch.arange(size[1], dtype=torch.float64)[columns] + 0.5 - centre[1]
    u = (x * math.cos(angle) + y * math.sin(angle)) / radius
    v = (y * math.cos(angle) - x * math.sin(angle)) / (radius * slim)
    return Patch(rows, columns, outline(u, v))
