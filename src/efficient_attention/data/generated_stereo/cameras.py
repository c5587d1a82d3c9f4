"""What two cameras make of what they see: unlike exposure, soft edges, noise, 8 bits."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .choices import pick

__all__ = ["Camera", "random_cameras"]

# Of a curve of brightness, which is rounded to 256 steps in the end.
_CURVE_STEPS = 4096

Random = np.random.Generator


class Camera(NamedTuple):
    """``(gain * ramp * soft) ** gamma + noise``, in 256 steps.

    Attributes:
        gain: of red, green and blue.
        ramp: share by which brightness falls from the left to the right border.
        gamma: bends brightness.
        softness: weight of either neighbour, along both axes; 1/4 is the softest.
        noise: deviation, in [0, 1].
    """

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ramp: float = 0.0
    gamma: float = 1.0
    softness: float = 0.0
    noise: float = 0.0

    def photograph(self, view: Tensor, random: Random) -> Tensor:
        """A picture ``[3, H, W]`` float32 of 256 steps in [0, 1]."""
        width = view.shape[2]
        falling = 1 - self.ramp * torch.linspace(-0.5, 0.5, width)
        image = _soft(view, self.softness) * (torch.tensor(self.gain)[:, None, None] * falling)
        image = image.clamp_(0, 1)
        if self.gamma != 1:
            # A table is several times as fast as powers.
            curve = np.linspace(0, 1, _CURVE_STEPS, dtype=np.float32) ** self.gamma
            steps = image.mul_(_CURVE_STEPS - 1).numpy().astype(np.intp)
            image = torch.from_numpy(curve.astype(np.float32).take(steps))
        if self.noise:
            grain = _grain(2 * image.numel())
            start = int(random.integers(image.numel()))
            image = image.add_(
                grain[start : start + image.numel()].view_as(image), alpha=self.noise
            )
        return image.mul_(255).round_().clamp_(0, 255).div_(255)


def random_cameras(random: Random, view: Tensor) -> tuple[Camera, Camera]:
    """Two cameras of one rig: mostly alike, in some rigs not; exposed for what is bright in a view ``[3, H, W]``."""
    spread = pick(random, ((0.0, 0.3), (0.02, 0.5), (0.12, 0.2)))
    bright = float(view[:, ::8, ::8].mean(0).flatten().quantile(0.9))
    exposure = min(random.uniform(0.5, 0.95) / max(bright, 0.01), 3.0)
    tint = random.normal(1, 0.04, 3)
    gamma = math.exp(random.normal(0, 0.15))
    softness = random.uniform(0, 0.18)
    noise = max(0.0, random.uniform(-2, 4)) / 255

    def camera() -> Camera:
        gain = exposure * tint * random.normal(1, spread) * random.normal(1, 0.3 * spread, 3)
        return Camera(
            gain=tuple(gain.tolist()),
            ramp=random.normal(0, spread),
            gamma=gamma * math.exp(random.normal(0, 0.5 * spread)),
            softness=min(0.25, softness * random.uniform(0.9, 1.1)),
            noise=noise,
        )

    return camera(), camera()


# Noise is the dearest part of a picture; another part of the same serves as well.
@lru_cache(maxsize=4)
def _grain(count: int) -> Tensor:
    """Normal numbers ``[count]``, always the same."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(count, dtype=np.float32))


def _soft(view: Tensor, weight: float) -> Tensor:
    for dim in (1, 2) if weight else ():
        length = view.shape[dim]
        ends = view.narrow(dim, 0, 1), view.narrow(dim, length - 1, 1)
        wide = torch.cat([ends[0], view, ends[1]], dim)
        view = wide.narrow(dim, 0, length) + wide.narrow(dim, 2, length)
        view = view.mul_(weight).add_(wide.narrow(dim, 1, length), alpha=1 - 2 * weight)
    return view
