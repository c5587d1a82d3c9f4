"""Photographs: reading whatever people have, and the colour space in which distance is what eyes see.

Pictures are PIL images in mode RGB, pixels are tensors ``[1, 3, H, W]`` of sRGB in [0, 1].
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["bundled_photo", "from_oklab", "pixels_of", "read_photo", "shrink", "to_oklab"]

# Below this there is nothing to see, and the coarse views of a photograph would be larger than itself.
SMALLEST_SIDE = 16


def read_photo(path: str | Path) -> Image:
    """Read an image file as 8-bit RGB, upright.

    The camera's orientation tag is applied, transparency is laid on white, and palettes and grayscale become RGB.
    Numbers without a fixed white (16-bit, 32-bit and float grayscale) are stretched from darkest to brightest. Of
    several frames the first is taken.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        An image in mode ``"RGB"``.

    Raises:
        InputError: there is no such file, it is no image, or it is smaller than 16 x 16 pixels.
        ImportError: Pillow is not installed.

    Example:
        >>> read_photo("holiday.jpg").mode
        'RGB'
    """
    image_module = _import_pil()
    from PIL import ImageOps

    path = Path(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise InputError(f"IMAGE must be an image file; got '{path}': {what}")
    try:
        with image_module.open(path) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    except image_module.UnidentifiedImageError:
        raise InputError(
            f"IMAGE must be an image file; got '{path}': not an image that Pillow can read"
        ) from None
    # Pillow reports damage in many ways; all of them are about the file.
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise InputError(f"IMAGE must be a sound image file; got '{path}': {error}") from error
    if min(image.size) < SMALLEST_SIDE:
        width, height = image.size
        raise InputError(
            f"IMAGE must have at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels; "
            f"got '{path}' of {width} x {height}"
        )
    return image


def bundled_photo(name: str) -> Path:
    """The path of a photograph that ships inside scikit-image, which itself is not imported.

    Raises:
        ImportError: scikit-image is not installed.
    """
    package = find_spec("skimage")
    folders = (package and package.submodule_search_locations) or ()
    for folder in folders:
        path = Path(folder) / "data" / name
        if path.is_file():
            return path
    raise ImportError(
        f"the photograph {name} comes with scikit-image: pip install 'efficient-attention[plot]', "
        "or name an image of your own"
    )


def shrink(image: Image, pixels: int) -> Image:
    """The image with at most ``pixels`` pixels (and at least 1 in each direction), every one a mean of its area."""
    width, height = image.size
    factor = math.sqrt(pixels / (width * height))
    if factor >= 1:
        return image
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return image.resize(size, _import_pil().Resampling.BOX)


def pixels_of(image: Image, top: int = 0, bottom: int | None = None) -> Tensor:
    """Rows ``top`` to ``bottom`` (exclusive; default: all) of an RGB image: ``[1, 3, rows, W]`` in [0, 1]."""
    width, height = image.size
    bottom = height if bottom is None else bottom
    data = bytearray(image.crop((0, top, width, bottom)).tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(1, bottom - top, width, 3)
    return pixels.permute(0, 3, 1, 2).float() / 255


def to_oklab(pixels: Tensor) -> Tensor:
    """sRGB ``[B, 3, H, W]`` in [0, 1] to Oklab (lightness, green-red, blue-yellow), in which distance is perceptual.

    Reference: Ottosson 2020, "A perceptual color space for image processing".
    """
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055) ** 2.4, pixels / 12.92)
    cones = _mix(linear, _CONES).clamp(min=0) ** (1 / 3)
    return _mix(cones, _OPPONENTS)


def from_oklab(oklab: Tensor) -> Tensor:
    """The inverse of :func:`to_oklab`, clipped to [0, 1]."""
    cones = _mix(oklab, _invert(_OPPONENTS)) ** 3
    linear = _mix(cones, _invert(_CONES)).clamp(0, 1)
    # The power has an infinite slope at 0.
    bright = 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, bright, 12.92 * linear)


_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_OPPONENTS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
Matrix = tuple[tuple[float, ...], ...]


def _invert(matrix: Matrix) -> Matrix:
    return tuple(map(tuple, torch.tensor(matrix, dtype=torch.float64).inverse().tolist()))


def _mix(x: Tensor, matrix: Matrix) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", x.new_tensor(matrix), x)


def _to_rgb(image: Image) -> Image:
    if image.mode.startswith(("I", "F")):
        image = _stretch(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = _import_pil().new("RGBA", image.size, "white")
        image = _import_pil().alpha_composite(white, image)
    return image.convert("RGB")


def _stretch(image: Image) -> Image:
    image = image.convert("F")
    darkest, brightest = (float(x) for x in image.getextrema())
    if not math.isfinite(brightest - darkest):
        raise ValueError("its numbers are not finite")
    scale = 255 / (brightest - darkest) if brightest > darkest else 0.0
    return image.point(lambda x: x * scale - darkest * scale).convert("L")


def _import_pil():
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow: pip install 'efficient-attention[plot]'"
        ) from error
    return PIL.Image
