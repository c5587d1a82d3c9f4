"""What surgery says that it did."""

from __future__ import annotations

from typing import NamedTuple

from .hosts import CHILD


class Change(NamedTuple):
    """What was done at one place; see :class:`Report`."""

    name: str
    what: str
    dimensions: int | str
    channels: int
    parameters: int
    outputs: str


class Report(NamedTuple):
    """What :func:`insert`, :func:`replace` or :func:`remove` did, which is not in the paper; ``print`` shows a table.

    Args:
        changes: for each place its ``name``, ``what`` was done, ``dimensions`` (1, 2, 3, ``"tokens"`` or
            ``"channels_last"``), ``channels``, ``parameters`` added (negative: taken away), and what the model's
            ``outputs`` are now: ``"unchanged"`` bit for bit, ``"exact"`` up to rounding, ``"approximate"``,
            ``"changed"``, or ``"restored"``.
        new_keys: what the model's state_dict has gained.
        removed_keys: what it has lost.
        notes: what else was changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = efficient_attention.insert(model, "0", example=torch.randn(1, 3, 16, 16))
        >>> report.changes[0].parameters, report.new_keys[0]
        (216, '0.inserted_attention.keys.weight')
    """

    changes: tuple[Change, ...]
    new_keys: tuple[str, ...] = ()
    removed_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [Change._fields, *(tuple(map(str, change)) for change in self.changes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for text, keys in (("new", self.new_keys), ("removed", self.removed_keys)):
            owners = dict.fromkeys(f"{key.rpartition(CHILD)[0]}{CHILD}.*" for key in keys)
            lines += [f"{len(keys)} {text} state_dict keys: {', '.join(owners)}"] if keys else []
        return "\n".join([*lines, *self.notes])
