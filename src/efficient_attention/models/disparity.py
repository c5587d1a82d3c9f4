"""From features of two views to a disparity: the cost volume and the soft argmin, arithmetic without parameters.

The views are rectified: what is at column x of the left one is at column x - d of the right one, d >= 0 its disparity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops.precision import accumulation_dtype

__all__ = ["cost_volume", "soft_argmin"]

# Of the upsampled volume that exists at a time: little enough to be in the caches of a CPU while it is used, enough for
# a GPU to be busy.
_BLOCK_BYTES = 2**24


def cost_volume(left: Tensor, right: Tensor, levels: int) -> Tensor:
    """The features of both views side by side, for every shift between them, and zero where one view has no such pixel.

    ::

        volume[b, :, d, y, x] = (left[b, :, y, x], right[b, :, y, x - d])    if x >= d, else 0

    It is stacked from its levels. Written into one tensor level by level, it would be cloned whole for every
    assignment of the backward pass.

    Args:
        left: ``[B, C, H, W]``.
        right: ``[B, C, H, W]``.
        levels: how many shifts, 0 to ``levels - 1``; may exceed W.

    Returns:
        ``[B, 2C, levels, H, W]``.

    Example:
        >>> left, right = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
        >>> cost_volume(left.view(1, 1, 1, 3), right.view(1, 1, 1, 3), 2)[0, :, 1, 0]
        tensor([[0, 2, 3],
                [0, 4, 5]])

    Paper: Chang and Chen 2018 (arXiv 1803.08669), Sec. 3.3.
    """
    width = left.shape[-1]

    def level(shift: int) -> Tensor:
        seen = torch.cat([left[..., shift:], right[..., : width - shift]], dim=1)
        return F.pad(seen, (shift, 0))

    return torch.stack([level(min(shift, width)) for shift in range(levels)], dim=2)


def soft_argmin(scores: Tensor, size: tuple[int, int, int], *, align_corners: bool) -> Tensor:
    """The expected disparity under the softmax of scores that are upsampled to every disparity and pixel.

    ::

        volume = trilinear(scores)    # [B, D, H, W]
        disparity[b, y, x] = sum_d d softmax_d(volume[b, d, y, x])

    Scores are high where the views match: they are costs with the sign turned. The volume never exists as a whole. Rows
    are interpolated first, while the other axes are short; the volume is then made, used and dropped by blocks of rows,
    and for the gradient made again. That is less than a tenth of the plain form's memory, and faster, as a block stays
    in the caches.

    Args:
        scores: ``[B, L, h, w]``, for L coarse levels of disparity.
        size: D, H and W.
        align_corners: as in ``torch.nn.functional.interpolate``. A sharp peak at level i of L = D / 4 is a disparity of
            ``4 i + 1.5`` under False, a pixel outward at the first and last level; under True of the pixel next to
            ``i (D - 1) / (L - 1)``.

    Returns:
        ``[B, H, W]`` in pixels; float32, or float64 for float64 scores.

    Example:
        >>> scores = torch.zeros(1, 2, 1, 1)
        >>> soft_argmin(scores, (8, 4, 4), align_corners=False).unique()
        tensor([3.5000])

    Paper: Chang and Chen 2018, Sec. 3.5; Kendall et al. 2017 (arXiv 1703.04309), Sec. 3.4.
    """
    disparities, height, width = size
    scores = scores.to(accumulation_dtype(scores.dtype))
    # As a bilinear interpolation that leaves columns as they are.
    to = (height, scores.shape[-1])
    rows = F.interpolate(scores, to, mode="bilinear", align_corners=align_corners)
    rows = rows.transpose(1, 2).contiguous()  # [B, H, L, w]
    # A compiler fuses the steps, and should not see how many blocks some size would take.
    if torch.compiler.is_compiling():
        return _expectation(rows, disparities, width, align_corners)
    bytes_of_row = rows.shape[0] * disparities * width * rows.element_size()
    blocks = rows.split(max(1, _BLOCK_BYTES // bytes_of_row), dim=1)
    return torch.cat([_recomputed(block, disparities, width, align_corners) for block in blocks], 1)


def _recomputed(rows: Tensor, disparities: int, width: int, align_corners: bool) -> Tensor:
    if not rows.requires_grad:
        return _expectation(rows, disparities, width, align_corners)
    arguments = (rows, disparities, width, align_corners)
    return checkpoint(_expectation, *arguments, use_reentrant=False, preserve_rng_state=False)


def _expectation(rows: Tensor, disparities: int, width: int, align_corners: bool) -> Tensor:
    to = (disparities, width)
    volume = F.interpolate(rows, to, mode="bilinear", align_corners=align_corners)  # [B, R, D, W]
    pixels = torch.arange(disparities, device=rows.device, dtype=rows.dtype)
    # No matrix product: autocast and TF32 would round 191 px to 8 or 10 bits.
    return (volume.softmax(2) * pixels[:, None]).sum(2)
