"""What training changes in stereo pairs: never what corresponds to what.

Both views are cropped and flipped alike, so that disparities stay as they are. They are recoloured nearly alike, as by
two cameras of one make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stereo import StereoSample

__all__ = ["StereoAugmentation", "crop", "flip_vertically"]

# Shares of red, green and blue in what eyes see as brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


class StereoAugmentation:
    """A random crop, a random vertical flip and random colours, in this order.

    Colours are changed as ``(brightness * contrasted) ** gamma`` with ``contrasted = mean + contrast * (saturated -
    mean)`` and ``saturated = gray + saturation * (view - gray)``, clipped to [0, 1]. Each of the four factors is drawn
    from ``[1 - strength, 1 + strength]`` for the pair, times one from ``[1 - asymmetry, 1 + asymmetry]`` for each view.

    Args:
        size: height and width of the crop in pixels; ``None``: no crop.
        flip: how probable the flip is.
        brightness: strength, in [0, 1); 0: factor 1 for the pair.
        contrast: likewise.
        saturation: likewise.
        gamma: likewise.
        asymmetry: likewise, of what differs between the views.

    Raises:
        ValueError: a size that is not positive, a strength outside [0, 1), or a probability outside [0, 1].

    Example:
        >>> augment = StereoAugmentation((32, 64))
        >>> sample = {"left": torch.rand(3, 50, 80), "right": torch.rand(3, 50, 80), "name": "noise"}
        >>> augment(sample, torch.Generator().manual_seed(0))["left"].shape
        torch.Size([3, 32, 64])
    """

    def __init__(
        self,
        size: tuple[int, int] | None = (256, 512),
        *,
        flip: float = 0.5,
        brightness: float = 0.3,
        contrast: float = 0.3,
        saturation: float = 0.3,
        gamma: float = 0.2,
        asymmetry: float = 0.05,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be a positive height and width; got {tuple(size)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability in [0, 1]; got {flip}")
        self.strengths = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "gamma": gamma,
        }
        for name, strength in (*self.strengths.items(), ("asymmetry", asymmetry)):
            if not 0 <= strength < 1:
                raise ValueError(f"{name} must be in [0, 1); got {strength}")
        self.size, self.flip, self.asymmetry = size, flip, asymmetry

    def __call__(self, sample: StereoSample, generator: torch.Generator) -> StereoSample:
        """Change a sample.

        Args:
            sample: is left as it is.
            generator: of all random numbers.

        Raises:
            ValueError: the images are smaller than the crop.
        """
        if self.size is not None:
            sample = self._crop(sample, self.size, generator)
        if torch.rand((), generator=generator) < self.flip:
            sample = flip_vertically(sample)
        return self._recolour(sample, generator)

    def _crop(
        self, sample: StereoSample, size: tuple[int, int], generator: torch.Generator
    ) -> StereoSample:
        room = [have - want for have, want in zip(sample["left"].shape[1:], size, strict=True)]
        if min(room) < 0:
            raise ValueError(
                f"size must fit into the images; got {tuple(size)} for {sample['name']!r} of "
                f"{tuple(sample['left'].shape[1:])}"
            )
        top, left = (int(torch.randint(r + 1, (), generator=generator)) for r in room)
        return crop(sample, top, left, size)

    def _recolour(self, sample: StereoSample, generator: torch.Generator) -> StereoSample:
        strengths = torch.tensor(list(self.strengths.values()))
        signs = torch.rand(3, len(strengths), generator=generator) * 2 - 1
        common = 1 + strengths * signs[0]
        left, right = common * (1 + self.asymmetry * signs[1:])  # [4] each
        mean = _gray(sample["left"]).mean()
        return sample | {
            "left": _recoloured(sample["left"], mean, *left),
            "right": _recoloured(sample["right"], mean, *right),
        }


def crop(sample: StereoSample, top: int, left: int, size: tuple[int, int]) -> StereoSample:
    """The same part of both views.

    Points whose partner is cut off are no longer visible, but their disparity is known as before.

    Args:
        sample: is left as it is.
        top: first row.
        left: first column.
        size: height and width.

    Returns:
        The part, as a sample; its tensors are views.
    """
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    part = sample.copy()
    part["left"], part["right"] = (sample[side][:, rows, columns] for side in ("left", "right"))
    if "disparity" in sample:
        part["disparity"] = sample["disparity"][rows, columns]
        part["valid"] = sample["valid"][rows, columns]
    if "visible" in sample:
        partner = torch.arange(size[1]) - part["disparity"]
        part["visible"] = sample["visible"][rows, columns] & (partner >= 0)
    return part


def flip_vertically(sample: StereoSample) -> StereoSample:
    """Both views and what is known of them upside down; ``sample`` itself is left as it is."""
    flipped = sample.copy()
    flipped["left"], flipped["right"] = sample["left"].flip(1), sample["right"].flip(1)
    if "disparity" in sample:
        flipped["disparity"], flipped["valid"] = (
            sample["disparity"].flip(0),
            sample["valid"].flip(0),
        )
    if "visible" in sample:
        flipped["visible"] = sample["visible"].flip(0)
    return flipped


def _recoloured(
    view: Tensor,
    mean: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    gamma: Tensor,
) -> Tensor:
    gray = _gray(view)
    saturated = gray + saturation * (view - gray)
    contrasted = mean + contrast * (saturated - mean)
    return (brightness * contrasted).clamp(0, 1) ** gamma


def _gray(view: Tensor) -> Tensor:
    """``[1, H, W]`` of ``[3, H, W]``."""
    return torch.einsum("c,chw->hw", view.new_tensor(_LUMA), view).unsqueeze(0)
