"""What fits: peaks of PSMNet with each kind of attention for views that grow, planned and, within a limit, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import modules
from ..memory import device_bytes, peak_bytes
from ..models import create_model
from ..planning import plan
from ..planning.kinds import KINDS, build
from ..planning.units import in_bytes, in_counts, parse_bytes
from .provenance import describe, write_record
from .tables import markdown

__all__ = ["VIEWS", "capacity_table", "measure_capacity"]

#: Rows and columns of the views, and disparities. PSMNet is trained on the last but one, and tested on the last.
VIEWS = ((64, 128, 32), (128, 256, 64), (256, 512, 64), (256, 512, 192), (544, 960, 192))
_PLACE = "volume"
_NAMES = {"none": "none", **KINDS}
# Multiply-adds of attention that is run: a minute or two of one core.
_MOST_WORK = 10**12
_BYTES = 4


def measure_capacity(
    *,
    limit: str = "2 GiB",
    views: Sequence[tuple[int, int, int]] = VIEWS,
    network: str = "psmnet",
    output: str | Path = "benchmarks/results/experiments",
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Plan and measure peaks of PSMNet with attention over its cost volume, for views that grow, and record them.

    The kinds are those of a plan: efficient; dot-product with its N x N map in memory; dot-product fused. Peaks are of
    the whole network, one pair of views in float32: parameters, inputs, all that lives between; in training with
    gradients and two numbers of the optimizer for each parameter.

    Args:
        limit: inference that is not planned to need more is run and measured, unless attention takes more than 10^12
            multiply-adds.
        views: ``(rows, columns, disparities)`` of each size.
        network: ``"psmnet"``, or one that has its place ``volume``.
        output: folder of the record, ``capacity.json``.
        report: called with each line of progress, and with the table.

    Returns:
        The path of the record.

    Raises:
        ValueError: a limit that is no size.

    Paper: Shen et al. 2021, Sec. 4: PSMNet with a non-local module runs out of memory.
    """
    bytes_limit = parse_bytes("limit", limit)
    sizes = []
    for view in views:
        sizes.append(_at(network, view, bytes_limit))
        report(f"{_in_words(view)}: done")
    record = {
        "name": "capacity",
        "question": "Does efficient attention fit where a non-local module does not?",
        "network": network,
        "limit": bytes_limit,
        "machine_bytes": device_bytes(torch.device("cpu")),
        "views": sizes,
        "provenance": describe(),
    }
    path = Path(output) / "capacity.json"
    write_record(path, record)
    report(f"{record['question']}\n\n{capacity_table(record)}\n\n{path}")
    return path


def capacity_table(record: Mapping[str, Any]) -> str:
    """A row for each size and kind: multiply-adds and peaks; below, what was said instead of building a map.

    Args:
        record: of :func:`measure_capacity`.

    Not part of the paper.
    """
    headings = [
        "views, disparities",
        "attention",
        "multiply-adds",
        "inference",
        "measured",
        "training",
    ]
    rows = []
    for size in record["views"]:
        where = f"{_in_words(size['view'])}: {size['positions']:,} positions"
        for kind, cost in size["kinds"].items():
            rows.append([where if kind == "none" else "", _NAMES[kind], *_cells(cost)])
    said = [f"{_in_words(s['view'])}: {s['refusal']}" for s in record["views"] if s["refusal"]]
    return "\n".join([markdown(headings, rows), "", *said])


def _cells(cost: Mapping[str, Any]) -> list[str]:
    measured = "" if cost["measured"] is None else in_bytes(cost["measured"])
    work, inference, training = (cost[key] for key in ("multiply_adds", "inference", "training"))
    return [in_counts(work), in_bytes(inference), measured, in_bytes(training)]


def _at(name: str, view: tuple[int, int, int], limit: int) -> dict[str, Any]:
    rows, columns, disparities = view
    network = create_model(name, "none", max_disparity=disparities).eval()
    shape = (1, 3, rows, columns)
    # Shapes are all that a plan needs.
    absent = torch.empty(shape, device="meta")
    planned = plan(network.to("meta"), (absent, absent), places=_PLACE, device="cpu")
    (place,) = planned.places
    found = {}
    for kind, cost in (("none", planned.plain), *place.costs.items()):
        work = 0 if kind == "none" else cost.multiply_adds
        possible = cost.inference <= limit and work <= _MOST_WORK
        found[kind] = {
            "multiply_adds": cost.multiply_adds,
            "inference": cost.inference,
            "training": cost.training,
            "measured": _measured(name, disparities, kind, shape) if possible else None,
        }
    return {
        "view": list(view),
        "positions": place.positions,
        "kinds": found,
        "refusal": _refusal(place.shape, place.positions),
    }


def _measured(name: str, disparities: int, kind: str, shape: tuple[int, ...]) -> int:
    """The peak of a real pass, with parameters, buffers and views as a plan counts them."""
    network = create_model(name, "none", max_disparity=disparities).eval()
    if kind != "none":
        place = network.places[_PLACE]
        options = {"device": "cpu", "dtype": torch.float32}
        attention = build(kind, place.dimensions, place.channels, options)
        assert attention is not None
        network.set_submodule(place.module, nn.Sequential(attention))
    left, right = torch.randn(shape), torch.randn(shape)
    held: list[Tensor] = [left, right, *network.parameters(), *network.buffers()]
    with torch.inference_mode():
        peak = peak_bytes(lambda: network(left, right))
    return peak + sum(tensor.nbytes for tensor in held)


def _refusal(shape: tuple[int, ...], positions: int) -> str | None:
    """What a non-local module says whose map this machine has no room for; smaller ones are not tried."""
    there = device_bytes(torch.device("cpu"))
    if there is None or positions**2 * _BYTES <= there:
        return None
    module = modules.NonLocal3d(shape[1], normalization="scaling")
    try:
        with torch.inference_mode():
            module(torch.randn(shape))
    except MemoryError as error:
        return str(error)
    raise AssertionError("a map that is larger than the machine must be refused")


def _in_words(view: Sequence[int]) -> str:
    rows, columns, disparities = view
    return f"{rows} x {columns}, {disparities}"
