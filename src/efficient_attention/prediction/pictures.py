"""Pictures that people have: of any kind, from a camera held any way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

__all__ = ["picture_size", "read_picture"]

# The tag that says how the camera was held; 1 is upright, from 5 on sides are exchanged.
_ORIENTATION, _UPRIGHT, _FIRST_ON_ITS_SIDE = 0x0112, 1, 5
# Of a picture of 16 bits, for one of 8 bits.
_STEPS = 257
# What cannot be told to be brightness from black to white.
_REFUSED = ("F", "HSV", "LAB")


def picture_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """The size of a picture, from the beginning of its file.

    Args:
        path: the file.
        upright: see :func:`read_picture`.

    Returns:
        Height and width in pixels.

    Raises:
        InputError: as :func:`read_picture`, but for damage behind the beginning.
    """
    with _opened(path) as image:
        from PIL import Image as pillow

        # The method of the base class: that of PNG files reads all, for a tag behind the pixels.
        tags = pillow.Image.getexif(image)
        turned = _orientation(path, tags, upright) >= _FIRST_ON_ITS_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)


def read_picture(path: str | Path, *, upright: bool = True) -> Tensor:
    """Read a picture as 8-bit RGB.

    Gray becomes three equal channels, palettes and inks become RGB, transparency is laid on white. Of 16 bits of gray
    the upper 8 count, rounded. Of several frames the first is taken.

    Args:
        path: a file in any format that Pillow reads.
        upright: turn the picture as its orientation tag (EXIF) says, so that what is up in the world is up in it.
            Otherwise a picture with such a tag is refused: that is for views whose rows and columns have a geometry.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        InputError: there is no such file, it is no picture, is damaged, or has other numbers than brightness.
        ImportError: Pillow is not installed.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(Path(folder, "clear.png"))
        >>> read_picture(Path(folder, "clear.png")).unique()
        tensor([255], dtype=torch.uint8)
    """
    with _opened(path) as image:
        if _orientation(path, image.getexif(), upright) != _UPRIGHT:
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
        pixels = np.array(_to_rgb(image))
    return torch.from_numpy(pixels).movedim(2, 0).contiguous()


def _to_rgb(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode in _REFUSED:
        raise ValueError(f"mode {image.mode} is not supported; save it as RGB or gray")
    if image.mode.startswith("I"):
        return _of_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _of_16_bits(image: Image) -> Image:
    from PIL import Image as pillow

    numbers = np.asarray(image).astype(np.int64)
    if numbers.min() < 0 or numbers.max() > 255 * _STEPS:
        raise ValueError(
            f"numbers must be from 0 to {255 * _STEPS}; got {numbers.min()} to {numbers.max()}"
        )
    return pillow.fromarray(((numbers + _STEPS // 2) // _STEPS).astype(np.uint8)).convert("RGB")


def _orientation(path: str | Path, tags: Exif, upright: bool) -> int:
    tag = tags.get(_ORIENTATION, _UPRIGHT)
    found = tag if isinstance(tag, int) and 1 <= tag <= 8 else _UPRIGHT
    if found != _UPRIGHT and not upright:
        raise InputError(
            f"a view must be stored as it is seen, without an orientation tag (EXIF); got '{path}' with {found}: "
            "turn both views and save them without it"
        )
    return found


@contextmanager
def _opened(path: str | Path) -> Iterator[Image]:
    """A picture file; whatever is wrong with it, it is told in one line."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "reading pictures needs Pillow: pip install 'efficient-attention[plot]'"
        ) from error
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no such file"
        raise InputError(f"a picture must be a file; got '{path}': {what}")
    try:
        with warnings.catch_warnings():
            # Of what is large, and of tags that are damaged: neither keeps the picture from being read.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError as error:
        raise InputError(
            f"a picture must be in a format that Pillow reads; got '{path}' ({Path(path).stat().st_size} bytes)"
        ) from error
    except InputError:
        raise
    # Pillow tells of damage in many ways; whatever it is, it is about this file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"a picture must be sound; got '{path}': {error}") from error
