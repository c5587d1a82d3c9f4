"""Records of speed as tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ...errors import InputError
from ...planning.units import in_bytes
from ..spread import PERCENTILES
from ..tables import markdown
from .entries import OURS

__all__ = ["median", "over_table", "speed_tables"]

_MIDDLE = PERCENTILES.index(50)
# What cases of one table have in common.
_SHARED = ("mode", "dtype", "batch", "heads", "channels", "key_channels", "value_channels")


def speed_tables(record: Mapping[str, Any]) -> str:
    """For each mode, dtype and channels a table of times and one of memory; below all, what was not measured and why.

    Args:
        record: of :func:`~efficient_attention.benchmark.speed.sweep.measure_speed`.

    Not part of the paper.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for case in record["cases"]:
        groups.setdefault(tuple(case.get(key) for key in _SHARED), []).append(case)
    parts = []
    for cases in groups.values():
        names = _names(record["entries"], cases)
        parts += [f"**{_title(cases[0])}**", _times(cases, names), _memory(cases, names)]
    return "\n\n".join([*parts, *_remarks(record)])


def over_table(record: Mapping[str, Any], base: str) -> str:
    """How many times as long as one of the entries all others take: a row for each problem, memory left out.

    Args:
        record: of :func:`~efficient_attention.benchmark.speed.sweep.measure_speed`.
        base: the entry.

    Returns:
        A table with a column for each other entry but the floors, and a figure for each setting of the allocator: the
        quotient of the medians over the rounds of both as shares of ours.

    Raises:
        InputError: the record has no such entry.

    Not part of the paper.
    """
    if base not in record["entries"]:
        raise InputError(
            f"a record must have the entry {base}; it has {', '.join(record['entries'])}"
        )
    problems: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for case in record["cases"]:
        key = (*(case.get(key) for key in _SHARED), case["positions"], _where(case))
        problems.setdefault(key, {})[case["allocator"]] = case
    names = [
        name
        for name in _names(record["entries"], record["cases"])
        if name != base and record["entries"][name].get("formula") != "floor"
    ]
    settings = list(dict.fromkeys(case["allocator"] for case in record["cases"]))
    several = {key for key in _SHARED if len({case.get(key) for case in record["cases"]}) > 1}
    first = "map" if record["name"] == "module" else "positions"
    rows = [
        [
            ", ".join([_where(case := next(iter(cases.values()))), *_apart(case, several)]),
            *(
                " / ".join(_over(cases.get(each), name, base) for each in settings)
                for name in names
            ),
        ]
        for cases in problems.values()
    ]
    return markdown([f"{first}; times of {base}, {' / '.join(settings)}", *names], rows)


def _apart(case: Mapping[str, Any], several: Collection[str]) -> list[str]:
    """What tells a problem from others, in words."""
    words = [str(case[key]) for key in ("mode", "dtype") if key in several]
    counted = [key for key in _SHARED if key in several and key not in ("mode", "dtype")]
    return words + [_counted(case[key], key.replace("_", " ")) for key in counted]


def _counted(count: int, plural: str) -> str:
    return f"{count} {plural.removesuffix('s') if count == 1 else plural}"


def _over(case: Mapping[str, Any] | None, name: str, base: str) -> str:
    entries = {} if case is None else case["entries"]
    times, of_base = median(entries.get(name, {})), median(entries.get(base, {}))
    if times is None or of_base is None:
        return ""
    computed = any(entries[each].get("computed") for each in (name, base))
    return f"{'≈ ' if computed else ''}{_two_decimals(times / of_base)}"


def median(row: Mapping[str, Any]) -> float | None:
    """Of how many times as long as ours an entry takes, or ``None`` if it was not measured."""
    return row["times_ours"][_MIDDLE] if "times_ours" in row else None


def _names(entries: Iterable[str], cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of those that some case has measured."""
    return [
        n
        for n in entries
        if any("reason" not in case["entries"].get(n, {"reason": ""}) for case in cases)
    ]


def _title(case: Mapping[str, Any]) -> str:
    channels = f"{case['key_channels']} key and {case['value_channels']} value channels"
    if case["subject"] == "module":
        channels = f"{case['channels']} channels, {channels}"
    else:
        channels += " each"
    heads = _counted(case["heads"], "heads")
    batch = "" if case["batch"] == 1 else f", batch of {case['batch']}"
    return f"{case['mode'].capitalize()}, {case['dtype']}, {heads}, {channels}{batch}"


def _where(case: Mapping[str, Any]) -> str:
    if case["subject"] == "module":
        return f"{case['height']} x {case['width']}"
    return f"{case['positions']:,}"


def _times(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    on_gpu = cases[0]["device"] != "cpu"
    peers = [name for name in names if name != OURS]
    first = "map" if cases[0]["subject"] == "module" else "positions"
    headings = [f"{first}; times of ours", "ours, µs" if on_gpu else "allocator", *peers]
    rows = [
        [
            _where(case),
            _microseconds(case["entries"][OURS])
            if on_gpu
            else case["allocator"] + ("*" if case["disturbed"] else ""),
            *(_times_cell(case["entries"].get(name, {})) for name in peers),
        ]
        # The settings of one size under each other.
        for case in sorted(cases, key=lambda case: case["positions"])
    ]
    return markdown(headings, rows)


def _microseconds(row: Mapping[str, Any]) -> str:
    return f"{row['microseconds'][_MIDDLE]:,.0f}" if "microseconds" in row else ""


def _times_cell(row: Mapping[str, Any]) -> str:
    times = median(row)
    if times is None:
        return ""
    return f"{'≈ ' if row.get('computed') else ''}{_two_decimals(times)}"


def _two_decimals(times: float) -> str:
    """Two, or as many as there are digits that count: three."""
    return f"{times:,.{2 if times < 10 else 1 if times < 100 else 0}f}"


def _memory(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Of one setting, as it is the same in all."""
    module = cases[0]["subject"] == "module"
    held = [n for n in names if any("bytes" in case["entries"].get(n, {}) for case in cases)]
    rows = []
    for case in sorted(cases, key=lambda case: case["positions"]):
        if case["allocator"] == cases[0]["allocator"]:
            cells = [case["entries"].get(name, {}).get("bytes") for name in held]
            rows.append(
                [
                    _where(case),
                    *(_bytes_cell(b, case["input_bytes"] if module else None) for b in cells),
                ]
            )
    first = "map; memory in maps" if module else "positions; memory"
    return markdown([first, *held], rows)


def _bytes_cell(count: int | None, unit: int | None) -> str:
    if count is None:
        return ""
    return in_bytes(count) if unit is None else f"{count / unit:.2f}"


def _remarks(record: Mapping[str, Any]) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for case in record["cases"]:
        for name, row in case["entries"].items():
            if "reason" in row:
                reasons[name, row["reason"]] = reasons.get((name, row["reason"]), 0) + 1
    total = len(record["cases"])
    lines = [
        f"- {name}, in {'all' if count == total else f'{count} of {total}'} cases: {reason}"
        for (name, reason), count in reasons.items()
    ]
    if any(case["disturbed"] for case in record["cases"]):
        lines.append("- \\* other processes took more than a tenth of the processors")
    return ["Not measured:\n" + "\n".join(lines)] if lines else []
