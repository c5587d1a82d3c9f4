"""Objects drawn into their picture: masks, boxes, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.segmentations import decode_masks
from .objects import FoundObjects

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_objects"]

# Bright and far apart, for neighbours that touch; by turns.
_COLOURS = (
    (230, 25, 75),
    (0, 158, 255),
    (60, 180, 75),
    (255, 165, 0),
    (170, 70, 255),
    (0, 200, 200),
    (240, 50, 230),
    (190, 200, 0),
    (255, 110, 80),
    (80, 110, 255),
    (0, 150, 110),
    (200, 130, 40),
)
_TINT = 0.4
# Shares of the picture's shorter side, and the least in pixels.
_TEXT, _LEAST_TEXT = 1 / 45, 11
# Text smaller than that of the picture, for boxes that are small beside it.
_OF_BOX = 1 / 3


# To what the shorter side of a small picture is enlarged, at most so many times, so that text has room.
_ROOM, _MOST_TIMES = 700, 4


class _Label(NamedTuple):
    """Texts on a ground of a colour, of which the first that has room is written; ``box`` is x0, y0, x1, y1."""

    texts: tuple[str, ...]
    size: int
    colour: tuple[int, int, int]
    box: tuple[float, float, float, float]


def draw_objects(
    picture: Tensor,
    found: FoundObjects,
    names: Mapping[int, str] | None = None,
    *,
    score: float = 0.5,
) -> Image:
    """Draw objects into a picture: a tint and an outline for the mask, the box, the name and the score in percent.

    A colour is one object's, not a class's, so that neighbours are told apart. Labels stay inside the picture, and make
    room for each other where there is any; where there is little, the score stands alone.

    Args:
        picture: ``[3, H, W]`` uint8.
        found: what was found in it.
        names: of the labels; one without a name is a number.
        score: of objects that are drawn, at least.

    Returns:
        A picture in RGB, of the same size, or two to four times as large if a side has less than 467 pixels.

    Raises:
        ImportError: Pillow is not installed.

    Example:
        >>> nothing = FoundObjects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), [])
        >>> draw_objects(torch.zeros(3, 480, 640, dtype=torch.uint8), nothing).size
        (640, 480)
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError(
            "drawing needs Pillow: pip install 'efficient-attention[plot]'"
        ) from error
    height, width = picture.shape[1:]
    times = max(1, min(_MOST_TIMES, round(_ROOM / min(height, width))))
    image = Image.fromarray(picture.movedim(0, 2).contiguous().numpy())
    image = image.resize((times * width, times * height), Image.Resampling.BICUBIC)
    pixels, shorter = np.array(image), min(image.size)  # [H, W, 3]
    area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
    # The small ones over the large ones.
    order = [i for i in area.argsort(descending=True).tolist() if found.scores[i] >= score]
    line = max(1, round(shorter / 400))
    for i in order:
        if found.outlines:
            _tint(pixels, found.outlines[i], _colour(i), line)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    labels = []
    for i in order:
        x0, y0, x1, y1 = box = tuple((times * found.boxes[i]).tolist())
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_colour(i), width=line)
        name = (names or {}).get(int(found.labels[i]), str(int(found.labels[i])))
        size = max(_LEAST_TEXT, min(round(_TEXT * shorter), round(_OF_BOX * (y1 - y0))))
        percent = f"{100 * float(found.scores[i]):.0f} %"
        labels.append(_Label((f"{name} {percent}", percent), size, _colour(i), box))
    _write(image, labels)
    return image


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]


def _tint(pixels: np.ndarray, outline: dict, colour: tuple[int, int, int], line: int) -> None:
    height, width = pixels.shape[:2]
    # As large as the pixels, into which it is scaled.
    mask = decode_masks([outline], *outline["size"], size=(height, width))[0].bool()
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return
    window = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )
    inside = mask[window]
    # What is nearer to the outside than the line is wide.
    around = torch.nn.functional.pad(~inside, (1, 1, 1, 1), value=True)[None, None].float()
    for _ in range(line):
        around = torch.nn.functional.max_pool2d(around, 3, 1, 1)
    tinted, edge = inside.numpy(), (inside & around[0, 0, 1:-1, 1:-1].bool()).numpy()
    part = pixels[window]
    part[tinted] = ((1 - _TINT) * part[tinted] + _TINT * np.array(colour)).round()
    part[edge] = colour


def _write(image: Image, labels: list[_Label]) -> None:
    """Write labels where they cover no other one, or where each would be alone."""
    from PIL import ImageDraw, ImageFont

    draw = ImageDraw.Draw(image)
    taken: list[tuple[int, int, int, int]] = []
    for texts, size, colour, box in labels:
        font = ImageFont.load_default(size)
        spots = []
        for text in texts:
            wide, tall = round(font.getlength(text) + 0.6 * size), round(1.3 * size)
            corners = _corners(box, wide, tall)
            spots += [(text, _within(image.size, corner, (wide, tall))) for corner in corners]
        free = (s for s in spots if not any(_overlap(s[1], other) for other in taken))
        text, spot = next(free, spots[-1])
        taken.append(spot)
        draw.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=colour)
        middle = (spot[0] + 0.3 * size, (spot[1] + spot[3]) / 2)
        draw.text(middle, text, fill=_readable(colour), font=font, anchor="lm")


def _corners(
    box: tuple[float, float, float, float], wide: int, tall: int
) -> list[tuple[float, float]]:
    """Where a label may begin: above, inside, below the box; at its left, then at its right."""
    x0, y0, x1, y1 = box
    return [(x, y) for x in (x0, x1 - wide) for y in (y0 - tall, y0, y1, y1 - tall)]


def _within(
    picture: tuple[int, int], corner: tuple[float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A rectangle, moved into the picture as far as it fits."""
    x, y = (
        max(0, min(round(start), whole - length))
        for start, whole, length in zip(corner, picture, size, strict=True)
    )
    return x, y, x + size[0], y + size[1]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
