"""Records as tables in Markdown, as the documentation has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["comparison_table", "markdown"]

# The deviation of one seed.
_UNKNOWN = "?"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right.

    Example:
        >>> print(markdown(["what", "how much"], [["a", "1"]]))
        | what | how much |
        |---|--:|
        | a | 1 |

    Not part of the paper.
    """
    rule = "|---|" + "--:|" * (len(headings) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def comparison_table(record: Mapping[str, Any]) -> str:
    """What a comparison has found: for every variant its score, and what it is above or below the baseline's.

    Args:
        record: of :func:`~efficient_attention.benchmark.comparison.compare`.

    Returns:
        A row for each variant: mean and standard deviation of the score over the seeds, the score of every seed, the
        same of the paired differences to the baseline, and mean CPU seconds of training.

    Not part of the paper.
    """
    headings = [
        record["name"],
        f"{record['score']} ({record['better']} is better)",
        "by seed",
        f"minus {record['baseline']}",
        "by seed",
        "CPU s",
    ]
    return markdown(headings, [_row(name, each) for name, each in record["variants"].items()])


def _row(name: str, variant: Mapping[str, Any]) -> list[str]:
    seconds = [run["fit"]["cpu_seconds"] for run in variant["runs"]]
    return [
        name,
        *_cells(variant["score"], ""),
        *_cells(variant["minus_baseline"], "+"),
        f"{sum(seconds) / len(seconds):.0f}",
    ]


def _cells(spread: Mapping[str, Any] | None, sign: str) -> list[str]:
    """Mean and deviation, and the values of the seeds; nothing for the baseline's distance from itself."""
    if spread is None:
        return ["", ""]
    deviation = spread["deviation"]
    form = f"{sign}.{_decimals(deviation)}f"
    around = _UNKNOWN if deviation is None else f"{deviation:{form.removeprefix('+')}}"
    values = [f"{value:{form}}" for value in spread["by_seed"].values()]
    return [f"{spread['mean']:{form}} ± {around}", ", ".join(values)]


def _decimals(deviation: float | None) -> int:
    """So many that the deviation has two digits that count, as more of a mean says nothing; two where it is unknown."""
    if not deviation:
        return 2
    return max(0, 1 - math.floor(math.log10(deviation)))
