"""Rectified pairs of images with the disparity of the left one: a sample, and data sets of files.

``H`` and ``W`` are the height and the width in pixels. What is at column x of the left image is at column x - d of the
right one, in the same row; d >= 0 is the disparity.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .disparity_files import check_disparity, read_disparity
from .draws import Draw, as_draw, generator
from .images import check_pixels, read_image

__all__ = [
    "StereoFiles",
    "StereoFolder",
    "StereoPairs",
    "StereoSample",
    "StereoTransform",
    "match_files",
]


class StereoSample(TypedDict):
    """A pair, as every stereo data set here gives it and ``default_collate`` batches it.

    Attributes:
        left: ``[3, H, W]`` float32 in [0, 1].
        right: as ``left``.
        name: of the pair in its data set.
        disparity: ``[H, W]`` float32 in pixels, of the left image; 0 where it is not valid. Not there where there is no
            truth.
        valid: ``[H, W]`` bool, True = the disparity is known; there whenever ``disparity`` is.
        visible: ``[H, W]`` bool, True = the right image shows this point too: it is neither hidden nor outside. Where
            a data set knows it.
    """

    left: Tensor
    right: Tensor
    name: str
    disparity: NotRequired[Tensor]
    valid: NotRequired[Tensor]
    visible: NotRequired[Tensor]


# Reading the head of a file is waiting for the disk.
_READERS = 16
# No camera measures less, in pixels; numbers in another byte order or of another scale are mostly less, or too large.
_SMALLEST = 2.0**-10

# What changes a sample, with random numbers from a generator on the CPU.
StereoTransform = Callable[[StereoSample, torch.Generator], StereoSample]


class StereoFiles(NamedTuple):
    """The files of a pair.

    Attributes:
        name: of the pair.
        left: path of the left image.
        right: path of the right image.
        disparity: path of the left image's disparity, or ``None``.
    """

    name: str
    left: str
    right: str
    disparity: str | None = None


class StereoPairs(Dataset[StereoSample]):
    """A data set of pairs whose files are listed.

    A disparity is known where it is finite and positive. When the data set is made, the heads of all files are looked
    at, and the first pair is read. Damage inside of a file, and disparities that cannot be, are told when they are met:
    a file in which nothing is known, and one of which most numbers are no disparities of an image of this width, as
    those in another byte order.

    Args:
        files: of every pair; at least one.
        disparity_scale: what files store for a pixel of disparity; default: that of :func:`read_disparity`.
        absolute: take the absolute value of disparities; some files hold them with the sign of a shift.
        transform: is applied to every sample, such as ``StereoAugmentation``, with random numbers that follow from the
            :class:`Draw` by which the sample is asked for; under a plain index they are always the same.

    Raises:
        InputError: a ValueError; files are missing, no pictures or maps, damaged or of other sizes than their left
            image. The message names the first.
        ValueError: there is no pair, or the scale is not positive.
    """

    def __init__(
        self,
        files: Sequence[StereoFiles],
        *,
        disparity_scale: float | None = None,
        absolute: bool = False,
        transform: StereoTransform | None = None,
    ) -> None:
        if not files:
            raise ValueError("files must name at least one pair; got none")
        if disparity_scale is not None and not disparity_scale > 0:
            raise ValueError(f"disparity_scale must be positive; got {disparity_scale}")
        self.files = list(files)
        self.disparity_scale = disparity_scale
        self.absolute = absolute
        self.transform = transform
        self._check()
        self._read(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Draw) -> StereoSample:
        draw = as_draw(key, len(self))
        sample = self._read(self.files[draw.item])
        if self.transform is None:
            return sample
        return self.transform(sample, generator(draw.seed, draw.item))

    def _check(self) -> None:
        with ThreadPoolExecutor(_READERS) as readers:
            faults = [fault for fault in readers.map(self._fault, self.files) if fault]
        if faults:
            raise InputError(
                f"{len(faults)} of {len(self.files)} pairs cannot be used; the first: {faults[0]}"
            )

    def _fault(self, files: StereoFiles) -> str | None:
        """What the heads of a pair's files show to be wrong."""
        try:
            size = check_pixels(files.left)
            _check_size(check_pixels(files.right), files.right, size, files.left)
            if files.disparity is not None:
                of_truth = check_disparity(files.disparity, scale=self.disparity_scale)
                _check_size(of_truth, files.disparity, size, files.left)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _read(self, files: StereoFiles) -> StereoSample:
        try:
            return self._sample(files)
        except OSError as error:
            raise InputError(f"pair {files.name} can no longer be read: {error}") from error

    def _sample(self, files: StereoFiles) -> StereoSample:
        left, right = read_image(files.left), read_image(files.right)
        size = left.shape[1:]
        _check_size(right.shape[1:], files.right, size, files.left)
        sample = StereoSample(left=left, right=right, name=files.name)
        if files.disparity is not None:
            disparity = read_disparity(files.disparity, scale=self.disparity_scale)
            _check_size(disparity.shape, files.disparity, size, files.left)
            disparity = disparity.abs() if self.absolute else disparity
            valid = disparity.isfinite() & (disparity > 0)
            _check_known(disparity, valid, files.disparity)
            # What is unknown may be infinite in the file, and would be NaN after a product with the mask.
            sample["disparity"] = torch.where(valid, disparity, 0)
            sample["valid"] = valid
        return sample


class StereoFolder(StereoPairs):
    """A data set of the pairs in a folder, by patterns of their files' names.

    Args:
        left_pattern: path of the left images, with ``*`` for what differs between pairs; every ``*`` stands for a part
            of one name, and hidden files are passed over.
        right_pattern: path of the right images, with as many ``*``, which stand for the same parts in the same order.
        disparity_pattern: path of the disparities, likewise; ``.pfm``, ``.png`` or ``.npy``; default: no truth.
        disparity_scale: see :class:`StereoPairs`.
        absolute: see :class:`StereoPairs`.
        transform: see :class:`StereoPairs`.

    Raises:
        FileNotFoundError: no left image, or one without its right image or disparity; the message names the first.
        ValueError: a right image or a disparity without its left image; different numbers of ``*``; and as
            :class:`StereoPairs`.

    Example:
        >>> from PIL import Image
        >>> for name in ("im0.png", "im1.png"):
        ...     Path(folder, "Piano").mkdir(exist_ok=True)
        ...     Image.new("RGB", (30, 20)).save(Path(folder, "Piano", name))
        >>> pairs = StereoFolder(f"{folder}/*/im0.png", f"{folder}/*/im1.png")
        >>> pairs[0]["name"], pairs[0]["right"].shape
        ('Piano', torch.Size([3, 20, 30]))
    """

    def __init__(
        self,
        left_pattern: str | Path,
        right_pattern: str | Path,
        disparity_pattern: str | Path | None = None,
        *,
        disparity_scale: float | None = None,
        absolute: bool = False,
        transform: StereoTransform | None = None,
    ) -> None:
        files = match_files(left_pattern, right_pattern, disparity_pattern)
        super().__init__(
            files, disparity_scale=disparity_scale, absolute=absolute, transform=transform
        )


def match_files(
    left_pattern: str | Path,
    right_pattern: str | Path,
    disparity_pattern: str | Path | None = None,
    *,
    prefix: str = "",
    layout: str = "",
) -> list[StereoFiles]:
    """List the pairs that match patterns, by what their names share and not by their order.

    Args:
        left_pattern: see :class:`StereoFolder`.
        right_pattern: see :class:`StereoFolder`.
        disparity_pattern: see :class:`StereoFolder`.
        prefix: stands before the names of the pairs, which else are what the ``*`` stand for.
        layout: the tree of folders that is expected, for error messages.

    Returns:
        The files of every pair, sorted by name.

    Raises:
        FileNotFoundError: see :class:`StereoFolder`.
        ValueError: see :class:`StereoFolder`.
    """
    expected = f"\nexpected:\n{layout}" if layout else ""
    lefts = _matches(left_pattern)
    if not lefts:
        raise FileNotFoundError(f"there is no left image {left_pattern}{expected}")
    rights = _partners("right image", right_pattern, left_pattern, lefts, expected)
    disparities: Mapping[tuple[str, ...], str] = {}
    if disparity_pattern is not None:
        disparities = _partners("disparity", disparity_pattern, left_pattern, lefts, expected)
    return [
        StereoFiles(
            prefix + ("/".join(parts) or Path(left).stem),
            left,
            rights[parts],
            disparities.get(parts),
        )
        for parts, left in sorted(lefts.items())
    ]


def _partners(
    what: str,
    pattern: str | Path,
    left_pattern: str | Path,
    lefts: Mapping[tuple[str, ...], str],
    expected: str,
) -> dict[tuple[str, ...], str]:
    """The files that match, exactly one for every left image."""
    if str(pattern).count("*") != str(left_pattern).count("*"):
        raise ValueError(
            f"patterns must have the same number of *; got {left_pattern} for the left image "
            f"and {pattern} for the {what}"
        )
    found = _matches(pattern)
    if lacking := sorted(lefts.keys() - found.keys()):
        raise FileNotFoundError(
            f"{len(lacking)} of {len(lefts)} left images have no {what}; the first is "
            f"{lefts[lacking[0]]}, without {_filled(pattern, lacking[0])}{expected}"
        )
    if surplus := sorted(found.keys() - lefts.keys()):
        raise ValueError(
            f"{len(surplus)} {what} files have no left image; the first is "
            f"{found[surplus[0]]}, without {_filled(left_pattern, surplus[0])}{expected}"
        )
    return found


def _matches(pattern: str | Path) -> dict[tuple[str, ...], str]:
    """The files that match, by what every ``*`` stands for."""
    fixed = str(pattern).split("*")
    expression = re.compile("([^/]*)".join(map(re.escape, fixed)))
    # Not Path.glob: it would find hidden files, which some archivers leave beside those that they belong to.
    paths = glob.iglob("*".join(map(glob.escape, fixed)))  # noqa: PTH207
    matches = ((expression.fullmatch(path), path) for path in paths)
    return {match.groups(): path for match, path in matches if match}


def _filled(pattern: str | Path, parts: tuple[str, ...]) -> str:
    rest = iter(parts)
    return re.sub(r"\*", lambda _: next(rest), str(pattern))


def _check_size(size: Sequence[int], path: str, of_left: Sequence[int], left_path: str) -> None:
    (height, width), (h, w) = of_left, size
    if (h, w) != (height, width):
        raise InputError(
            f"{path} must have the size of {left_path}, {width} x {height}; got {w} x {h}"
        )


def _check_known(disparity: Tensor, known: Tensor, path: str) -> None:
    """Whether there is something to learn from, and it can be true."""
    count = int(known.sum())
    if count == 0:
        negative, zero = int((disparity < 0).sum()), int((disparity == 0).sum())
        advice = "; absolute=True takes them without their sign" if negative else ""
        raise InputError(
            f"{path} must hold disparities that are known, finite and positive; of {disparity.numel()} "
            f"there are {negative} negative, {zero} zero and the others not finite{advice}"
        )
    width = disparity.shape[1]
    odd = known & ((disparity < _SMALLEST) | (disparity > width))
    if 2 * int(odd.sum()) > count:
        raise InputError(
            f"{path} must hold disparities in pixels of an image {width} wide; got {disparity[odd][0]:g} for one "
            f"and {int(odd.sum())} such of {count}: disparity_scale or the byte order, which the sign of the scale "
            "in a .pfm tells, must be another"
        )
