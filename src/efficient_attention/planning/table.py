"""A plan as text that fits a terminal: a line for each place, and below it one for each kind of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .kinds import KINDS
from .units import in_bytes, in_counts

if TYPE_CHECKING:
    from .result import Cost, Plan, PlannedPlace

_HEADINGS = ("", "parameters", "multiply-adds", "inference", "training")
_VERDICTS = {"training": "yes", "inference": "inference only", "nothing": "no"}


def table(plan: Plan) -> str:
    """The lines of a plan, aligned."""
    headings = _HEADINGS if plan.budget is None else (*_HEADINGS, f"fits {in_bytes(plan.budget)}")
    rows: list[tuple[str, ...]] = [headings, ("plain model", *_cells(plan, plan.plain))]
    for place in plan.places:
        rows.append((_heading(place),))
        rows += [(f"  {KINDS[kind]}", *_cells(plan, cost)) for kind, cost in place.costs.items()]
    whole = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join([_line(row, widths) for row in rows] + ["", *plan.notes])


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Names and verdicts to the left, numbers to the right."""
    if len(row) == 1:
        return row[0]
    name, *numbers = row
    cells = [name.ljust(widths[0])]
    cells += [n.rjust(w) for n, w in zip(numbers[:4], widths[1:5], strict=True)]
    return "  ".join([*cells, *numbers[4:]]).rstrip()


def _heading(place: PlannedPlace) -> str:
    calls = f", {place.calls} calls" if place.calls > 1 else ""
    shape = " x ".join(map(str, place.shape))
    return f"{place.name}: {shape}, {place.positions:,} positions of {place.channels:,} channels{calls}"


def _cells(plan: Plan, cost: Cost) -> tuple[str, ...]:
    training = "?" if cost.training is None else in_bytes(cost.training)
    numbers = (in_counts(cost.parameters), in_counts(cost.multiply_adds), in_bytes(cost.inference))
    verdict = () if plan.budget is None else (_VERDICTS[plan.fits(cost)],)
    return (*numbers, training, *verdict)
