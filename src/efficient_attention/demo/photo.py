"""Photographs: reading whatever people have.

Pictures are PIL images in mode RGB; pixels are tensors of sRGB in [0, 1].
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SMALLEST_SIDE", "bundled_photo", "pixels_of", "read_photo", "shrink", "to_image"]

# With less there is nothing to see.
SMALLEST_SIDE = 16


def read_photo(path: str | Path) -> Image:
    """Read an image file as 8-bit RGB, upright.

    The camera's orientation tag is applied, transparency is laid on white, palettes and grayscale
    become RGB. Grayscale numbers without a fixed white (16-bit, 32-bit, float) are stretched from
    darkest to brightest. Of several frames the first is taken.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        An image in mode ``"RGB"``.

    Raises:
        InputError: there is no such file, it is no image, or it has less than 16 pixels in a
        direction. ImportError: Pillow is not installed.

    Example:
        >>> image = read_photo(bundled_photo("astronaut.png"))
        >>> image.mode, image.size
        ('RGB', (512, 512))
    """
    pillow = _import_pillow()
    from PIL import ImageOps

    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"image must be an image file; got '{path}': {what}")
    try:
        with pillow.open(path) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    except pillow.UnidentifiedImageError as error:
        raise InputError(
            f"image must be an image file; got '{path}': not a format that Pillow reads"
        ) from error
    # Pillow tells of damage in many ways; whatever it is, it is about this file.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"image must be a sound image file; got '{path}': {error}") from error
    if min(image.size) < SMALLEST_SIDE:
        raise InputError(
            f"image must have at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels; "
            f"got '{path}': {image.width} x {image.height}"
        )
    return image


def bundled_photo(name: str) -> Path:
    """The path of a photograph that ships inside scikit-image, which itself is not imported.

    Raises:
        ImportError: scikit-image is not installed.
    """
    package = find_spec("skimage")
    for folder in (package.submodule_search_locations if package else None) or ():
        path = Path(folder) / "data" / name
        if path.is_file():
            return path
    raise ImportError(
        f"{name} comes with scikit-image: pip install 'efficient-attention[plot]', "
        "or name an image of your own"
    )


def shrink(image: Image, pixels: int) -> Image:
    """The image with at most so many pixels, each a mean of its area; a smaller one as it is.

    Example:
        >>> photo = read_photo(bundled_photo("astronaut.png"))
        >>> shrink(photo, 10_000).size
        (100, 100)
    """
    factor = math.sqrt(pixels / (image.width * image.height))
    if factor >= 1:
        return image
    size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return image.resize(size, _import_pillow().Resampling.BOX)


def pixels_of(image: Image, top: int = 0, bottom: int | None = None) -> Tensor:
    """Rows ``top`` to ``bottom`` (exclusive; default: all) of an RGB image: ``[1, 3, rows, W]``."""
    bottom = image.height if bottom is None else bottom
    data = bytearray(image.crop((0, top, image.width, bottom)).tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(1, bottom - top, image.width, 3)
    return pixels.permute(0, 3, 1, 2).float() / 255


def to_image(pixels: Tensor) -> Image:
    """The RGB image of ``pixels [1, 3, H, W]`` in [0, 1]."""
    data = (pixels[0].permute(1, 2, 0) * 255).round().to(torch.uint8)  # [H, W, 3]
    return _import_pillow().fromarray(data.contiguous().numpy())


def _to_rgb(image: Image) -> Image:
    if image.mode.startswith(("I", "F")):
        return _stretch(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = _import_pillow().new("RGBA", image.size, "white")
        image = _import_pillow().alpha_composite(white, image)
    return image.convert("RGB")


def _stretch(image: Image) -> Image:
    """Darkest to black, brightest to white, as mode L."""
    image = image.convert("I").convert("F") if image.mode.startswith("I;") else image.convert("F")
    darkest, brightest = cast(tuple[float, float], image.getextrema())
    if not math.isfinite(brightest - darkest):
        raise ValueError("its numbers are not finite")
    scale = 255 / (brightest - darkest) if brightest > darkest else 0.0
    return image.point(lambda x: x * scale + -darkest * scale).convert("L")


def _import_pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow: pip install 'efficient-attention[plot]'"
        ) from error
    return PIL.Image
