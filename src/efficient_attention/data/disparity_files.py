"""Disparities on disk: portable float maps (PFM), 16-bit PNG as KITTI has them, and NumPy's arrays.

A map is ``[H, W]`` in pixels, its first row the top one. Writers replace a file only when the new one is complete.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import replacing
from .images import decode_image, read_head

__all__ = [
    "check_disparity",
    "read_disparity",
    "read_disparity_png",
    "read_pfm",
    "write_disparity_png",
    "write_pfm",
]

# The kind, the width, the height, and a scale whose sign is the byte order; then, after one separator, the numbers.
_PFM_HEADER = re.compile(
    rb"(P[Ff])\s+(\d+)\s+(\d+)\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\r\n|\s)"
)
_LONGEST_HEADER = 256
_KITTI_SCALE = 256.0
_MOST_IN_16_BITS = 65535


def read_pfm(path: str | Path) -> Tensor:
    """Read a portable float map, of either byte order.

    Args:
        path: the file. The magnitude of its scale is without effect, as it is everywhere.

    Returns:
        ``[H, W]`` of a grey map (``Pf``), ``[3, H, W]`` of a coloured one (``PF``); float32. The format stores rows
        from the bottom up; they are turned over.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; the file is no portable float map, or has more or fewer bytes than its header tells.

    Example:
        >>> write_pfm(Path(folder, "a.pfm"), torch.tensor([[1.0, 2.5]]))
        >>> read_pfm(Path(folder, "a.pfm"))
        tensor([[1.0000, 2.5000]])
    """
    data = Path(path).read_bytes()
    head = _pfm_head(path, data[:_LONGEST_HEADER], len(data))
    stored = np.frombuffer(data, f"{head.byte_order}f4", offset=head.length)
    rows = stored.reshape(head.height, head.width, head.channels)[::-1]  # [H, W, C]
    image = torch.from_numpy(rows.transpose(2, 0, 1).astype("=f4", order="C"))
    return image if head.channels == 3 else image[0]


def write_pfm(
    path: str | Path, image: Tensor, *, byte_order: Literal["little", "big"] = "little"
) -> None:
    """Write a portable float map.

    Args:
        path: of the file; replaced only when the new one is complete.
        image: ``[H, W]``, written grey, or ``[3, H, W]``, written coloured; stored as float32.
        byte_order: of the numbers.

    Raises:
        ValueError: another shape, or another byte order.

    Example:
        >>> write_pfm(Path(folder, "b.pfm"), torch.rand(3, 4, 5), byte_order="big")
        >>> read_pfm(Path(folder, "b.pfm")).shape
        torch.Size([3, 4, 5])
    """
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] != 3):
        raise ValueError(f"image must have shape [H, W] or [3, H, W]; got {tuple(image.shape)}")
    if byte_order not in ("little", "big"):
        raise ValueError(f"byte_order must be 'little' or 'big'; got {byte_order!r}")
    kind, scale = ("PF" if image.dim() == 3 else "Pf"), (-1 if byte_order == "little" else 1)
    height, width = image.shape[-2:]
    channels = image if image.dim() == 3 else image.unsqueeze(0)
    pixels = channels.detach().float().cpu().numpy().transpose(1, 2, 0)[::-1]  # [H, W, C]
    with replacing(path) as file:
        file.write(f"{kind}\n{width} {height}\n{scale}.0\n".encode())
        file.write(pixels.astype("<f4" if byte_order == "little" else ">f4").tobytes())


def read_disparity_png(path: str | Path, *, scale: float | None = None) -> Tensor:
    """Read a disparity that is stored as whole numbers in a PNG; 0 means unknown and stays 0.

    Args:
        path: the file, of one channel.
        scale: what is stored for a pixel of disparity. Default: 256, KITTI's, for a file of 16 bits. One of 8 bits has
            no usual scale (in Middlebury's sets of 2001 to 2006 it depends on the size), and needs one.

    Returns:
        ``[H, W]`` float32 in pixels.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; the file is no sound picture of one channel, or has 8 bits and no ``scale`` is given.
        ValueError: ``scale`` is not positive.

    Example:
        >>> write_disparity_png(Path(folder, "a.png"), torch.tensor([[0.0, 1.5]]))
        >>> read_disparity_png(Path(folder, "a.png"))
        tensor([[0.0000, 1.5000]])
    """
    _check_scale(scale)
    stored, mode = decode_image(path)
    _check_png(path, mode, scale)
    return torch.from_numpy(stored.astype(np.float32)) / (_KITTI_SCALE if scale is None else scale)


def write_disparity_png(
    path: str | Path, disparity: Tensor, valid: Tensor | None = None, *, scale: float = _KITTI_SCALE
) -> None:
    """Write a disparity as KITTI's server takes it: 16 bits, 256 for a pixel, 0 where it is unknown.

    Args:
        path: of the file; replaced only when the new one is complete.
        disparity: ``[H, W]`` in pixels; may hold anything where it is not valid.
        valid: bool ``[H, W]``, True = known; default: where the disparity is positive. Known values below the smallest
            step, ``1 / scale``, are written as that step, since 0 would read as unknown.
        scale: what is stored for a pixel of disparity.

    Raises:
        ValueError: shapes differ, or a known disparity does not fit: negative, not finite, or ``65535.5 / scale`` px
            and above.
    """
    from PIL import Image

    valid = disparity > 0 if valid is None else valid
    if disparity.dim() != 2 or valid.shape != disparity.shape:
        raise ValueError(
            "disparity and valid must have the same shape [H, W]; "
            f"got {tuple(disparity.shape)} and {tuple(valid.shape)}"
        )
    known = disparity.detach()[valid].double()
    stored = (known * scale).round()
    if not ((known >= 0) & (stored <= _MOST_IN_16_BITS)).all():
        raise ValueError(
            f"disparity must be in [0, {_MOST_IN_16_BITS / scale:.2f}] px to fit 16 bits at scale "
            f"{scale:g}; got {known.min():g} to {known.max():g}"
        )
    numbers = torch.zeros(disparity.shape, dtype=torch.int32, device=disparity.device)
    numbers[valid] = stored.clamp(min=1).int()
    with replacing(path) as file:
        Image.fromarray(numbers.cpu().numpy().astype(np.uint16)).save(file, format="PNG")


def read_disparity(path: str | Path, *, scale: float | None = None) -> Tensor:
    """Read a disparity in the format that the file's name tells: ``.pfm``, ``.png`` or ``.npy``.

    Args:
        path: the file.
        scale: what is stored for a pixel of disparity; default: 256 in a PNG of 16 bits, else 1.

    Returns:
        ``[H, W]`` float32 in pixels, as stored: unknown pixels are 0, not finite or negative, as the format has it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a ValueError; another format, a damaged file, or no map of one channel.
        ValueError: ``scale`` is not positive.

    Example:
        >>> write_pfm(Path(folder, "a.pfm"), torch.full((1, 2), 3.0))
        >>> read_disparity(Path(folder, "a.pfm"))
        tensor([[3., 3.]])
    """
    path = Path(path)
    if path.suffix == ".png":
        return read_disparity_png(path, scale=scale)
    _check_scale(scale)
    if path.suffix == ".pfm":
        disparity = read_pfm(path)
    else:
        disparity = torch.from_numpy(_open_array(path).astype(np.float32))
    _check_map(path, disparity.shape)
    return disparity if scale is None else disparity / scale


def check_disparity(path: str | Path, *, scale: float | None = None) -> tuple[int, int]:
    """The height and the width of what :func:`read_disparity` will read, from the head of the file and its length.

    Args:
        path: the file.
        scale: see :func:`read_disparity`.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as :func:`read_disparity`, but for damage inside of a picture.
    """
    path = Path(path)
    if path.suffix == ".png":
        height, width, mode = read_head(path)
        _check_png(path, mode, scale)
        return height, width
    if path.suffix == ".pfm":
        with path.open("rb") as file:
            head = _pfm_head(path, file.read(_LONGEST_HEADER), path.stat().st_size)
        shape = (head.channels, head.height, head.width)[head.channels == 1 :]
    else:
        shape = _open_array(path).shape
    _check_map(path, shape)
    height, width = shape
    return height, width


class _PfmHead(NamedTuple):
    """``byte_order`` is numpy's sign; ``length`` is the head's own, in bytes."""

    channels: int
    height: int
    width: int
    byte_order: Literal["<", ">"]
    length: int


def _pfm_head(path: str | Path, beginning: bytes, size: int) -> _PfmHead:
    """The head of a file of ``size`` bytes, to which they must belong."""
    header = _PFM_HEADER.match(beginning)
    if header is None:
        raise InputError(
            f"{path} must begin as a portable float map: PF or Pf, width, height, scale; "
            f"got {beginning[:24]!r}"
        )
    channels = 3 if header[1] == b"PF" else 1
    width, height = int(header[2]), int(header[3])
    expected, got = 4 * channels * width * height, size - header.end()
    if expected != got:
        raise InputError(
            f"{path} must hold {expected} bytes after its header, for {width} x {height} pixels of "
            f"{channels} float32; got {got}: the file is damaged or was not written to its end"
        )
    return _PfmHead(
        channels, height, width, "<" if header[4].startswith(b"-") else ">", header.end()
    )


def _open_array(path: Path) -> np.ndarray:
    """The array of a file, which is not read as yet; all other files than NumPy's are refused here."""
    if path.suffix != ".npy":
        raise InputError(f"disparities must be .pfm, .png or .npy files; got {path}")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size} bytes) must be a whole array of NumPy: {error}"
        ) from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} must hold real numbers; got {array.dtype}")
    return array


def _check_map(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise InputError(f"{path} must hold a map [H, W]; got shape {tuple(shape)}")


def _check_png(path: str | Path, mode: str, scale: float | None) -> None:
    if not (mode == "L" or mode.startswith("I")):
        raise InputError(f"{path} must have one channel of 8 or 16 bits; got mode {mode}")
    if scale is None and mode == "L":
        raise InputError(
            f"scale must be given for {path}: it has 8 bits, and no usual number stands for a pixel"
        )


def _check_scale(scale: float | None) -> None:
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
