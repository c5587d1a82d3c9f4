"""Pictures whose class is a relation between two places far apart: something for global attention to find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draw, as_draw, generator
from .outlines import OUTLINES, Outline, arrow, figure
from .textures import camera, clouds, distinct_colour, uniform

__all__ = ["GeneratedAngles"]

# They look the same from all sides, or nearly so, and point nowhere.
_CLUTTER = ("ellipse", "ring", "cross")
_TRIES = 20


class GeneratedAngles(Dataset[tuple[Tensor, int]]):
    """Two arrows before a cloudy ground, half a picture apart or more; the class is the angle between them.

    With K classes label k means that the arrows point ``k / (K - 1)`` of half a turn apart, give or take a third of the
    step from one class to the next. Either arrow alone says nothing: whatever the label, its direction is uniform, and
    so are its place, size and colour. Discs, rings and crosses lie between them.

    A sample is ``(image, label)``: float32 ``[3, H, W]`` in [0, 1], and an integer. Sample ``i`` follows from
    ``(seed, i)`` and the options.

    Args:
        length: samples.
        size: ``(H, W)`` of every picture, at least 48 x 48.
        seed: of the data set.
        num_classes: K, from 2 to 9.
        clutter: things that are no arrows, at most; the number is drawn.

    Attributes:
        classes: names by label, the degrees.

    Raises:
        ValueError: options that cannot be.

    Example:
        >>> data = GeneratedAngles(10, size=(64, 64))
        >>> image, label = data[0]
        >>> image.shape, data.classes
        (torch.Size([3, 64, 64]), ('0', '45', '90', '135', '180'))
    """

    def __init__(
        self,
        length: int,
        *,
        size: tuple[int, int] = (96, 96),
        seed: int = 0,
        num_classes: int = 5,
        clutter: int = 4,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be positive; got {length}")
        if len(size) != 2 or min(size) < 48:
            raise ValueError(f"size must be (H, W) of at least 48 pixels; got {size}")
        if not 2 <= num_classes <= 9:
            raise ValueError(f"num_classes must be from 2 to 9; got {num_classes}")
        if not 0 <= clutter <= 8:
            raise ValueError(f"clutter must be from 0 to 8; got {clutter}")
        self.length, self.size, self.seed = length, (size[0], size[1]), seed
        self.num_classes, self.clutter = num_classes, clutter
        self.classes = tuple(f"{k * 180 / (num_classes - 1):g}" for k in range(num_classes))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        index = as_draw(key, len(self)).item
        random = generator(self.seed, index)
        label, directions = self._directions(random)
        ground = distinct_colour([], random)
        shades = (clouds(self.size, random) - 0.5) * uniform(random, 0.2, 0.6)
        picture = ground[:, None, None] + shades
        used = [ground]
        for thing in self._things(directions, random):
            rows, columns, inside = figure(
                thing.outline,
                self.size,
                centre=thing.centre,
                radius=thing.radius,
                angle=thing.angle,
            )
            used.append(distinct_colour(used, random))
            part = picture[:, rows, columns]
            part.copy_(torch.where(inside, used[-1][:, None, None], part))
        return camera(picture, random).float() / 255, label

    def __repr__(self) -> str:
        return (
            f"GeneratedAngles({self.length}, size={self.size}, seed={self.seed}, "
            f"num_classes={self.num_classes}, clutter={self.clutter})"
        )

    def _directions(self, random: torch.Generator) -> tuple[int, tuple[float, float]]:
        """A label, and the directions of two arrows that make it true."""
        label = int(torch.randint(self.num_classes, (), generator=random))
        step = math.pi / (self.num_classes - 1)
        apart = (label + uniform(random, -1 / 3, 1 / 3)) * step
        first, side = uniform(random, 0, 2 * math.pi), 1 if uniform(random, 0, 1) < 0.5 else -1
        return label, (first, first + side * apart)

    def _things(self, directions: tuple[float, float], random: torch.Generator) -> list[_Thing]:
        """The arrows, and what else there is room for, none over another."""
        side = min(self.size)
        while True:
            things = [self._thing(arrow, angle, random) for angle in directions]
            if math.dist(things[0].centre, things[1].centre) >= side / 2:
                break
        number = torch.randint(self.clutter + 1, (), generator=random)
        for _ in range(int(number)):
            name = _CLUTTER[int(torch.randint(len(_CLUTTER), (), generator=random))]
            for _ in range(_TRIES):
                new = self._thing(OUTLINES[name], uniform(random, 0, 2 * math.pi), random)
                if all(math.dist(new.centre, t.centre) > new.radius + t.radius for t in things):
                    things.append(new)
                    break
        return things

    def _thing(self, outline: Outline, angle: float, random: torch.Generator) -> _Thing:
        """A figure somewhere in the picture."""
        radius = min(self.size) * uniform(random, 0.1, 0.14)
        y, x = (uniform(random, radius, length - radius) for length in self.size)
        return _Thing(outline, (y, x), radius, angle)


class _Thing(NamedTuple):
    outline: Outline
    centre: tuple[float, float]
    radius: float
    angle: float
