"""Pictures from files, as tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode_image", "read_image", "read_pixels"]

# Their numbers are not brightness as they stand.
_CONVERTED = ("1", "CMYK", "P", "PA", "YCbCr")


def decode_image(path: str | Path) -> tuple[np.ndarray, str]:
    """The pixels of a picture as its file has them, and their mode as Pillow calls it.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        ``[H, W]`` or ``[H, W, C]``, and ``"L"``, ``"RGB"``, ``"I;16"``... A palette is resolved, inks become RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or a damaged one.
    """
    from PIL import Image

    data = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB") if file.mode in _CONVERTED else file
            return np.array(image), image.mode
    # Pillow tells of damage in many ways; the file itself has been read.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} ({len(data)} bytes) must be a picture: {error}") from error


def read_pixels(path: str | Path) -> Tensor:
    """Read a picture of 8 bits a channel, as it is stored: the camera's orientation tag is not followed.

    Args:
        path: a file in any format that Pillow reads. A gray picture gets three equal channels; transparency is dropped.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, a damaged one, or has other than 8 bits a channel.
    """
    pixels, mode = decode_image(path)
    if pixels.dtype != np.uint8 or mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"{path} must be gray or RGB with 8 bits a channel; got mode {mode}")
    channels = torch.from_numpy(np.atleast_3d(pixels)).movedim(2, 0)  # [C, H, W]
    colours = channels[:3] if mode.startswith("RGB") else channels[:1].expand(3, -1, -1)
    return colours.contiguous()


def read_image(path: str | Path) -> Tensor:
    """Read a picture as networks take it, see :func:`read_pixels`.

    Returns:
        ``[3, H, W]`` float32 in [0, 1].

    Example:
        >>> from PIL import Image
        >>> Image.new("L", (3, 2), 255).save(Path(folder, "white.png"))
        >>> read_image(Path(folder, "white.png")).unique()
        tensor([1.])
    """
    return read_pixels(path).float() / 255
