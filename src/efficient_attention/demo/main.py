"""Fit one efficient attention to a photograph, run it over all pixels, measure and draw it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..memory import peak_bytes
from ..modules import attend_tiles
from ..progress import Progress
from ..visualize import Facts, Panel, attention_map, draw_panels, overlay, template_maps
from .conditions import one_thread, telling_of, writable_folder
from .costs import Cost, compare, in_words, table
from .model import Bands, PhotoAttention, fit
from .photo import bundled_photo, pixels_of, read_photo, shrink, to_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["rebuild", "run"]

# NASA's portrait of Eileen Collins, in the public domain; ships in scikit-image.
PHOTO = "astronaut.png"
PHOTO_PIXEL = (152, 400)  # x, y: the blue of the mission patch, which flag and glove have too

TEMPLATES = 12
THUMBNAIL_PIXELS = 64 * 64
# Maps are drawn, and the operator alone is measured, at this size at most: they hold all positions
# in memory. The attention itself runs at full resolution, whatever that is, in bands.
VIEW_PIXELS = 1 << 19


def run(
    image: str | Path | None = None,
    *,
    output: str | Path = "out",
    pixel: tuple[int, int] | None = None,
    steps: int = 400,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fit, attend at full resolution, measure, draw; progress goes to standard error.

    Args:
        image: an image file; default: a portrait of an astronaut that ships in scikit-image.
        output: folder for the picture; made if it is missing.
        pixel: ``(x, y)`` from the top left, whose attention map is drawn; default: the middle.
        steps: of the fit.
        seed: of the fit.
        report: called with each part of the results.

    Returns:
        The path of the picture, ``demo.png`` in ``output``.

    Raises:
        InputError: an argument cannot be used; the message names it.
        ImportError: the extra ``efficient-attention[plot]`` is not installed.

    Example:
        >>> run(bundled_photo("microaneurysms.png"), output=folder, steps=2).name
        'demo.png'

    Paper: Shen et al. 2021, Sec. 3.2 to 3.4.
    """
    with one_thread():
        return _run(image, output, pixel, steps, seed, report)


def _run(
    image: str | Path | None,
    output: str | Path,
    pixel: tuple[int, int] | None,
    steps: int,
    seed: int,
    report: Callable[[str], None],
) -> Path:
    photo = read_photo(bundled_photo(PHOTO) if image is None else image)
    if pixel is None:
        pixel = PHOTO_PIXEL if image is None else (photo.width // 2, photo.height // 2)
    _check_pixel(pixel, photo)
    folder = writable_folder(output)
    count = photo.width * photo.height
    name = f"{PHOTO} (NASA, public domain)" if image is None else Path(image).name
    report(f"photo    {name}: {photo.width} x {photo.height} = {count:,} pixels")

    thumbnail = pixels_of(shrink(photo, THUMBNAIL_PIXELS))
    model = PhotoAttention(thumbnail, templates=TEMPLATES, seed=seed)
    report(_fit(model, thumbnail, steps))

    with torch.no_grad():
        rebuilt, end_to_end = _measured_rebuild(model, photo)
        view = shrink(photo, VIEW_PIXELS)
        features = model.features(pixels_of(view))
        progress = Progress("measuring", 3)
        query_key_value = _project(model, features)
        efficient, *dot_product = compare(*query_key_value, positions=count, report=progress.show)
        costs = [efficient, end_to_end, *dot_product]
        report(f"\n{table(costs)}\n\n{_explain(model, costs)}\n")

        mark = (pixel[1] * view.height // photo.height, pixel[0] * view.width // photo.width)
        pictures = _pictures(model, view, features, shrink(rebuilt, VIEW_PIXELS), mark)
        templates = _templates(model, view, features)
    # Beside the pictures of a panorama there is no room for figures.
    facts = [_facts(costs, count)] if view.width < 2.5 * view.height else []
    half = TEMPLATES // 2
    path = folder / "demo.png"
    with telling_of(output):
        draw_panels(
            path,
            [[*pictures, *facts], templates[:half], templates[half:]],
            heading=f"Each of {count:,} pixels attends to all {count:,}, "
            f"through {TEMPLATES} templates",
        )
    report(f"picture  {path}")
    return path


def rebuild(model: PhotoAttention, photo: Image) -> Image:
    """The photograph as attention over all of its pixels rebuilds it, in the memory of one band.

    The contexts of bands of rows merge into that of the whole: the bands leave no trace.
    """
    rebuilt = photo.copy()
    top = 0
    for band in attend_tiles(model.attention, Bands(model, photo)):
        rebuilt.paste(to_image(model.colours(band)), (0, top))
        top += band.shape[2]
    return rebuilt


def _fit(model: PhotoAttention, thumbnail: Tensor, steps: int) -> str:
    progress = Progress("fitting", steps)

    def show(step: int, error: float) -> None:
        progress.show(step, f"error {error:.3f}")

    start = time.perf_counter()
    errors = fit(model, thumbnail, steps, report=show)
    seconds = time.perf_counter() - start
    height, width = thumbnail.shape[2:]
    return (
        f"fit      {TEMPLATES} templates on {width} x {height} pixels, {steps} steps in "
        f"{seconds:.1f} s: unexplained variance {errors[0]:.0%} -> {errors[-1]:.0%}"
    )


def _measured_rebuild(model: PhotoAttention, photo: Image) -> tuple[Image, Cost]:
    start = time.perf_counter()
    rebuilt = rebuild(model, photo)
    seconds = time.perf_counter() - start
    # Bands come one after another: two of them have the peak of all.
    two = photo.crop((0, 0, photo.width, min(photo.height, 2 * Bands(model, photo).rows)))
    memory = peak_bytes(lambda: rebuild(model, two))
    return rebuilt, Cost("efficient, end to end", photo.width * photo.height, memory, seconds)


def _project(model: PhotoAttention, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the fitted attention, ``[1, 1, N, channels]`` each."""

    def project(projection: torch.nn.Module) -> Tensor:
        return projection(features).flatten(2).mT.unsqueeze(1).contiguous()

    attention = model.attention
    return project(attention.queries), project(attention.keys), project(attention.values)


def _explain(model: PhotoAttention, costs: list[Cost]) -> str:
    attention = model.attention
    text = (
        f"On one CPU thread, in float32, {attention.key_channels} key and "
        f"{attention.value_channels} value channels; memory is that of tensors, without inputs.\n"
        "End to end: from photo to photo, with features, projections and colours, in bands of rows."
    )
    if not all(cost.measured for cost in costs):
        text += (
            "\nComputed, from the row above: time by the square of the pixels; memory by the "
            "square for N x N,\nlinearly for fused, which never holds the map but computes it all."
        )
    return text


def _pictures(
    model: PhotoAttention, view: Image, features: Tensor, rebuilt: Image, mark: tuple[int, int]
) -> list[Panel]:
    photo = pixels_of(view)[0]  # [3, H, W]
    attended = attention_map(model.attention, features, mark)[0, 0]  # [H, W]
    rebuilt_pixels = pixels_of(rebuilt)[0].permute(1, 2, 0)
    return [
        Panel(photo.permute(1, 2, 0), "The photo, and one of its pixels", mark),
        Panel(overlay(attended, photo), "What that pixel attends to", mark),
        Panel(rebuilt_pixels, f"Rebuilt from {TEMPLATES} context vectors"),
    ]


def _templates(model: PhotoAttention, view: Image, features: Tensor) -> list[Panel]:
    """The template maps, the one that queries ask for most first."""
    photo = pixels_of(view)[0]  # [3, H, W]
    maps = template_maps(model.attention, features)[0]  # [T, H, W]
    shares = model.attention.queries(features).softmax(1).mean((0, 2, 3))  # [T]
    return [
        Panel(overlay(maps[t], photo), f"Template {i}: {shares[t]:.0%} of queries")
        for i, t in enumerate(shares.argsort(descending=True).tolist(), start=1)
    ]


def _facts(costs: list[Cost], count: int) -> Facts:
    """Every way to attend, over all pixels."""
    lines = [
        (in_words(cost), f"{cost.name} ({'measured' if cost.measured else 'computed'})")
        for cost in costs
        if cost.positions == count
    ]
    return Facts("What that takes, on one CPU thread", lines)


def _check_pixel(pixel: tuple[int, int], photo: Image) -> None:
    x, y = pixel
    if not (0 <= x < photo.width and 0 <= y < photo.height):
        raise InputError(
            f"pixel must be X from 0 to {photo.width - 1} and Y from 0 to {photo.height - 1}; "
            f"got {x} {y}"
        )
