"""Pictures whose class is a relation between two places far apart: something for global attention to find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draw, as_draw, generator
from .outlines import OUTLINES, figure, frame
from .textures import camera, clouds, uniform

__all__ = ["GeneratedCues"]

# For all figures of a picture, before the frame is put elsewhere.
_TRIES = 60
# Red, yellow, green, cyan, blue, magenta.
_COLOURS = torch.tensor(
    [
        (0.9, 0.1, 0.1),
        (0.9, 0.9, 0.1),
        (0.1, 0.9, 0.1),
        (0.1, 0.9, 0.9),
        (0.1, 0.1, 0.9),
        (0.9, 0.1, 0.9),
    ],
    # Whatever the default is while this is imported: networks are built on "meta".
    device="cpu",
)


class GeneratedCues(Dataset[tuple[Tensor, int]]):
    """Figures before a cloudy ground, and a frame far from all of them: the class is the figure of the frame's colour.

    Every figure is half a picture away from the frame or more. The figures are of different kinds and colours, so
    whoever sees them but not the frame can say no more than that it is one of them, and is right once in ``figures``
    times; whoever sees the frame alone knows nothing. More needs both.

    A sample is ``(image, label)``: float32 ``[3, H, W]`` in [0, 1], and an integer. Sample ``i`` follows from
    ``(seed, i)`` and the options.

    Args:
        length: samples.
        size: ``(H, W)`` of every picture, at least 48 x 48.
        seed: of the data set.
        figures: in a picture, from 2 to 4.

    Attributes:
        classes: names by label: ellipse, rectangle, triangle, star, ring, cross.

    Raises:
        ValueError: options that cannot be.

    Example:
        >>> data = GeneratedCues(10, size=(64, 64))
        >>> image, label = data[0]
        >>> image.shape, len(data.classes)
        (torch.Size([3, 64, 64]), 6)
    """

    classes = tuple(OUTLINES)
    num_classes = len(classes)

    def __init__(
        self, length: int, *, size: tuple[int, int] = (96, 96), seed: int = 0, figures: int = 2
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be positive; got {length}")
        if len(size) != 2 or min(size) < 48:
            raise ValueError(f"size must be (H, W) of at least 48 pixels; got {size}")
        if not 2 <= figures <= 4:
            raise ValueError(f"figures must be from 2 to 4; got {figures}")
        self.length, self.size, self.seed = length, (size[0], size[1]), seed
        self.figures = figures

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        index = as_draw(key, len(self)).item
        random = generator(self.seed, index)
        # The frame has the colour of the first.
        kinds = torch.randperm(self.num_classes, generator=random)[: self.figures].tolist()
        colours = torch.randperm(len(_COLOURS), generator=random)[: self.figures].tolist()
        outlines = [frame, *(OUTLINES[self.classes[kind]] for kind in kinds)]
        shade = uniform(random, 0.3, 0.7)
        grey = shade + (clouds(self.size, random) - 0.5) * uniform(random, 0.1, 0.4)
        picture = grey.repeat(3, 1, 1)
        places = self._places(random)
        for outline, place, colour in zip(outlines, places, [colours[0], *colours], strict=True):
            angle = uniform(random, 0, 2 * math.pi)
            rows, columns, inside = figure(
                outline, self.size, centre=place.centre, radius=place.radius, angle=angle
            )
            part = picture[:, rows, columns]
            part.copy_(torch.where(inside, _COLOURS[colour][:, None, None], part))
        return camera(picture, random).float() / 255, kinds[0]

    def __repr__(self) -> str:
        return (
            f"GeneratedCues({self.length}, size={self.size}, seed={self.seed}, "
            f"figures={self.figures})"
        )

    def _places(self, random: torch.Generator) -> list[_Place]:
        """One for the frame; and for the figures others, far from it, in no order."""
        side = min(self.size)
        while True:
            first = self._place(random)
            others: list[_Place] = []
            for _ in range(_TRIES):
                new = self._place(random)
                if math.dist(new.centre, first.centre) >= side / 2 and all(
                    math.dist(new.centre, other.centre) > new.radius + other.radius
                    for other in others
                ):
                    others.append(new)
                if len(others) == self.figures:
                    # Those that came later had less room, and should not be known by it.
                    order = torch.randperm(self.figures, generator=random).tolist()
                    return [first, *(others[i] for i in order)]

    def _place(self, random: torch.Generator) -> _Place:
        radius = min(self.size) * uniform(random, 0.1, 0.14)
        y, x = (uniform(random, radius, length - radius) for length in self.size)
        return _Place((y, x), radius)


class _Place(NamedTuple):
    centre: tuple[float, float]
    radius: float
