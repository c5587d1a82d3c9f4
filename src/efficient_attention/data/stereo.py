"""Rectified pairs of images with the disparity of the left one: a sample, and data sets of files.

``H`` and ``W`` are the height and the width in pixels. What is at column x of the left image is at column x - d of the
right one, in the same row; d >= 0 is the disparity.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .disparity_files import read_disparity
from .draws import Draw, as_draw, generator
from .images import read_image

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

    A disparity is known where it is finite and positive. Files of other sizes than their left image are an error; of
    the first pair when the data set is made, of others when they are read.

    Args:
        files: of every pair; at least one.
        disparity_scale: what files store for a pixel of disparity; default: that of :func:`read_disparity`.
        absolute: take the absolute value of disparities; some files hold them with the sign of a shift.
        transform: is applied to every sample, such as ``StereoAugmentation``, with random numbers that follow from the
            :class:`Draw` by which the sample is asked for; under a plain index they are always the same.

    Raises:
        FileNotFoundError: a file of the first pair does not exist.
        ValueError: there is no pair, or a file of the first pair is damaged or has another size.
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
        self.files = list(files)
        self.disparity_scale = disparity_scale
        self.absolute = absolute
        self.transform = transform
        self._read(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Draw) -> StereoSample:
        draw = as_draw(key, len(self))
        sample = self._read(self.files[draw.item])
        if self.transform is None:
            return sample
        return self.transform(sample, generator(draw.seed, draw.item))

    def _read(self, files: StereoFiles) -> StereoSample:
        left, right = read_image(files.left), read_image(files.right)
        sample = StereoSample(left=left, right=right, name=files.name)
        _check_size(right, files.right, left, files.left)
        if files.disparity is not None:
            disparity = read_disparity(files.disparity, scale=self.disparity_scale)
            _check_size(disparity, files.disparity, left, files.left)
            disparity = disparity.abs() if self.absolute else disparity
            valid = disparity.isfinite() & (disparity > 0)
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


def _check_size(picture: Tensor, path: str, left: Tensor, left_path: str) -> None:
    if picture.shape[-2:] != left.shape[-2:]:
        (height, width), (h, w) = left.shape[-2:], picture.shape[-2:]
        raise ValueError(
            f"{path} must have the size of {left_path}, {width} x {height}; got {w} x {h}"
        )
