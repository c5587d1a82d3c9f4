"""Random choices by share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["pick"]

T = TypeVar("T")


def pick(random: np.random.Generator, shares: Sequence[tuple[T, float]]) -> T:
    """One of several things, each as often as its share of the sum says.

    Example:
        >>> pick(np.random.default_rng(0), [("never", 0.0), ("always", 2.0)])
        'always'
    """
    # Generator.choice takes ten times as long, and a scene makes hundreds of choices.
    left = random.random() * sum(share for _, share in shares)
    for thing, share in shares:
        left -= share
        if left < 0:
            return thing
    return shares[-1][0]
