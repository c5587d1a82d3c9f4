"""Records of speed as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import replacing
from .entries import OURS
from .tables import median

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_speed"]

_STYLES = {"default": "-", "warm": "--"}
_SIZE = (4.2, 3.4)  # inches, of a panel


def draw_speed(record: Mapping[str, Any], path: Path) -> None:
    """Draw how many times as long as ours everybody takes over the number of positions, as SVG.

    A panel for each mode, dtype and number of heads; solid with the default allocator, dashed with warm memory. Ours is
    the line at 1: above it ours is faster.

    Args:
        record: of :func:`~efficient_attention.benchmark.speed.sweep.measure_speed`.
        path: of the picture; its folder is made.

    Raises:
        ImportError: matplotlib is not installed.

    Not part of the paper.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for case in record["cases"]:
        heads = f"{case['heads']} head{'s' if case['heads'] > 1 else ''}"
        panels.setdefault(f"{case['mode']}, {case['dtype']}, {heads}", []).append(case)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    # The same picture of the same record, and letters that stay letters.
    with mpl.rc_context({"svg.hashsalt": record["name"], "svg.fonttype": "none"}):
        figure = Figure((columns * _SIZE[0], rows * _SIZE[1] + 0.4), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (title, cases) in zip(grid, panels.items(), strict=False):
            _draw(axes, title, cases, list(record["entries"]))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        lines = {str(h.get_label()): h for axes in figure.axes for h in axes.get_lines()}
        shown = {label: h for label, h in lines.items() if not label.startswith("_")}
        figure.legend(
            list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def _draw(axes: Axes, title: str, cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    axes.axhline(1, color="black", linewidth=1)
    # A copy is so far below that it would flatten all others.
    for index, name in enumerate(n for n in names if n not in (OURS, "copy")):
        for allocator, style in _STYLES.items():
            points = sorted(
                (case["positions"], times)
                for case in cases
                if case["allocator"] == allocator
                and (times := median(case["entries"].get(name, {}))) is not None
            )
            if points:
                label = name if allocator == "default" else f"_{name}"
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{index}", marker=".", label=label
                )
    axes.set(xscale="log", yscale="log", title=title, xlabel="positions", ylabel="times of ours")
    axes.grid(visible=True, alpha=0.3)
