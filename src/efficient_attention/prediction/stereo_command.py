"""The command ``stereo``: pairs of pictures to disparities, depths and points in space."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..data.disparity_files import read_disparity, read_pfm, write_disparity_png, write_pfm
from ..errors import InputError
from ..files import replacing
from ..metrics.stereo import StereoMetrics, StereoScores
from .calibration import Calibration, check_calibration, read_calibration
from .depth import FARTHEST_IN_PNG, depth_of, points_of, write_depth_png, write_ply
from .disparities import predict_disparity, scaled_size
from .disparity_picture import draw_disparity
from .forward import DTYPES, check_memory, find_device, pictures_like
from .journal import Journal
from .networks import digest, load_network
from .pictures import picture_size, read_picture
from .sources import TRUTHS, find_files, short_names
from .work import Item, Made, output_folder, work_through

__all__ = ["run"]

# What a disparity in 16 bits can be at most, in pixels.
_MOST_IN_PNG = 65535 / 256


class _Pair(NamedTuple):
    left: Path
    right: Path
    truth: Path | None
    size: tuple[int, int]  # height, width


def run(options: argparse.Namespace, report: Callable[[str], None]) -> list[str]:
    """Predict pairs.

    Args:
        options: as the command line has them.
        report: is given each line of results.

    Returns:
        Why pairs failed, one by one.

    Raises:
        InputError: what can be known to be wrong before the first pair is predicted; or the only pair.
        ImportError: an extra is not installed.
    """
    pairs = _find_pairs(options)
    calibration = _calibration(options, pairs)
    folder = output_folder(options.output, [p for pair in pairs.values() for p in pair[:2]])
    network = load_network(
        "stereo",
        options.network,
        model=options.model,
        weights=options.weights,
        prefix=options.prefix,
        options=options.options,
    ).to(find_device(options.device))
    dtype = DTYPES[options.dtype]
    _check_memory(network, {pair.size for pair in pairs.values()}, options.scale, dtype)

    def make(item: Item) -> Made:
        pair = pairs[item.name]
        left, right = (read_picture(view, upright=False) for view in (pair.left, pair.right))
        try:
            disparity = predict_disparity(network, left, right, scale=options.scale, dtype=dtype)
        except ValueError as error:
            raise InputError(f"'{pair.left}' and '{pair.right}': {error}") from error
        return _write(folder / item.name, left, disparity, calibration)

    settings = {
        "version": __version__,
        "network": digest(network),
        "scale": options.scale,
        "dtype": options.dtype,
        "calibration": calibration,
    }
    outcome = work_through(
        [Item(name, pair[:2]) for name, pair in pairs.items()],
        make,
        Journal(folder / "stereo.jsonl", settings),
        title="stereo",
        overwrite=options.overwrite,
        report=lambda name, result: report(f"{name}  {result}"),
    )
    if options.truth is not None:
        done = {name: pair for name, pair in pairs.items() if name in outcome.results}
        _evaluate(done, folder, options.truth_scale, report)
    report(outcome.summary("pairs", folder))
    return list(outcome.failures.values())


def _find_pairs(options: argparse.Namespace) -> dict[str, _Pair]:
    lefts, rights = find_files(options.left), find_files(options.right)
    truths: Sequence[Path | None] = [None] * len(lefts)
    if options.truth is not None:
        truths = find_files(options.truth, TRUTHS)
    elif options.truth_scale is not None:
        raise InputError("--truth-scale must come with --truth; got it without")
    for name, found in (("RIGHT", rights), ("--truth", truths)):
        if len(found) != len(lefts):
            raise InputError(
                f"{name} must be as many files as LEFT, {len(lefts)}; got {len(found)} ('{found[0]}' ...)"
            )
    pairs = {}
    for name, left, right, truth in zip(short_names(lefts), lefts, rights, truths, strict=True):
        size, other = (picture_size(view, upright=False) for view in (left, right))
        if size != other:
            raise InputError(
                f"views of a pair must have one size; got '{left}' of {size[1]} x {size[0]} and "
                f"'{right}' of {other[1]} x {other[0]}"
            )
        pairs[name] = _Pair(left, right, truth, size)
        if truth is not None:
            # Whether it can be used shows before hours of work.
            _read_truth(pairs[name], options.truth_scale)
    return pairs


def _read_truth(pair: _Pair, scale: float | None) -> tuple[Tensor, Tensor]:
    """The true disparity of a pair ``[1, H, W]``, and where it is known."""
    assert pair.truth is not None
    try:
        truth = read_disparity(pair.truth, scale=scale)
    except (OSError, ValueError) as error:
        raise InputError(f"--truth must be a true disparity; {error}") from error
    if tuple(truth.shape) != pair.size:
        raise InputError(
            f"--truth must have the size of its views; got '{pair.truth}' of {truth.shape[1]} x {truth.shape[0]} "
            f"for {pair.size[1]} x {pair.size[0]}"
        )
    valid = truth.isfinite() & (truth > 0)
    if not valid.any():
        raise InputError(f"--truth must have known pixels; got '{pair.truth}' with none")
    return truth.where(valid, 0)[None], valid[None]


def _calibration(options: argparse.Namespace, pairs: dict[str, _Pair]) -> Calibration | None:
    given = {name: getattr(options, name) for name in ("focal", "baseline", "doffs", "cx", "cy")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.calibration is not None:
        if given:
            raise InputError(
                f"geometry must be given by --calibration or by numbers; got both, --{next(iter(given))} among them"
            )
        calibration = read_calibration(options.calibration)
    elif not given:
        return None
    elif not {"focal", "baseline"} <= given.keys():
        raise InputError(
            f"depth needs both --focal and --baseline; got {', '.join(f'--{name}' for name in given)}"
        )
    else:
        calibration = Calibration(**given)
        check_calibration(calibration, "--focal and --baseline")
    for pair in pairs.values():
        height, width = pair.size
        known = (calibration.width or width, calibration.height or height)
        if known != (width, height):
            raise InputError(
                f"--calibration must be of the size of the views; got one of {known[0]} x {known[1]} for "
                f"'{pair.left}' of {width} x {height}"
            )
    return calibration


def _check_memory(
    network: Any, sizes: set[tuple[int, int]], scale: float, dtype: torch.dtype
) -> None:
    # What fits the largest fits all.
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    seen = scaled_size((height, width), scale)

    def way_out(share: float) -> str:
        # Memory goes with the square; rounded down to a twentieth.
        smaller = max(0.05, int(20 * scale * share**0.5) / 20)
        bfloat16 = " or --dtype bfloat16" if dtype == torch.float32 and share > 0.5 else ""
        return f"--scale {smaller:g}{bfloat16}"

    check_memory(
        network,
        pictures_like(seen, seen),
        dtype=dtype,
        device=next(network.parameters()).device,
        what=f"a pair of {width} x {height} pixels" + (f" at scale {scale:g}" * (scale != 1)),
        way_out=way_out,
    )


def _write(base: Path, left: Tensor, disparity: Tensor, calibration: Calibration | None) -> Made:
    """Write all files of a pair, and say what is in them."""
    beside = partial(_beside, base)
    outputs = [beside("_disparity.pfm"), beside("_colours.png")]
    write_pfm(outputs[0], disparity)
    with replacing(outputs[1]) as file:
        draw_disparity(disparity).save(file, format="PNG")
    height, width = disparity.shape
    low, high = float(disparity.min()), float(disparity.max())
    said = f"{width} x {height}, disparities {low:.1f} to {high:.1f} px"
    if high <= _MOST_IN_PNG:
        outputs.append(beside("_disparity.png"))
        write_disparity_png(outputs[-1], disparity, torch.ones_like(disparity, dtype=torch.bool))
    else:
        said += f" (no _disparity.png, which holds {_MOST_IN_PNG:.2f} px at most)"
    if calibration is not None:
        depth = depth_of(disparity, calibration)
        points, known = points_of(depth, calibration)
        outputs += [beside("_depth.pfm"), beside("_depth.png"), beside("_points.ply")]
        write_pfm(outputs[-3], depth)
        saturated = write_depth_png(outputs[-2], depth)
        write_ply(outputs[-1], points, left.movedim(0, 2)[known])
        said += _about_depth(depth[known], saturated)
    return Made(outputs, said)


def _about_depth(known: Tensor, saturated: int) -> str:
    if not len(known):
        return ", no depth known"
    said = f", depths {float(known.min()):.2f} to {float(known.max()):.2f} m"
    if saturated:
        said += (
            f" ({saturated / len(known):.1%} beyond {FARTHEST_IN_PNG} m, the most in _depth.png)"
        )
    return said


def _beside(base: Path, ending: str) -> Path:
    return base.with_name(base.name + ending)


def _evaluate(
    pairs: dict[str, _Pair], folder: Path, truth_scale: float | None, report: Callable[[str], None]
) -> None:
    """Tell the errors of each pair and of all, of the disparities on disk."""
    total = StereoMetrics(max_disparity=None)
    for name, pair in pairs.items():
        disparity = read_pfm(_beside(folder / name, "_disparity.pfm"))
        metrics = StereoMetrics(max_disparity=None)
        metrics.update(disparity[None], *_read_truth(pair, truth_scale))
        report(f"{name}  {_in_words(metrics.compute())}")
        total = total.merge(metrics)
    if pairs:
        scores = total.compute()
        if len(pairs) > 1:
            report(f"all {len(pairs)}  {_in_words(scores)}")
        report(f"errors over {scores.pixels:,} pixels: {scores.protocol}")


def _in_words(scores: StereoScores) -> str:
    rates = ", ".join(
        f"bad-{n} {rate:.2f} %"
        for n, rate in enumerate((scores.bad_1, scores.bad_2, scores.bad_3), 1)
    )
    return f"end-point error {scores.end_point_error:.3f} px, {rates}"
