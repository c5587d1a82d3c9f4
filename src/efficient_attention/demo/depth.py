"""Depth in a pair of photographs that the network of this package never saw, and what its attention attends to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import read_image
from ..errors import InputError
from ..metrics.stereo import StereoMetrics, StereoScores
from ..modules import EfficientAttention3d
from ..prediction import load_network, predict_disparity
from ..visualize import Panel, draw_panels, overlay, template_maps
from .conditions import one_thread, telling_of, writable_folder
from .costs import Cost, in_words, measure
from .photo import bundled_photo

__all__ = ["run"]

# Of the Middlebury 2014 benchmark; ships in scikit-image.
PAIR = "motorcycle"
TEMPLATES = 4
# Errors from here on look alike in the picture, in pixels.
LARGE_ERROR = 5


class Pair(NamedTuple):
    """Two rectified views of a scene and what is known of it.

    Attributes:
        left: ``[3, H, W]`` in [0, 1].
        right: as ``left``.
        disparity: ``[H, W]`` in pixels, NaN where it is not known.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor


class Attended(NamedTuple):
    """What the attention in a stereo network saw and did.

    Attributes:
        positions: of the volume, which attend to each other.
        maps: ``[dk, h, w]``, the template maps summed over disparities.
        shares: ``[dk]``, how much the queries of a head ask for each of its templates.
        cost: of the attention alone.
    """

    positions: int
    maps: Tensor
    shares: Tensor
    cost: Cost


def run(
    *,
    output: str | Path = "out",
    network: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Predict the disparities of a real scene, measure the error, draw them beside the truth.

    Args:
        output: folder for the picture; made if it is missing.
        network: a folder that ``save_pretrained`` wrote, of a PSMNet with attention on its volume; default: the one
            that ships with the package.
        report: called with each part of the results.

    Returns:
        The path of the picture, ``depth.png`` in ``output``.

    Raises:
        InputError: an argument cannot be used; the message names it.
        ImportError: the extra ``efficient-attention[models,plot]`` is not installed.

    Example:
        >>> run(output=folder).name
        'depth.png'

    Paper: Shen et al. 2021, Sec. 4 (EA-PSMNet) and 3.4.
    """
    seer = load_network("stereo", network)
    attention = _attention(seer, network)
    pair = bundled_pair()
    folder = writable_folder(output)
    height, width = pair.disparity.shape
    report(f"pair       {PAIR} (Middlebury 2014): {width} x {height} pixels")
    parameters = sum(parameter.numel() for parameter in seer.parameters())
    report(f"network    {parameters:,} parameters, trained on generated scenes alone")
    with one_thread():
        start = time.perf_counter()
        disparity = predict_disparity(seer, pair.left, pair.right)
        seconds = time.perf_counter() - start
        report(_told(_scores(disparity, pair), seconds))
        attended = _attended(seer, attention, pair)
    report(_told_of_attention(attended))
    path = folder / "depth.png"
    with telling_of(output):
        draw_panels(
            path,
            [_pictures(disparity, pair), _templates(attended, pair)],
            heading=f"Disparities of a scene, as each of {attended.positions:,} positions of the cost volume "
            "attends to all",
        )
    report(f"picture    {path}")
    return path


def bundled_pair() -> Pair:
    """A motorcycle in a workshop, half a metre to three metres away.

    Raises:
        ImportError: scikit-image is not installed.
    """
    left, right, disparity = (
        bundled_photo(f"{PAIR}_{part}") for part in ("left.png", "right.png", "disp.npz")
    )
    with np.load(disparity) as file:
        (name,) = file.files
        known = torch.from_numpy(file[name].astype(np.float32))
    return Pair(read_image(left), read_image(right), known)


def _scores(disparity: Tensor, pair: Pair) -> StereoScores:
    metrics = StereoMetrics(max_disparity=None)
    truth = pair.disparity
    metrics.update(disparity[None], truth[None], truth.isfinite()[None])
    return metrics.compute()


def _told(scores: StereoScores, seconds: float) -> str:
    return (
        f"result     end-point error {scores.end_point_error:.2f} px, {scores.bad_3:.1f}% off by more than 3 px "
        f"({scores.protocol}), in {seconds:.1f} s"
    )


def _told_of_attention(attended: Attended) -> str:
    every = Cost("", attended.positions, 4.0 * attended.positions**2, 0.0)
    return (
        f"attention  {attended.positions:,} positions attend to all in {in_words(attended.cost)}; "
        f"one float32 map of them all would take {every.bytes / 2**40:,.1f} TiB"
    )


def _attention(network: Any, origin: object) -> EfficientAttention3d:
    """The attention on the volume of a network."""
    for module in network.volume.modules():
        if isinstance(module, EfficientAttention3d):
            return module
    raise InputError(f"network must have attention on its volume; {origin} has none")


def _attended(network: Any, attention: EfficientAttention3d, pair: Pair) -> Attended:
    """What the attention on the volume does with a pair."""
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        predict_disparity(network, pair.left, pair.right)
    finally:
        hook.remove()
    (volume,) = seen  # [1, C, D / 4, H / 4, W / 4]
    with torch.inference_mode():
        maps = template_maps(attention, volume)[0]  # [dk, D / 4, H / 4, W / 4]
        queries = attention.queries(volume)[0].unflatten(0, (attention.num_heads, -1))
        shares = queries.softmax(1).mean((2, 3, 4)).flatten()  # [dk]
        cost = measure("efficient", volume[0, 0].numel(), lambda: attention(volume))
    return Attended(volume[0, 0].numel(), maps.sum(1), shares, cost)


def _pictures(disparity: Tensor, pair: Pair) -> list[Panel]:
    truth = pair.disparity
    known = truth.isfinite()
    error = (disparity - truth).abs().where(known, 0).clamp(max=LARGE_ERROR)
    # Side by side, so that one colour means one disparity.
    painted = overlay(torch.cat([disparity, truth.where(known, 0)], dim=1), quantile=0.995)
    ours, theirs = painted.chunk(2, dim=1)
    return [
        Panel(pair.left.permute(1, 2, 0), "Left of two views"),
        Panel(ours, "Disparity, predicted"),
        Panel(theirs, "Disparity, measured"),
        Panel(overlay(error, quantile=1.0), f"Error; brightest: {LARGE_ERROR} px or more"),
    ]


def _templates(attended: Attended, pair: Pair) -> list[Panel]:
    """Maps of the templates that queries ask for most."""
    height, width = pair.disparity.shape
    # The network pads at the top and at the right.
    rows, columns = -(-height // 4), -(-width // 4)
    maps = attended.maps[:, -rows:, :columns]
    most = attended.shares.argsort(descending=True)[:TEMPLATES].tolist()
    return [
        Panel(overlay(maps[t], pair.left), f"Template {i}: {attended.shares[t]:.0%} of queries")
        for i, t in enumerate(most, start=1)
    ]
