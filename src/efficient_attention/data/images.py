"""Pictures from files, as tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageHead", "check_pixels", "decode_image", "read_head", "read_image", "read_pixels"]

# Their numbers are not brightness as they stand.
_CONVERTED = ("1", "CMYK", "P", "PA", "YCbCr")
_EIGHT_BITS = ("L", "LA", "RGB", "RGBA")
# By format, what stands among the last bytes of a whole file.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


class ImageHead(NamedTuple):
    """What a file says of its picture: height and width in pixels, and the mode as Pillow calls it."""

    height: int
    width: int
    mode: str


def read_head(path: str | Path) -> ImageHead:
    """Look at a picture without decoding it: at its head, and for its end; one without an end is decoded to see.

    Args:
        path: a file in any format that Pillow reads.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; the file is no picture, or a damaged one.
    """
    path = Path(path)
    size = path.stat().st_size
    with _opened(path, path, size) as file:
        if not _is_whole(path, size, file.format):
            file.load()
        return ImageHead(file.height, file.width, file.mode)


def check_pixels(path: str | Path) -> tuple[int, int]:
    """The height and the width of what :func:`read_pixels` will read, which raises what this does not find.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as :func:`read_pixels`, but for damage inside of a file.
    """
    height, width, mode = read_head(path)
    _check_mode(path, mode, (*_EIGHT_BITS, *_CONVERTED))
    return height, width


def decode_image(path: str | Path) -> tuple[np.ndarray, str]:
    """The pixels of a picture as its file has them, and their mode as Pillow calls it.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        ``[H, W]`` or ``[H, W, C]``, and ``"L"``, ``"RGB"``, ``"I;16"``... A palette is resolved, inks become RGB.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; the file is no picture, or a damaged one.
    """
    data = Path(path).read_bytes()
    with _opened(io.BytesIO(data), path, len(data)) as file:
        image = file.convert("RGB") if file.mode in _CONVERTED else file
        return np.array(image), image.mode


def read_pixels(path: str | Path) -> Tensor:
    """Read a picture of 8 bits a channel, as it is stored: the camera's orientation tag is not followed.

    Args:
        path: a file in any format that Pillow reads. A gray picture gets three equal channels; transparency is dropped.

    Returns:
        ``[3, H, W]`` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; the file is no picture, a damaged one, or has other than 8 bits a channel.
    """
    pixels, mode = decode_image(path)
    _check_mode(path, mode, _EIGHT_BITS)
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


@contextmanager
def _opened(source: Any, path: str | Path, size: int) -> Iterator[Image.Image]:
    """A picture of a path or a stream; that it is damaged is told whenever it is found."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as file:
            yield file
    except FileNotFoundError:
        raise
    # Pillow tells of damage in many ways.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it begins as none of the formats that are known" if unknown else error
        raise InputError(f"{path} ({size} bytes) must be a picture: {reason}") from error


def _is_whole(path: Path, size: int, picture_format: str | None) -> bool:
    end = _ENDS.get(picture_format or "", b"")
    with path.open("rb") as file:
        file.seek(-min(32, size), 2)
        return end in file.read()


def _check_mode(path: str | Path, mode: str, allowed: tuple[str, ...]) -> None:
    if mode not in allowed:
        raise InputError(f"{path} must be gray or RGB with 8 bits a channel; got mode {mode}")
