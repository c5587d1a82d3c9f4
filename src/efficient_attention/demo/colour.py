"""Oklab, a colour space in which distance is what eyes see.

Ottosson 2020, "A perceptual color space for image processing".
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_oklab", "to_oklab"]

Matrix = tuple[tuple[float, ...], ...]

_CONES: Matrix = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_OPPONENTS: Matrix = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def to_oklab(pixels: Tensor) -> Tensor:
    """From sRGB ``[B, 3, H, W]`` in [0, 1] to lightness, green to red, and blue to yellow.

    Example:
        >>> white = torch.ones(1, 3, 1, 1)
        >>> [round(float(x), 4) + 0 for x in to_oklab(white).flatten()]
        [1.0, 0.0, 0.0]
    """
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055) ** 2.4, pixels / 12.92)
    cones = _mix(linear, _CONES).clamp(min=0) ** (1 / 3)
    return _mix(cones, _OPPONENTS)


def from_oklab(oklab: Tensor) -> Tensor:
    """The inverse of :func:`to_oklab`, clipped to [0, 1].

    Example:
        >>> pixels = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(from_oklab(to_oklab(pixels)), pixels, atol=1e-4)
        True
    """
    cones = _mix(oklab, _inverse(_OPPONENTS)) ** 3
    linear = _mix(cones, _inverse(_CONES)).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _mix(x: Tensor, matrix: Matrix) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", x.new_tensor(matrix), x)


def _inverse(matrix: Matrix) -> Matrix:
    return tuple(map(tuple, torch.tensor(matrix, dtype=torch.float64).inverse().tolist()))
