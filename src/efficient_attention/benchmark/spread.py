"""What several seeds say: mean, standard deviation, differences seed by seed; and what repetitions say: percentiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

__all__ = ["PERCENTILES", "Spread", "differences", "percentiles", "spread"]

#: Of repetitions, as records have them.
PERCENTILES = (20, 50, 80)


class Spread(NamedTuple):
    """Values by seed, and what they have in common.

    Args:
        mean: of the values.
        deviation: standard deviation of the values around their mean, with n - 1 in its denominator; ``None`` of one
            value, which says nothing of its spread.
        by_seed: the values.
    """

    mean: float
    deviation: float | None
    by_seed: dict[int, float]


def spread(by_seed: Mapping[int, float]) -> Spread:
    """Sum up the values of several seeds.

    Args:
        by_seed: a value for each seed, at least one.

    Raises:
        ValueError: no values.

    Example:
        >>> spread({0: 1.0, 1: 2.0, 2: 6.0})
        Spread(mean=3.0, deviation=2.6457513110645907, by_seed={0: 1.0, 1: 2.0, 2: 6.0})

    Not part of the paper, which reports single runs.
    """
    if not by_seed:
        raise ValueError("by_seed must have a value; got none")
    count = len(by_seed)
    mean = math.fsum(by_seed.values()) / count
    squares = math.fsum((value - mean) ** 2 for value in by_seed.values())
    return Spread(mean, math.sqrt(squares / (count - 1)) if count > 1 else None, dict(by_seed))


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> Spread:
    """Sum up ``values - baseline``, seed by seed.

    What a seed does to both, such as its order of samples and its first weights, is not in the spread of the
    differences, so that fewer seeds tell more.

    Args:
        values: by seed.
        baseline: by the same seeds.

    Raises:
        ValueError: other seeds.

    Example:
        >>> differences({0: 11.0, 1: 22.0}, {0: 10.0, 1: 20.0})
        Spread(mean=1.5, deviation=0.7071067811865476, by_seed={0: 1.0, 1: 2.0})

    Not part of the paper.
    """
    if values.keys() != baseline.keys():
        raise ValueError(
            f"baseline must have the seeds of values, {sorted(values)}; got {sorted(baseline)}"
        )
    return spread({seed: value - baseline[seed] for seed, value in values.items()})


def percentiles(values: Iterable[float]) -> list[float]:
    """The 20th, 50th and 80th percentile, with linear interpolation between values.

    Args:
        values: at least one.

    Example:
        >>> percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
        [2.0, 3.5, 5.0]

    Not part of the paper.
    """
    wanted = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    found = torch.tensor(list(values), dtype=torch.float64).quantile(wanted)
    return [round(value, 6) for value in found.tolist()]
