"""Two views of a scene, by asking for every pixel of either which surface it shows and where.

Pixels of the right view are traced back to the left image, so that nothing is splatted or filled in: disparities are
exact to a fraction of a pixel, thin things stay whole, and what is hidden is known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .layers import Layer, Scene
from .materials import fetch
from .surfaces import Quadric

__all__ = ["Rendering", "render"]

Array = np.ndarray

# Light falls on the backdrop softly: one value for so many pixels each way is enough.
_COARSE = 8


class Rendering(NamedTuple):
    """What ideal cameras see.

    Attributes:
        left: ``[3, H, W]`` float32; about 0 to 1, may exceed it.
        right: likewise.
        disparity: ``[H, W]`` float32, of the left view, in pixels.
        visible: ``[H, W]`` bool: the right view shows the point, too.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor
    visible: Tensor


class _View(NamedTuple):
    """For every pixel ``[H, W]``: the nearest surface, its disparity, and where in the left image it is."""

    layer: Array
    disparity: Array
    x: Array
    y: Array


def render(
    scene: Scene, size: tuple[int, int], *, drop: float = 0.0, wander: float = 0.0
) -> Rendering:
    """Both views of a scene.

    Args:
        scene: what to see.
        size: height and width.
        drop: rows by which the right camera looks lower than the left one, at most 1; an ideal one does not.
        wander: how far highlights are shifted between the views beside their disparity, in pixels.
    """
    left, right = _look(scene, size, right=False), _look(scene, size, right=True, drop=drop)
    pixels = _paint(scene, left, right, size, wander)
    backdrop = sum(part.placement is None for part in scene.layers)
    visible = _visible(left, right, backdrop, drop)
    return Rendering(*pixels, torch.from_numpy(left.disparity), torch.from_numpy(visible))


def _look(scene: Scene, size: tuple[int, int], *, right: bool, drop: float = 0.0) -> _View:
    disparity = np.full(size, -np.inf, dtype=np.float32)
    layer = np.zeros(size, dtype=np.int16)
    columns = np.arange(size[1], dtype=np.float32)[None]
    rows = np.arange(size[0], dtype=np.float32)[:, None] + np.float32(drop)
    x = np.broadcast_to(columns, size).copy()
    for number, candidate in enumerate(scene.layers):
        box = candidate.extent(size, right)
        column, y = columns[:, box[1]], rows[box[0]]
        if right:
            # A surface that bends away has no such point, and so does one that is behind its own fold.
            with np.errstate(invalid="ignore"):
                seen = candidate.surface.trace(column, y)
            found = seen - column
        else:
            seen, found = column, candidate.surface.disparity(column, y)
        # False for NaN.
        nearer = found > disparity[box]
        if candidate.placement is not None:
            if not nearer.any():
                continue
            nearer &= candidate.covers(seen, y)
        np.copyto(disparity[box], found, where=nearer)
        np.copyto(x[box], seen, where=nearer)
        np.copyto(layer[box], number, where=nearer)
    return _View(layer, disparity, x, np.broadcast_to(rows, size))


def _visible(left: _View, right: _View, backdrop: int, drop: float) -> Array:
    """Not outside of the right view, and not behind another surface there; the first ones are the backdrop."""
    height, width = left.layer.shape
    column = np.rint(left.x - left.disparity).astype(np.intp)
    row = np.rint(left.y - np.float32(drop)).astype(np.intp)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    nearest = row.clip(0, height - 1) * width + column.clip(0, width - 1)
    seen = right.layer.take(nearest)
    # Faces that meet at an edge differ by less than this at the pixel that is taken for the point.
    before = right.disparity.take(nearest) > left.disparity + 0.5
    return inside & ~(before & (seen != left.layer) & (seen >= backdrop))


def _paint(
    scene: Scene, left: _View, right: _View, size: tuple[int, int], wander: float
) -> tuple[Tensor, Tensor]:
    """Every surface once, at all points of it that either view shows."""
    layer, disparity, x, y = (
        np.concatenate([of_left.ravel(), of_right.ravel()])
        for of_left, of_right in zip(left, right, strict=True)
    )
    order = np.argsort(layer, kind="stable")
    ends = np.cumsum(np.bincount(layer, minlength=len(scene.layers)))
    brightness = _backdrop_light(scene, size)
    image = np.empty((3, len(layer)), dtype=np.float32)
    for number, (start, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
        if start == end:
            continue
        part, pixels = scene.layers[number], order[start:end]
        near = disparity.take(pixels)
        at = torch.from_numpy(x.take(pixels)), torch.from_numpy(y.take(pixels))
        # Between the eyes, so that textures are stretched in neither view more than in the other.
        found = part.material.at(at[0] - torch.from_numpy(near) / 2, at[1])
        if part.placement is None:
            found *= fetch(brightness[number], at[0] / _COARSE, at[1] / _COARSE)
        else:
            found *= _shade(scene, part, at, near)
            if part.material.gloss:
                found += _highlight(part, at, pixels >= layer.size // 2, wander)
        for channel, values in zip(image, found.numpy(), strict=True):
            channel[pixels] = values
    views = torch.from_numpy(image).view(3, 2, *size)
    return views[:, 0], views[:, 1]


def _shade(scene: Scene, part: Layer, at: tuple[Tensor, Tensor], disparity: Array) -> Tensor:
    x, y = (points.numpy() for points in at)
    surface = part.surface
    if isinstance(surface, Quadric) and surface.is_plane:
        # Lit alike all over.
        disparity = np.array(surface.level, dtype=np.float32)
    return torch.from_numpy(scene.light.shade(surface.gradient(x, y), disparity, x, y))


def _highlight(part: Layer, at: tuple[Tensor, Tensor], right: Array, wander: float) -> Tensor:
    assert part.placement is not None
    box = part.placement.box
    radius = 0.2 * min(box.width, box.height) + 1
    centre = box.x - 0.3 * box.width + torch.from_numpy(right) * wander
    square = (at[0] - centre) ** 2 + (at[1] - box.y + 0.3 * box.height) ** 2
    return part.material.gloss * torch.exp(square / -(radius * radius))


def _backdrop_light(scene: Scene, size: tuple[int, int]) -> dict[int, Tensor]:
    """The brightness of every surface of the backdrop: its tilt to the light, and shadows; ``[1, h, w]``."""
    x = np.arange(0, size[1] + scene.highest + _COARSE, _COARSE, dtype=np.float32)[None]
    y = np.arange(0, size[0] + _COARSE, _COARSE, dtype=np.float32)[:, None]
    backdrop = {n: part for n, part in enumerate(scene.layers) if part.placement is None}
    disparities = {n: part.surface.disparity(x, y) for n, part in backdrop.items()}
    nearest = np.maximum.reduce(list(disparities.values()))
    shadow = _shadow(scene, x, y, nearest)
    light = {}
    for number, part in backdrop.items():
        shade = scene.light.shade(part.surface.gradient(x, y), disparities[number], x, y)
        light[number] = torch.from_numpy((shade * shadow).astype(np.float32))[None]
    return light


def _shadow(scene: Scene, x: Array, y: Array, backdrop: Array) -> Array:
    """What is left of the light behind things, blurred; ``backdrop`` is the disparity of what it falls on."""
    strength, aside, below = scene.shadow
    light = np.ones(backdrop.shape, dtype=np.float32)
    for part in scene.layers if strength else ():
        if part.placement is not None:
            row = min(max(int(part.placement.y / _COARSE), 0), len(y) - 1)
            column = min(max(int(part.placement.x / _COARSE), 0), x.size - 1)
            here = np.array([[part.placement.x]]), np.array([[part.placement.y]])
            gap = part.surface.disparity(*here).item() - float(backdrop[row, column])
            light[part.covers(x - aside * gap, y - below * gap)] *= 1 - strength
    wide = np.pad(light, 1, mode="edge")
    columns = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (columns[:-2] + columns[1:-1] + columns[2:]) / 9
