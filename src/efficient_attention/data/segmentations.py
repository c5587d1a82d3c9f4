"""Outlines as COCO has them, to masks and back.

A segmentation is a list of polygons ``[x0, y0, x1, y1, ...]`` in pixels, whose union it is, or run lengths
``{"size": [H, W], "counts": ...}`` down the columns, beginning with background: a list of integers, or a string.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_masks", "encode_masks", "segmentation_fault"]

# Of polygons: so many sides of the image may a point lie away from it.
_FARTHEST = 10


def segmentation_fault(segmentation: object, height: int, width: int) -> str | None:
    """What is wrong with a segmentation in an image of this size; None if it is sound.

    pycocotools reads what it is given without looking: it takes a polygon of two points for a box, walks along every
    side of one a pixel at a time however far that is, and run lengths that do not fill the image give whatever memory
    held. What is nowhere in the image is no segmentation either; whether a polygon in it is so thin that it holds no
    pixel is not looked at.
    """
    if segmentation is None:
        return "segmentation must be polygons or run lengths; it is absent"
    if isinstance(segmentation, Mapping):
        return _runs_fault(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"segmentation must be polygons or run lengths; got {_brief(segmentation)}"
    if not segmentation:
        return "segmentation must have a polygon; got []"
    for polygon in segmentation:
        fault = _polygon_fault(polygon)
        if fault:
            return (
                f"segmentation must have polygons [x0, y0, x1, y1, ...] of finite numbers; {fault}"
            )
    return _place_fault(segmentation, height, width)


def decode_masks(
    segmentations: Sequence[Any], height: int, width: int, *, size: tuple[int, int] | None = None
) -> Tensor:
    """The pixels of segmentations.

    Args:
        segmentations: N of them, sound, see :func:`segmentation_fault`.
        height: of the image that they are about.
        width: of the image.
        size: of the masks, ``(height, width)``, into which that image is scaled; default: as it is.

    Returns:
        ``[N, *size]`` uint8, 1 inside, column by column in memory as run lengths are. Polygons are scaled before they
        are filled, so that nothing of the image's own size is made; of run lengths the nearest pixels are taken.

    Example:
        >>> decode_masks([[[1, 0, 3, 0, 3, 2, 1, 2]]], 2, 4).tolist()
        [[[0, 1, 1, 0], [0, 1, 1, 0]]]
    """
    size = size or (height, width)
    columns = torch.zeros(len(segmentations), size[1], size[0], dtype=torch.uint8)  # [N, W, H]
    for segmentation, pixels in zip(segmentations, columns, strict=True):
        if not isinstance(segmentation, Mapping):
            _fill(_runs_of_polygons(segmentation, (height, width), size), pixels)
        elif size == (height, width):
            _fill(_runs(segmentation["counts"]), pixels)
        else:
            whole = torch.zeros(width, height, dtype=torch.uint8)
            _fill(_runs(segmentation["counts"]), whole)
            x, y = _nearest(width, size[1]), _nearest(height, size[0])
            pixels.copy_(whole[x[:, None], y])
    return columns.transpose(1, 2)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """The run lengths of masks, as json holds them.

    Args:
        masks: ``[N, H, W]``, zero outside.

    Example:
        >>> encode_masks(torch.tensor([[[0, 1], [0, 1]]]))
        [{'size': [2, 2], 'counts': '22'}]
    """
    height, width = masks.shape[1:]
    columns = masks.ne(0).transpose(1, 2).flatten(1).cpu()  # [N, W * H]
    # What stands before the first pixel is background.
    before = F.pad(columns, (1, 0))[:, :-1]
    mask_of, position = (columns != before).nonzero().unbind(1)
    changes = position.split(mask_of.bincount(minlength=len(masks)).tolist())
    return [
        {"size": [height, width], "counts": _text_of_changes(change.numpy(), height * width)}
        for change in changes
    ]


def _fill(runs: np.ndarray, pixels: Tensor) -> None:
    """Ones along every second run; several times as fast as pycocotools, which goes pixel by pixel."""
    flat = pixels.view(-1).numpy()
    ends = runs.cumsum().tolist()
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        flat[start:end] = 1


def _runs(counts: list[int] | str) -> np.ndarray:
    runs = np.asarray(counts) if isinstance(counts, list) else _parse_runs(counts)
    assert runs is not None
    return runs


def _runs_of_polygons(
    polygons: list[list[float]], old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    from pycocotools import mask

    if old != new:
        scale = (new[1] / old[1], new[0] / old[0])
        polygons = [(np.reshape(p, (-1, 2)) * scale).ravel().tolist() for p in polygons]
    return _runs(mask.merge(mask.frPyObjects(polygons, *new))["counts"].decode("ascii"))


def _nearest(old: int, new: int) -> Tensor:
    """For every position of the new grid the old one that holds its centre."""
    return ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new)).long().clamp(max=old - 1)


def _polygon_fault(polygon: object) -> str | None:
    if not isinstance(polygon, list):
        return f"got {_brief(polygon)}"
    try:
        # A sum is quick, and not finite where a number is not.
        finite = math.isfinite(sum(polygon))
    # Of an integer beyond all floats it is not known.
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        return f"got {_brief(polygon)}"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"got {len(polygon)} numbers, not three points or more"
    return None


def _place_fault(polygons: list[list[float]], height: int, width: int) -> str | None:
    inside = False
    far = _FARTHEST * max(height, width)
    for polygon in polygons:
        x, y = polygon[::2], polygon[1::2]
        left, right, top, bottom = min(x), max(x), min(y), max(y)
        if min(left, top) < -far or right > width + far or bottom > height + far:
            return (
                f"segmentation must have points in the image of {width} x {height} or near it; "
                f"got {_brief(polygon)}"
            )
        inside |= left < width and right > 0 and top < height and bottom > 0
    if not inside:
        return (
            f"segmentation must cover something of the image of {width} x {height}; "
            f"got {_brief(polygons)}"
        )
    return None


def _runs_fault(segmentation: Mapping[str, Any], height: int, width: int) -> str | None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        return f"segmentation must have the image's size [{height}, {width}]; got {_brief(size)}"
    if isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        parsed = _parse_runs(counts) if isinstance(counts, str) else None
        if parsed is None:
            return (
                f"segmentation must have run lengths as integers or a string; got {_brief(counts)}"
            )
        runs = parsed.tolist()
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        return (
            f"segmentation must have run lengths that sum to the image's {height * width} pixels; "
            f"got {sum(runs)}, of which the least is {min(runs, default=0)}"
        )
    if not any(runs[1::2]):
        return "segmentation must cover something of the image; got run lengths of background"
    return None


def _parse_runs(text: str) -> np.ndarray | None:
    """The run lengths in COCO's string; None where it is none.

    Five bits of a number to a character from ``chr(48)``, lowest first; the sixth says that more follow, the highest
    of the last is the sign. From the fourth number on each is the difference to the last but one.
    """
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if ((digits < 0) | (digits > 63)).any():
        return None
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(ends) or ends[-1] != len(digits) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 7:
        return None
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((digits & 31) << 5 * place, starts)
    numbers -= np.where(digits[ends] & 16, 1 << 5 * (ends - starts + 1), 0)
    for odd in (1, 2):
        # Sums along the runs of either colour; the first run stands apart.
        numbers[odd::2] = numbers[odd::2].cumsum()
    return numbers


def _text_of_changes(positions: np.ndarray, pixels: int) -> str:
    """COCO's string, see :func:`_parse_runs`, of where background and foreground follow each other."""
    runs = np.diff(positions, prepend=0, append=pixels)
    rest = runs.copy()
    rest[3:] -= runs[1:-2]
    digits, there = [], [np.ones(len(runs), dtype=bool)]
    while there[-1].any():
        digit, rest = rest & 31, rest >> 5
        more = rest != np.where(digit & 16, -1, 0)
        digits.append(digit + 32 * more + 48)
        there.append(there[-1] & more)
    characters = np.stack(digits, 1)[np.stack(there[:-1], 1)]
    return characters.astype(np.uint8).tobytes().decode("ascii")


def _brief(thing: object, *, limit: int = 60) -> str:
    text = repr(thing)
    return text if len(text) <= limit else f"{text[:limit]}..."
