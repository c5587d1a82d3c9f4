"""Errors of disparities under a protocol that is said with every figure.

Published figures of one network differ by the protocol alone: which pixels count, whether an image with few known
pixels weighs as much as one with many, whether hidden points count. ``B``, ``H`` and ``W`` are the images of a batch,
their height and their width in pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["StereoMetrics", "StereoScores"]

# Above so many pixels a disparity is bad.
_BAD = (1, 2, 3)
# KITTI's outliers are off by more than both: pixels, and a share of the true disparity.
_D1_PIXELS, _D1_SHARE = 3, 0.05


class StereoScores(NamedTuple):
    """What :class:`StereoMetrics` computes.

    Attributes:
        end_point_error: mean ``|prediction - disparity|`` in pixels.
        bad_1: pixels that are off by more than 1 px, in percent.
        bad_2: by more than 2 px, in percent.
        bad_3: by more than 3 px, in percent.
        d1_all: KITTI's outliers in percent: off by more than 3 px and by more than 5 % of the true disparity.
        images: images that count.
        skipped: images that do not, as they have too few pixels that count, or none.
        pixels: pixels that count.
        protocol: in words.
    """

    end_point_error: float
    bad_1: float
    bad_2: float
    bad_3: float
    d1_all: float
    images: int
    skipped: int
    pixels: int
    protocol: str


class StereoMetrics:
    """End-point error and rates of bad pixels, summed over batches.

    A pixel counts if its disparity d is known and ``0 < d < max_disparity``, and under ``occluded=False`` if it is
    visible in the right image too. A prediction that is not a number is a bad one, and makes the end-point error NaN.

    The state is sums, in float64, and counts, in int64: however images are batched or shared out over processes,
    the scores are those of the images, each of which must be given once.

    Args:
        max_disparity: in pixels; ``None``: no bound.
        occluded: whether points that the right image does not show count.
        average: over all pixels of all images, or ``"image"``: over the pixels of each image and then over images.
        least_valid: images with a smaller share of pixels that count are skipped. Images without such a pixel always
            are, and are counted in ``skipped``.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> metrics = StereoMetrics()
        >>> metrics.update(torch.full((1, 2, 2), 7.5), torch.full((1, 2, 2), 5.0), torch.ones(1, 2, 2) > 0)
        >>> scores = metrics.compute()
        >>> scores.end_point_error, scores.bad_2, scores.bad_3
        (2.5, 100.0, 0.0)
        >>> scores.protocol
        '0 < d < 192 px, occluded pixels in, mean over pixels'
    """

    def __init__(
        self,
        *,
        max_disparity: float | None = 192,
        occluded: bool = True,
        average: Literal["pixel", "image"] = "pixel",
        least_valid: float = 0.0,
    ) -> None:
        if max_disparity is not None and not max_disparity > 0:
            raise ValueError(f"max_disparity must be positive or None; got {max_disparity}")
        if average not in ("pixel", "image"):
            raise ValueError(f"average must be 'pixel' or 'image'; got {average!r}")
        if not 0 <= least_valid <= 1:
            raise ValueError(f"least_valid must be a share in [0, 1]; got {least_valid}")
        self.max_disparity, self.occluded = max_disparity, occluded
        self.average, self.least_valid = average, least_valid
        # Of the first five scores: over pixels, or over images of their means. They live where predictions do.
        self.sums = torch.zeros(2 + len(_BAD), dtype=torch.float64)
        # Images, skipped images, pixels.
        self.counts = torch.zeros(3, dtype=torch.int64)

    @property
    def protocol(self) -> str:
        """What counts and how it is averaged, in words."""
        bound = "0 < d" if self.max_disparity is None else f"0 < d < {self.max_disparity:g} px"
        occluded = "in" if self.occluded else "out"
        least = f", images with less than {self.least_valid:.0%} out" if self.least_valid else ""
        return f"{bound}, occluded pixels {occluded}, mean over {self.average}s{least}"

    @torch.no_grad()
    def update(
        self, prediction: Tensor, disparity: Tensor, valid: Tensor, visible: Tensor | None = None
    ) -> None:
        """Take in the images of a batch. Nothing waits for the device.

        Args:
            prediction: ``[B, H, W]`` in pixels, floating point.
            disparity: ``[B, H, W]`` in pixels, on the same device; may hold anything where it is not valid.
            valid: bool ``[B, H, W]``, True = known.
            visible: bool ``[B, H, W]``, True = shown by the right image; read under ``occluded=False``.

        Raises:
            ValueError: shapes differ, or ``visible`` is needed and missing.
        """
        mask = self._counting(prediction, disparity, valid, visible)
        pixels = mask.sum((1, 2))  # [B]
        enough = (pixels > 0) & (pixels >= self.least_valid * mask.shape[1] * mask.shape[2])
        sums = _sums(prediction, disparity, mask)  # [B, 5]
        if self.average == "image":
            sums = sums / pixels.clamp(min=1).unsqueeze(1)
        counts = torch.stack([enough.sum(), (~enough).sum(), (pixels * enough).sum()])
        # Not a product with the mask, as NaN times 0 is NaN.
        sums = torch.where(enough.unsqueeze(1), sums, 0).sum(0)
        self.sums = self.sums.to(sums.device) + sums
        self.counts = self.counts.to(counts.device) + counts

    def merge(self, other: Self) -> Self:
        """The metrics of the images of both, as if one had seen them all; neither is changed.

        Args:
            other: metrics of the same protocol, from another process for one.

        Raises:
            ValueError: another protocol.

        Example:
            >>> StereoMetrics().merge(StereoMetrics()).counts
            tensor([0, 0, 0])
        """
        if self._options() != other._options():
            raise ValueError(
                f"other must have the protocol {self.protocol!r}; got {other.protocol!r}"
            )
        merged = type(self)(**self._options())
        merged.sums = self.sums + other.sums.to(self.sums.device)
        merged.counts = self.counts + other.counts.to(self.counts.device)
        return merged

    def compute(self) -> StereoScores:
        """The scores of all images so far.

        Raises:
            InputError: a ValueError; no image had a pixel that counts.
        """
        images, skipped, pixels = self.counts.tolist()
        if images == 0:
            raise InputError(
                f"scores need an image with pixels that count ({self.protocol}); "
                f"got {skipped} images without"
            )
        mean = self.sums / (pixels if self.average == "pixel" else images)
        error, *rates = mean.tolist()
        bad_1, bad_2, bad_3, d1_all = (100 * rate for rate in rates)
        return StereoScores(
            error, bad_1, bad_2, bad_3, d1_all, images, skipped, pixels, self.protocol
        )

    def reset(self) -> None:
        """Forget all images."""
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

    def _options(self) -> dict:
        return {
            "max_disparity": self.max_disparity,
            "occluded": self.occluded,
            "average": self.average,
            "least_valid": self.least_valid,
        }

    def _counting(
        self, prediction: Tensor, disparity: Tensor, valid: Tensor, visible: Tensor | None
    ) -> Tensor:
        """The pixels that count, bool ``[B, H, W]``."""
        if not self.occluded and visible is None:
            raise ValueError("visible must be given under occluded=False; got None")
        given = {"disparity": disparity, "valid": valid}
        for name, tensor in (
            given.items() if visible is None else (*given.items(), ("visible", visible))
        ):
            if prediction.dim() != 3 or tensor.shape != prediction.shape:
                raise ValueError(
                    f"prediction and {name} must have the same shape [B, H, W]; "
                    f"got {tuple(prediction.shape)} and {tuple(tensor.shape)}"
                )
        mask = valid & (disparity > 0)
        if self.max_disparity is not None:
            mask = mask & (disparity < self.max_disparity)
        return mask if self.occluded or visible is None else mask & visible


def _sums(prediction: Tensor, disparity: Tensor, mask: Tensor) -> Tensor:
    """Over the masked pixels of every image: errors, and bad pixels by each definition, float64 ``[B, 5]``."""
    true = disparity.double()
    error = (prediction.double() - true).abs()
    # Asked the other way round, NaN would be good.
    bad = [~(error <= pixels) for pixels in _BAD]
    d1 = ~(error <= _D1_PIXELS) & ~(error <= _D1_SHARE * true)
    values = (torch.where(mask, value.double(), 0).sum((1, 2)) for value in (error, *bad, d1))
    return torch.stack(list(values), dim=1)
