"""Pictures of attention maps, by matplotlib, without a display and without its global state."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Facts", "Panel", "draw_maps", "draw_panels", "overlay"]

# Layout of a drawing, in pixels.
_WIDTH = 1600
_GAP = 12
_CAPTION = 34
_HEADING = 64
_DOTS_PER_INCH = 100
_TALLEST = 2  # times the width that a row gives to each of its panels


class Panel(NamedTuple):
    """A picture in a drawing.

    Attributes:
        picture: ``[H, W, 3]`` in [0, 1].
        caption: stands above it.
        mark: ``(row, column)`` of a pixel to ring, or ``None``.
    """

    picture: Tensor
    caption: str = ""
    mark: tuple[int, int] | None = None


class Facts(NamedTuple):
    """Figures in words, in the place of a picture in a drawing.

    Attributes:
        caption: stands above them.
        lines: pairs of a figure, written large, and what it is, written small below it.
    """

    caption: str
    lines: Sequence[tuple[str, str]]


def overlay(heat: Tensor, image: Tensor | None = None, *, quantile: float = 0.99) -> Tensor:
    """Paint a map as heat over a dimmed gray image: from nothing over purple to yellow.

    Args:
        heat: ``[h, w]``, non-negative; resized to the image if it has another size.
        image: ``[3, H, W]`` in [0, 1]; ``None``: the map alone.
        quantile: of the map's values, drawn as the most; a few extreme positions would darken the
            rest.

    Returns:
        ``[H, W, 3]`` in [0, 1], as :class:`Panel` takes it.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> overlay(torch.rand(14, 14), torch.rand(3, 224, 224)).shape
        torch.Size([224, 224, 3])
    """
    _require_matplotlib()
    from matplotlib import colormaps

    heat = heat.detach().float().cpu()
    if image is not None and heat.shape != image.shape[1:]:
        heat = F.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
    ranked = heat.flatten().sort().values
    most = ranked[int(quantile * (ranked.numel() - 1))].clamp(min=torch.finfo(heat.dtype).tiny)
    strength = (heat / most).clamp(0, 1)
    colours = torch.from_numpy(colormaps["inferno"](strength.numpy())[..., :3]).float()
    if image is None:
        return colours
    gray = image.detach().float().cpu().mean(0)[..., None].expand_as(colours)
    strength = strength.unsqueeze(-1)
    return 0.35 * gray * (1 - strength) + colours * (0.25 + 0.75 * strength)


def draw_maps(
    path: str | Path,
    maps: Tensor,
    image: Tensor | None = None,
    *,
    captions: Sequence[str] | None = None,
    columns: int = 4,
    heading: str = "",
) -> None:
    """Write attention maps as one picture, each a heat map over the image.

    Args:
        path: of the PNG; replaced only when the picture is complete.
        maps: ``[K, h, w]``, or ``[K, L]`` for sequences, drawn as strips.
        image: ``[3, H, W]`` in [0, 1], what the maps lie over; of any size.
        captions: K of them; default: the number of each map, from 1.
        columns: maps in a row.
        heading: stands above all.

    Raises:
        ValueError: shapes or counts do not fit.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(64, key_channels=8)
        >>> maps = efficient_attention.visualize.template_maps(attention, torch.randn(1, 64, 9, 16))
        >>> draw_maps(Path(folder, "templates.png"), maps[0])

    Paper: Shen et al. 2021, Sec. 3.4.
    """
    if maps.dim() == 2:
        maps = maps.unsqueeze(1).expand(-1, math.ceil(maps.shape[1] / 16), -1)
    if maps.dim() != 3 or 0 in maps.shape:
        raise ValueError(
            "maps must have shape [K, h, w] or [K, L]: of one sample, and of a volume one slice; "
            f"got {tuple(maps.shape)}"
        )
    if image is not None and (image.dim() != 3 or image.shape[0] != 3):
        raise ValueError(f"image must have shape [3, H, W]; got {tuple(image.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be positive; got {columns}")
    captions = [str(i + 1) for i in range(len(maps))] if captions is None else captions
    if len(captions) != len(maps):
        raise ValueError(f"captions must be {len(maps)}, one for each map; got {len(captions)}")
    panels = [
        Panel(overlay(heat, image), caption) for heat, caption in zip(maps, captions, strict=True)
    ]
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    draw_panels(path, rows, heading=heading)


def draw_panels(
    path: str | Path, rows: Sequence[Sequence[Panel | Facts]], *, heading: str = ""
) -> None:
    """Write rows of pictures as one PNG, 1600 pixels wide.

    Every row fills the width, but for a last one that is shorter than the one above it.

    Args:
        path: of the PNG; replaced only when the picture is complete.
        rows: in every row at least one picture, and all pictures of one shape.
        heading: stands above all.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> panels = [Panel(torch.rand(20, 30, 3), "noise"), Facts("its size", [("600", "pixels")])]
        >>> draw_panels(Path(folder, "noise.png"), [panels])
    """
    figure = _lay_out(rows, heading)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=_DOTS_PER_INCH)
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _lay_out(rows: Sequence[Sequence[Panel | Facts]], heading: str) -> Figure:
    """Place every panel by the pixel, so that nothing is cropped, whatever the shapes."""
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = _panel_sizes(rows)
    top: float = _HEADING if heading else _GAP
    total = top + sum(height + _CAPTION + _GAP for _, height in sizes)
    figure = Figure(figsize=(_WIDTH / _DOTS_PER_INCH, total / _DOTS_PER_INCH), facecolor="white")
    FigureCanvasAgg(figure)
    if heading:
        y = 1 - _HEADING / 2 / total
        figure.text(_GAP / _WIDTH, y, heading, fontsize=19, weight="bold", va="center")
    for row, (share, height) in zip(rows, sizes, strict=True):
        bottom = total - top - _CAPTION - height
        for i, panel in enumerate(row):
            left = _GAP + i * (share + _GAP)
            width = min(share, height * _aspect(panel)) if isinstance(panel, Panel) else share
            # Not the title of the axes: matplotlib would lay out their ticks to place it.
            above = (bottom + height + _GAP) / total
            figure.text(
                left / _WIDTH, above, panel.caption, fontsize=15 if share > _WIDTH / 5 else 12
            )
            axes = figure.add_axes((left / _WIDTH, bottom / total, width / _WIDTH, height / total))
            axes.set_axis_off()
            if isinstance(panel, Panel):
                _draw_picture(axes, panel)
            else:
                _write_facts(axes, panel)
        top += height + _CAPTION + _GAP
    return figure


def _panel_sizes(rows: Sequence[Sequence[Panel | Facts]]) -> list[tuple[float, float]]:
    """The share of the width that each panel of a row has, and the row's height, in pixels."""
    counts = [len(row) for row in rows]
    if len(counts) > 1:
        counts[-1] = max(counts[-2:])  # what is left over is no larger than the rest
    sizes = []
    for row, count in zip(rows, counts, strict=True):
        share = (_WIDTH - _GAP * (count + 1)) / count
        height = share / min(_aspect(panel) for panel in row if isinstance(panel, Panel))
        sizes.append((share, min(max(height, _CAPTION), _TALLEST * share)))
    return sizes


def _aspect(panel: Panel) -> float:
    """Width by height."""
    return panel.picture.shape[1] / panel.picture.shape[0]


def _draw_picture(axes: Axes, panel: Panel) -> None:
    axes.imshow(panel.picture.numpy(), aspect="auto", interpolation="lanczos")
    if panel.mark is not None:
        row, column = panel.mark
        for colour, line in (("black", 5.0), ("white", 2.5)):
            axes.plot(column, row, "o", mfc="none", ms=13, mec=colour, mew=line)


def _write_facts(axes: Axes, facts: Facts) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(len(facts.lines), 0)
    for i, (figure, meaning) in enumerate(facts.lines):
        axes.text(0, i + 0.42, figure, fontsize=21, weight="bold", va="baseline")
        axes.text(0, i + 0.64, meaning, fontsize=12.5, va="baseline", color="0.3")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib: pip install 'efficient-attention[plot]'"
        ) from error
