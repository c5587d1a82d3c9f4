"""Surfaces of generated pictures: colours in [0, 1] at every pixel, with the random numbers of a generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["camera", "clouds", "distinct_colour", "stripes", "uniform"]


def uniform(random: torch.Generator, low: float, high: float) -> float:
    """A number between two."""
    return low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))


def clouds(
    size: Sequence[int], random: torch.Generator, *, cells: int = 3, octaves: int = 4
) -> Tensor:
    """Noise of several scales, each half as strong and twice as fine: ``[H, W]`` float32 from 0 to 1.

    Args:
        size: ``(H, W)``.
        random: the generator.
        cells: of the coarsest scale along a side.
        octaves: how many scales.
    """
    total = torch.zeros(*size)
    for octave in range(octaves):
        grid = torch.rand(1, 1, *(cells * 2**octave + 1,) * 2, generator=random)
        total += (
            F.interpolate(grid, tuple(size), mode="bilinear", align_corners=True)[0, 0] / 2**octave
        )
    low, high = total.aminmax()
    return (total - low) / (high - low).clamp(min=1e-6)


def stripes(size: Sequence[int], random: torch.Generator, *, period: float) -> Tensor:
    """A wave in some direction: ``[H, W]`` float32 from 0 to 1; ``period`` in pixels."""
    angle, phase = uniform(random, 0, math.pi), uniform(random, 0, 2 * math.pi)
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])
    wave = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period) + phase
    return wave.sin() / 2 + 0.5


def distinct_colour(used: Sequence[Tensor], random: torch.Generator, *, tries: int = 8) -> Tensor:
    """Of some random colours the one that is farthest from those in use: ``[3]``."""
    colours = 0.1 + 0.8 * torch.rand(tries, 3, generator=random)
    if not used:
        return colours[0]
    return colours[torch.cdist(colours, torch.stack(list(used))).amin(1).argmax()]


def camera(scene: Tensor, random: torch.Generator, *, noise: float = 0.02) -> Tensor:
    """What a camera makes of a scene ``[3, H, W]``: soft edges, noise in brightness, and 8 bits: uint8."""
    for dim in (1, 2):
        # A binomial filter along either side; pixels beyond the border are as those on it.
        ends = scene.narrow(dim, 0, 1), scene.narrow(dim, scene.shape[dim] - 1, 1)
        wide = torch.cat([ends[0], scene, ends[1]], dim)
        length = scene.shape[dim]
        scene = (wide.narrow(dim, 0, length) + wide.narrow(dim, 2, length)) / 4 + scene / 2
    scene = scene + noise * torch.randn(scene.shape[1:], generator=random)
    return scene.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
