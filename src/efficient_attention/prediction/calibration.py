"""The geometry of a rectified pair, from the files in which Middlebury and KITTI publish it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError

__all__ = ["Calibration", "read_calibration"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LINE = re.compile(r"\s*(\w+)\s*[=:]\s*(.+?)\s*")
_MILLIMETRES = 1000.0
# The left and the right camera, as KITTI's files name their projections: colour first.
_KITTI = (("P_rect_02", "P_rect_03"), ("P2", "P3"), ("P_rect_00", "P_rect_01"), ("P0", "P1"))


class Calibration(NamedTuple):
    """A rectified pair of cameras: ``depth = focal * baseline / (disparity + doffs)``.

    Attributes:
        focal: length, in pixels.
        baseline: between the cameras, in metres.
        doffs: what is added to disparities: the right principal point's column less the left one's, in pixels.
        cx: column of the left principal point, in pixels from the centre of the first; ``None``: the picture's middle.
        cy: its row, likewise.
        width: of the views that this is about, in pixels, where it is known.
        height: of the views, likewise.
    """

    focal: float
    baseline: float
    doffs: float = 0.0
    cx: float | None = None
    cy: float | None = None
    width: int | None = None
    height: int | None = None


def read_calibration(path: str | Path) -> Calibration:
    r"""Read the calibration of a pair.

    ::

        cam0=[3979.911 0 1244.772; 0 3979.911 1019.507; 0 0 1]     Middlebury's calib.txt: pixels,
        cam1=[3979.911 0 1369.115; 0 3979.911 1019.507; 0 0 1]     the baseline in millimetres
        doffs=124.343
        baseline=193.001
        width=2964

        P2: 7.215e+02 0 6.096e+02 4.486e+01 0 7.215e+02 ...        KITTI's: twelve numbers of a projection, row by row,
        P3: 7.215e+02 0 6.096e+02 -3.395e+02 ...                   -f b at the end of the first, b in metres

    Of KITTI's cameras the colour ones count (``P_rect_02`` and ``P_rect_03``, ``P2`` and ``P3``), or else the gray ones
    (``00`` and ``01``, ``P0`` and ``P1``).

    Args:
        path: the file.

    Raises:
        InputError: there is no such file, it is neither, lacks a part, or has numbers that cannot be.

    Example:
        >>> _ = Path(folder, "calib.txt").write_text("cam0=[500 0 320; 0 500 240; 0 0 1]\nbaseline=100\ndoffs=8")
        >>> read_calibration(Path(folder, "calib.txt"))
        Calibration(focal=500.0, baseline=0.1, doffs=8.0, cx=320.0, cy=240.0, width=None, height=None)
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--calibration must be a file of text; got '{path}': {error}") from error
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    fields = {match[1]: match[2] for match in found if match}
    calibration = _middlebury(fields, path) if "cam0" in fields else _kitti(fields, path)
    check_calibration(calibration, str(path))
    return calibration


def check_calibration(calibration: Calibration, origin: str) -> None:
    """See that depths can be computed.

    Args:
        calibration: to be checked.
        origin: where it is from, for the error.

    Raises:
        InputError: a focal length or a baseline that is not positive, or numbers that are not finite.
    """
    numbers = [x for x in calibration if x is not None]
    if not all(map(math.isfinite, numbers)) or min(calibration.focal, calibration.baseline) <= 0:
        raise InputError(
            f"{origin} must have a positive focal length (px) and baseline (m), and finite numbers; "
            f"got {calibration.focal:g}, {calibration.baseline:g} and {calibration.doffs:g}"
        )


def _middlebury(fields: dict[str, str], path: str | Path) -> Calibration:
    (focal, _, cx, _, _, cy, *_) = _numbers(fields, "cam0", 9, path)
    (baseline,) = _numbers(fields, "baseline", 1, path)
    (doffs,) = _numbers(fields, "doffs", 1, path) if "doffs" in fields else (0.0,)
    width, height = (
        int(_numbers(fields, name, 1, path)[0]) if name in fields else None
        for name in ("width", "height")
    )
    return Calibration(focal, baseline / _MILLIMETRES, doffs, cx, cy, width, height)


def _kitti(fields: dict[str, str], path: str | Path) -> Calibration:
    for left_name, right_name in _KITTI:
        if left_name in fields and right_name in fields:
            break
    else:
        raise InputError(
            "--calibration must have cam0=[...] and baseline, as Middlebury's, or P2 and P3 or P_rect_02 and "
            f"P_rect_03, as KITTI's; got '{path}' with {', '.join(list(fields)[:8]) or 'neither'}"
        )
    left, right = (_numbers(fields, name, 12, path) for name in (left_name, right_name))
    focal = left[0]
    if focal <= 0 or right[0] != focal:
        raise InputError(
            f"'{path}' must have one positive focal length in {left_name} and {right_name}; got {focal:g}, {right[0]:g}"
        )
    size: list[float] = []
    if left_name.startswith("P_rect") and left_name.replace("P", "S", 1) in fields:
        size = _numbers(fields, left_name.replace("P", "S", 1), 2, path)
    width, height = (int(side) for side in size) if size else (None, None)
    baseline = (left[3] - right[3]) / focal
    return Calibration(focal, baseline, right[2] - left[2], left[2], left[6], width, height)


def _numbers(fields: dict[str, str], name: str, count: int, path: str | Path) -> list[float]:
    parts = re.sub(r"[\[\];,]", " ", fields.get(name, "")).split()
    if len(parts) != count or not all(re.fullmatch(_NUMBER, part) for part in parts):
        numbers = "a number" if count == 1 else f"{count} numbers"
        raise InputError(
            f"'{path}' must give {name} as {numbers}; got {fields.get(name, 'no such line')!r}"
        )
    return [float(part) for part in parts]
