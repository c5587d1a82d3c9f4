"""What attention costs beside dot-product attention: measured where it fits, computed elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..memory import peak_bytes
from ..ops import dot_product_attention, efficient_attention

__all__ = ["Cost", "compare", "in_words", "measure", "table"]

# Where dot-product attention takes a second or two, and half a GiB.
FUSED_POSITIONS = 32_768
EXPLICIT_POSITIONS = 8_192
ENOUGH_SECONDS = 1.0

_SECONDS = (("s", 1), ("min", 60), ("h", 3600), ("days", 24 * 3600))
_BYTES = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40), ("PiB", 2**50))


class Cost(NamedTuple):
    """What one way to attend costs.

    Attributes:
        name: of the way.
        positions: that attend to each other.
        bytes: the most that its tensors hold at one time, beside its inputs.
        seconds: of one run.
        measured: or computed from a measurement at fewer positions.
    """

    name: str
    positions: int
    bytes: float
    seconds: float
    measured: bool = True

    def at(self, positions: int, *, memory_power: int) -> Cost:
        """What it would be at so many positions: time grows with their square, memory with a power.

        Example:
            >>> Cost("fused", 1000, 64.0, 0.5).at(2000, memory_power=1)
            Cost(name='fused', positions=2000, bytes=128.0, seconds=2.0, measured=False)
        """
        if positions == self.positions:
            return self
        factor = positions / self.positions
        return self._replace(
            positions=positions,
            bytes=self.bytes * factor**memory_power,
            seconds=self.seconds * factor**2,
            measured=False,
        )


def measure(name: str, positions: int, function: Callable[[], object]) -> Cost:
    """The memory of one run of ``function``, and the time of its fastest.

    It runs for a second, three times at least: other work on the machine only makes it slower.
    """
    memory = peak_bytes(function)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < ENOUGH_SECONDS:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return Cost(name, positions, memory, min(seconds))


def compare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    positions: int,
    report: Callable[[int, str], None] = lambda done, name: None,
) -> list[Cost]:
    """The operators alone, on the same queries, keys and values.

    Dot-product attention is measured on as many positions as it can take, chosen evenly, and
    computed for all.

    Args:
        query: ``[1, 1, N, Dk]``.
        key: ``[1, 1, N, Dk]``.
        value: ``[1, 1, N, Dv]``.
        positions: that dot-product attention is computed for.
        report: called before each of the three measurements, and after the last, with the number of
            those that are done.

    Returns:
        Efficient attention; fused dot-product attention, measured and computed; the same of the
        explicit one. Where all positions could be measured nothing is computed.
    """

    def chosen(count: int) -> list[Tensor]:
        stride = -(-query.shape[2] // count)
        return [x[:, :, ::stride].contiguous() for x in (query, key, value)]

    whole, few, fewer = (query, key, value), chosen(FUSED_POSITIONS), chosen(EXPLICIT_POSITIONS)
    report(0, "efficient attention")
    efficient = measure("efficient attention", query.shape[2], lambda: efficient_attention(*whole))
    report(1, "dot-product attention, fused")
    fused = measure("dot-product, fused", few[0].shape[2], lambda: dot_product_attention(*few))
    report(2, "dot-product attention, N x N")
    explicit = measure("dot-product, N x N", fewer[0].shape[2], lambda: _explicit(*fewer))
    report(3, "")
    rows = [
        efficient,
        fused,
        fused.at(positions, memory_power=1),
        explicit,
        explicit.at(positions, memory_power=2),
    ]
    return list(dict.fromkeys(rows))


def table(costs: Sequence[Cost]) -> str:
    """Costs as aligned text.

    Example:
        >>> print(table([Cost("fused", 4096, 2**29, 0.25)]))
                                      pixels   memory (GiB)    time (s)
        fused                          4,096           0.50        0.25  measured
    """
    lines = [f"{'':<24}{'pixels':>12}{'memory (GiB)':>15}{'time (s)':>12}"]
    for cost in costs:
        memory, seconds = _two_digits(cost.bytes / 2**30), _two_digits(cost.seconds)
        how = "measured" if cost.measured else "computed"
        lines.append(f"{cost.name:<24}{cost.positions:>12,}{memory:>15}{seconds:>12}  {how}")
    return "\n".join(lines)


def in_words(cost: Cost) -> str:
    """Time and memory of a cost in the units that suit them.

    Example:
        >>> in_words(Cost("explicit", 12_000_000, 2**50, 2e6))
        '23 days,  1.0 PiB'
    """
    return f"{_in_units(cost.seconds, _SECONDS)},  {_in_units(cost.bytes, _BYTES)}"


def _explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dot-product attention as the equation says it, the N x N map in memory. Paper: Sec. 3.1."""
    return (query @ key.mT).softmax(-1) @ value


def _in_units(x: float, units: Sequence[tuple[str, float]]) -> str:
    """``x``, given in the first of the units, in the last that does not exceed it."""
    unit, size = [units[0], *(u for u in units[1:] if u[1] <= x)][-1]
    return f"{_two_digits(x / size)} {unit}"


def _two_digits(x: float) -> str:
    """At least two digits that count, and all of those before the point."""
    decimals = 0
    while decimals < 6 and x * 10**decimals < 9.95:
        decimals += 1
    return f"{x:,.{decimals}f}"
