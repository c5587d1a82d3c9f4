"""A disparity in colours, near bright and far dark, with a scale that tells how many pixels they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_disparity"]

# Uniform to the eye, and monotonous in brightness, also in gray and to the colour-blind.
_COLOURS = "inferno"
# Shares of pixels that may lie outside the scale, so that a few do not take all its colours.
_OUTSIDE = (0.002, 0.998)
# Shares of the picture's height, and the least in pixels.
_TEXT, _LEAST_TEXT = 1 / 30, 11
_MOST_TICKS = 10


def draw_disparity(disparity: Tensor, *, unit: str = "px") -> Image:
    """Paint a disparity: a pixel for a pixel, and beside it the scale.

    Args:
        disparity: ``[H, W]``, finite.
        unit: stands above the scale.

    Returns:
        A picture in RGB, H pixels high if the scale's text fits there, and wider than W.

    Raises:
        ImportError: matplotlib or Pillow is not installed.

    Example:
        >>> picture = draw_disparity(torch.rand(120, 160) * 40)
        >>> picture.height, picture.width > 160
        (120, True)
    """
    try:
        from matplotlib import colormaps
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            f"drawing needs {error.name}: pip install 'efficient-attention[plot]'"
        ) from error
    numbers = disparity.numpy()
    low, high = _range(numbers)
    colours = colormaps[_COLOURS]
    painted = colours(np.clip((numbers - low) / (high - low), 0, 1).astype(np.float32), bytes=True)

    height, width = numbers.shape
    size = max(_LEAST_TEXT, round(_TEXT * height))
    font = ImageFont.load_default(size)
    gap = round(0.8 * size)
    top, bottom = 2 * size, max(height, 8 * size) - gap
    bar = (width + gap, width + gap + size)
    labels = _ticks(low, high, room=(bottom - top) / (2 * size))
    reach = max(font.getlength(text) for text in (*labels.values(), unit))
    picture = Image.new("RGB", (math.ceil(bar[1] + 2 * gap + reach), bottom + gap), "white")
    picture.paste(Image.fromarray(painted[..., :3]), (0, 0))
    ramp = colours(np.linspace(1, 0, bottom - top), bytes=True)[:, None, :3]
    picture.paste(Image.fromarray(np.repeat(ramp, size, axis=1)), (bar[0], top))
    draw = ImageDraw.Draw(picture)
    draw.text((bar[0], top - 0.6 * size), unit, fill="black", font=font, anchor="ls")
    for value, text in labels.items():
        y = top + (high - value) / (high - low) * (bottom - 1 - top)
        draw.line((bar[1], y, bar[1] + 0.3 * size, y), fill="black", width=max(1, size // 12))
        draw.text((bar[1] + 0.5 * size, y), text, fill="black", font=font, anchor="lm")
    return picture


def _range(numbers: np.ndarray) -> tuple[float, float]:
    low, high = (float(x) for x in np.quantile(numbers, _OUTSIDE))
    # What is flat has a colour, too.
    return (low, high) if high - low > 1e-3 else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, *, room: float) -> dict[float, str]:
    """Round numbers between two, as many as there is room for, and how they are written."""
    count = max(1.0, min(room, _MOST_TICKS))
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return {i * step: f"{i * step:.{decimals}f}" for i in range(first, last + 1)}
