"""From disparities to depths and points in space, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from .calibration import Calibration

__all__ = ["FARTHEST_IN_PNG", "depth_of", "points_of", "write_depth_png", "write_ply"]

_MILLIMETRES = 1000
_MOST_IN_16_BITS = 65535
#: What a depth in 16 bits of millimetres can be at most, in metres.
FARTHEST_IN_PNG = _MOST_IN_16_BITS / _MILLIMETRES

_VERTEX = np.dtype(
    [(axis, "<f4") for axis in "xyz"] + [(colour, "u1") for colour in ("red", "green", "blue")]
)
_KINDS = {"<f4": "float", "|u1": "uchar"}


def depth_of(disparity: Tensor, calibration: Calibration) -> Tensor:
    """How far each pixel is along the optical axis: ``focal * baseline / (disparity + doffs)``.

    A depth is known where the disparity and ``disparity + doffs`` are positive, and where the pixel's match,
    ``x - disparity``, lies within the right view, which otherwise bears nothing out.

    Args:
        disparity: ``[H, W]`` in pixels.
        calibration: of views of this size.

    Returns:
        ``[H, W]`` float32 in metres; 0 where it is not known. None is infinite.

    Raises:
        ValueError: another shape than the calibration is about.

    Example:
        >>> depth_of(torch.tensor([[0.0, 0.5, 2.0, 2.5]]), Calibration(focal=100.0, baseline=0.1))
        tensor([[ 0., 20.,  5.,  4.]])
    """
    height, width = disparity.shape
    known = (calibration.width or width, calibration.height or height)
    if known != (width, height):
        raise ValueError(
            f"calibration must be of views of {width} x {height}; got one of {known[0]} x {known[1]}"
        )
    exact = disparity.double()
    shifted = exact + calibration.doffs
    matched = torch.arange(width, dtype=torch.float64) - exact >= 0
    depth = (calibration.focal * calibration.baseline / shifted).float()
    # NaN is not positive either.
    return depth.where((exact > 0) & (shifted > 0) & matched & depth.isfinite(), 0)


def points_of(depth: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """The points in space that pixels show, where their depth is known.

    Args:
        depth: ``[H, W]`` in metres, 0 where it is not known.
        calibration: of views of this size.

    Returns:
        ``[N, 3]`` float32 in metres from the left camera: x to the right, y down, z ahead; and bool ``[H, W]``, which
        pixels they are, in the order of rows.

    Example:
        >>> points, _ = points_of(torch.tensor([[0.0, 4.0]]), Calibration(focal=2.0, baseline=1.0, cx=0.0, cy=0.0))
        >>> points
        tensor([[2., 0., 4.]])
    """
    height, width = depth.shape
    known = depth > 0
    rows, columns = known.nonzero(as_tuple=True)
    z = depth[known].double()
    cx = (width - 1) / 2 if calibration.cx is None else calibration.cx
    cy = (height - 1) / 2 if calibration.cy is None else calibration.cy
    x, y = ((columns - cx) * z / calibration.focal, (rows - cy) * z / calibration.focal)
    return torch.stack([x, y, z], 1).float(), known


def write_depth_png(path: str | Path, depth: Tensor) -> int:
    """Write depths in whole millimetres, 16 bits, 0 where they are not known.

    Args:
        path: of the file; replaced only when the new one is complete.
        depth: ``[H, W]`` in metres, 0 where it is not known.

    Returns:
        How many pixels are farther than 65.535 m, the most that fits, as which they are written.

    Example:
        >>> write_depth_png(Path(folder, "depth.png"), torch.tensor([[0.0, 1.2345, 70.0]]))
        1
    """
    from PIL import Image

    millimetres = (depth.double() * _MILLIMETRES).round()
    # What is known is never written as if it were not.
    stored = millimetres.clamp(1, _MOST_IN_16_BITS).where(depth > 0, 0)
    with replacing(path) as file:
        Image.fromarray(stored.numpy().astype(np.uint16)).save(file, format="PNG")
    return int((millimetres > _MOST_IN_16_BITS).sum())


def write_ply(path: str | Path, points: Tensor, colours: Tensor) -> None:
    r"""Write coloured points as a PLY file, binary and little-endian, which MeshLab, CloudCompare and Blender open.

    Args:
        path: of the file; replaced only when the new one is complete.
        points: ``[N, 3]``.
        colours: ``[N, 3]`` uint8: red, green, blue.

    Raises:
        ValueError: other shapes or another dtype.

    Example:
        >>> write_ply(Path(folder, "points.ply"), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8))
        >>> Path(folder, "points.ply").read_bytes()[:36]
        b'ply\nformat binary_little_endian 1.0\n'
    """
    if points.dim() != 2 or points.shape[1] != 3 or colours.shape != points.shape:
        raise ValueError(
            f"points and colours must have shape [N, 3]; got {tuple(points.shape)} and {tuple(colours.shape)}"
        )
    if colours.dtype != torch.uint8:
        raise ValueError(f"colours must be uint8; got {colours.dtype}")
    vertices = np.empty(len(points), _VERTEX)
    for i, axis in enumerate("xyz"):
        vertices[axis] = points[:, i].numpy()
    for i, colour in enumerate(("red", "green", "blue")):
        vertices[colour] = colours[:, i].numpy()
    properties = [f"property {_KINDS[_VERTEX[name].str]} {name}" for name in _VERTEX.names or ()]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(points)}",
        *properties,
    ]
    with replacing(path) as file:
        file.write("\n".join([*header, "end_header\n"]).encode("ascii"))
        file.write(vertices.tobytes())
