"""Tiles of texture: two fields over a square, which materials turn into colours.

The first field is what varies in brightness, the second what varies in colour; both are about -1 to 1. A tile follows
from a seed and a number alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..draws import seed_of
from .choices import pick

__all__ = ["TILES", "TILE_SIZE", "tile"]

TILES = 192
TILE_SIZE = 256

Field = np.ndarray
Random = np.random.Generator


# Some 50 MB for the tiles of one data set, and of another beside it.
@lru_cache(maxsize=2 * TILES)
def tile(seed: int, number: int) -> Tensor:
    """A tile of texture.

    Args:
        seed: of the data set.
        number: below :data:`TILES`; some kind of texture for every number.

    Returns:
        ``[2, TILE_SIZE + 1, TILE_SIZE + 1]`` float32, closed (see :func:`closed`); shared, not to be changed.
    """
    random = np.random.default_rng(seed_of(seed, number))
    fields = np.stack([pick(random, _KINDS)(random), _clouds(random)])
    # With less of what is finer than bilinear interpolation can carry.
    for axis in (1, 2):
        fields = (4 * fields + np.roll(fields, 1, axis) + np.roll(fields, -1, axis)) / 6
    return closed(torch.from_numpy(fields.astype(np.float32)))


def closed(image: Tensor) -> Tensor:
    """``[C, h, w]`` with its first row and column once more at the end, for interpolation: ``[C, h + 1, w + 1]``."""
    image = torch.cat([image, image[:, :1]], dim=1)
    return torch.cat([image, image[:, :, :1]], dim=2)


def _spectral(
    random: Random, slope: float, *, coarsest: float = np.inf, stretch: float = 1.0
) -> Field:
    """Noise whose amplitude falls with the frequency to the power ``slope``, of deviation 1.

    Nothing much is coarser than ``coarsest`` pixels; ``stretch`` makes it that much longer than wide.
    """
    y = np.fft.fftfreq(TILE_SIZE)[:, None] * stretch
    x = np.fft.rfftfreq(TILE_SIZE)[None]
    frequency = np.hypot(x, y)
    frequency[0, 0] = np.inf
    amplitude = frequency**-slope / (1 + (frequency * coarsest) ** -4.0)
    real, imaginary = random.standard_normal((2, *frequency.shape))
    field = np.fft.irfft2((real + 1j * imaginary) * amplitude, s=(TILE_SIZE, TILE_SIZE))
    return field / field.std()


def _clouds(random: Random) -> Field:
    return np.tanh(_spectral(random, random.uniform(1.2, 2.2)))


def _rough(random: Random) -> Field:
    """Stone, plaster, soil, lawn."""
    coarsest = random.uniform(8, 80)
    return np.tanh(0.6 * _spectral(random, random.uniform(0.4, 1.4), coarsest=coarsest))


def _blotches(random: Random) -> Field:
    """Patches with borders: leaves, camouflage, stains."""
    field = _spectral(random, random.uniform(1.4, 2.4), coarsest=random.uniform(12, 64))
    return np.tanh(random.uniform(1, 6) * (field + random.uniform(-0.7, 0.7)))


def _veins(random: Random) -> Field:
    """Marble, bark, cracks."""
    field = _spectral(random, random.uniform(1.3, 2.2), coarsest=random.uniform(16, 96))
    return 1 - 2 * np.exp(-random.uniform(2, 6) * np.abs(field))


def _grain(random: Random) -> Field:
    """Wood, brushed metal, hair: longer than wide."""
    stretch, coarsest = random.uniform(5, 14), random.uniform(6, 60)
    field = _spectral(random, random.uniform(0.8, 1.4), coarsest=coarsest, stretch=stretch)
    return np.tanh(0.8 * field)


def _cells(random: Random) -> Field:
    """Pebbles, scales, crowds of leaves: every cell its own brightness, darker at the border."""
    count = int(random.integers(8, 24))  # along a side, one centre in each square of a grid
    centres = random.uniform(0, 1, (2, count, count))
    values = random.uniform(-1, 1, (count, count))
    points = np.mgrid[:TILE_SIZE, :TILE_SIZE] * (count / TILE_SIZE)
    square = points.astype(int)
    first, second = np.full((2, TILE_SIZE, TILE_SIZE), np.inf)
    brightness = np.zeros((TILE_SIZE, TILE_SIZE))
    for dy, dx in np.ndindex(3, 3):
        neighbour = square + np.array([dy - 1, dx - 1])[:, None, None]
        # Around the edge, so that the tile can be repeated.
        y, x = neighbour % count
        distance = np.hypot(*(neighbour + centres[:, y, x] - points))
        closest = distance < first
        second = np.where(closest, first, np.minimum(second, distance))
        first = np.where(closest, distance, first)
        brightness = np.where(closest, values[y, x], brightness)
    border = np.clip((second - first) * random.uniform(2, 10), 0, 1)
    return (brightness + 1) * border - 1


def _wave(random: Random, shortest: float, longest: float) -> Field:
    """A sine along a side, with a whole number of periods."""
    periods = round(TILE_SIZE / random.uniform(shortest, longest))
    return np.sin(2 * np.pi * periods * np.arange(TILE_SIZE) / TILE_SIZE)


def _stripes(random: Random) -> Field:
    sharp = random.uniform(1, 6)
    stripes = np.tanh(sharp * (_wave(random, 4, 28) + random.uniform(-0.7, 0.7)))
    return np.broadcast_to(stripes, (TILE_SIZE, TILE_SIZE)) + 0.15 * _rough(random)


def _checks(random: Random) -> Field:
    """Checks, or under a high threshold dots."""
    product = _wave(random, 5, 28)[None] * _wave(random, 5, 28)[:, None]
    return np.tanh(random.uniform(3, 8) * (product - random.uniform(0, 0.6)))


def _weave(random: Random) -> Field:
    across, down = _wave(random, 4, 14)[None], _wave(random, 4, 14)[:, None]
    return np.maximum(across, down) * 0.7 + 0.2 * _rough(random)


def _bricks(random: Random) -> Field:
    """Courses that are shifted by half a brick, each brick its own brightness."""
    height, width = TILE_SIZE / (2 * random.integers(6, 17)), TILE_SIZE / random.integers(5, 15)
    y, x = np.mgrid[:TILE_SIZE, :TILE_SIZE].astype(float)
    gap = random.uniform(1, 2.5)
    course = (y // height).astype(int)
    x = (x + (course % 2) * (width / 2)) % TILE_SIZE
    brick = (x // width).astype(int)
    values = random.uniform(-0.2, 1, (course.max() + 1, brick.max() + 1))
    joint = (y % height < gap) | (x % width < gap)
    return np.where(joint, -0.8, values[course, brick]) + 0.2 * _rough(random)


def _wallpaper(random: Random) -> Field:
    """One motif over and over, every second column lower by half of it."""
    height, width = 2 ** random.integers(3, 6, 2)
    motif = _blotches(random)[:height, :width]
    # A motif and its mirror image fit together.
    motif = np.block([[motif, motif[:, ::-1]], [motif[::-1], motif[::-1, ::-1]]])
    column = np.concatenate([motif, np.roll(motif, height, axis=0)], axis=1)
    return np.tile(column, [TILE_SIZE // side for side in column.shape])


def _print(random: Random) -> Field:
    """Lines of small marks with gaps between them, as on a page or a label."""
    field = np.full((TILE_SIZE, TILE_SIZE), 0.8)
    height = int(random.integers(4, 12))
    for top in range(height, TILE_SIZE - height, height + int(random.integers(2, 8))):
        marks = np.repeat(
            random.random(TILE_SIZE // 2) < 0.55, random.integers(1, 4, TILE_SIZE // 2)
        )
        marks = marks[:TILE_SIZE] if len(marks) >= TILE_SIZE else np.resize(marks, TILE_SIZE)
        field[top : top + height, marks] = -0.9
    return field


def _plain(random: Random) -> Field:
    """Paint, paper, sky: next to nothing to match."""
    return random.uniform(0.02, 0.12) * _spectral(random, random.uniform(0.6, 2.0))


_KINDS: tuple[tuple[Callable[[Random], Field], float], ...] = (
    (_rough, 22),
    (_clouds, 8),
    (_blotches, 14),
    (_veins, 8),
    (_grain, 12),
    (_cells, 9),
    (_stripes, 3),
    (_checks, 3),
    (_weave, 3),
    (_bricks, 3),
    (_wallpaper, 5),
    (_print, 3),
    (_plain, 10),
)
