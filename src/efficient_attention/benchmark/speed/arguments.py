"""What ``advise`` and the subjects of ``bench`` about speed take and call: light, so that help comes at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from .timing import Effort

__all__ = ["ADVICE", "RESULTS", "SUBJECTS", "add_advice", "run_advice"]

Report = Callable[[str], None]
Integer = Callable[[int], Callable]

RESULTS = "benchmarks/results/speed"
ADVICE = "tell on this machine from which length efficient attention pays, and what to do"
_MODES = ("forward", "backward", "training")
_DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda")


def _add_operator(parser: argparse.ArgumentParser, integer: Integer) -> None:
    _add_integers(parser, integer, "positions", [256, 4096, 65536], "N that attend to each other")
    _add_integers(parser, integer, "heads", [8], "heads")
    _add_integers(parser, integer, "key-channels", [64], "of one head")
    _add_integers(
        parser, integer, "value-channels", None, "of one head (default: the key channels)"
    )
    _add_what(parser, integer)
    _add_effort(parser, integer)


def _operator(report: Report, options: argparse.Namespace) -> None:
    from .problems import Operator
    from .sweep import measure_speed

    problems = [
        Operator(
            positions=n,
            heads=heads,
            key_channels=dk,
            value_channels=dv or dk,
            **_common(options, m, t),
        )
        for m, t, heads, dk, dv, n in product(
            options.modes,
            options.dtypes,
            options.heads,
            options.key_channels,
            options.value_channels or [None],
            sorted(options.positions),
        )
    ]
    _check_device(options.device)
    measure_speed(
        problems,
        effort=_effort(options),
        among=options.peers,
        threads=options.threads,
        output=options.output,
        report=report,
    )


def _add_module(parser: argparse.ArgumentParser, integer: Integer) -> None:
    parser.add_argument(
        "--maps",
        nargs="+",
        type=_map,
        default=[(32, 32), (64, 64), (128, 128)],
        metavar="HxW",
        help="feature maps; one number for a square (default: 32 64 128)",
    )
    _add_integers(parser, integer, "heads", [8], "heads")
    _add_integers(parser, integer, "channels", [256], "of the map")
    _add_integers(
        parser, integer, "key-channels", None, "of all heads (default: half of the map's)"
    )
    _add_integers(
        parser, integer, "value-channels", None, "of all heads (default: the key channels)"
    )
    _add_what(parser, integer)
    _add_effort(parser, integer)


def _module(report: Report, options: argparse.Namespace) -> None:
    from .problems import Module
    from .sweep import measure_speed

    problems = []
    for m, t, heads, c, dk, dv, (height, width) in product(
        options.modes,
        options.dtypes,
        options.heads,
        options.channels,
        options.key_channels or [None],
        options.value_channels or [None],
        sorted(options.maps, key=lambda sides: sides[0] * sides[1]),
    ):
        keys = dk or max(1, c // 2)
        values = dv or keys
        _check_heads(heads, keys, values)
        problems.append(
            Module(
                height=height,
                width=width,
                heads=heads,
                channels=c,
                key_channels=keys,
                value_channels=values,
                **_common(options, m, t),
            )
        )
    _check_device(options.device)
    measure_speed(
        problems,
        effort=_effort(options),
        among=options.peers,
        threads=options.threads,
        output=options.output,
        report=report,
    )


def _add_orders(parser: argparse.ArgumentParser, integer: Integer) -> None:
    parser.add_argument(
        "--allocators",
        nargs="+",
        choices=("default", "warm"),
        default=["default"],
        help="settings of the C library's allocator (default: default)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--mode", choices=_MODES, default="forward", help="default: %(default)s")
    parser.add_argument("--device", choices=_DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--every", type=integer(1), default=1, metavar="N", help="only each Nth shape of the grid"
    )
    _add_effort(parser, integer)


def _orders(report: Report, options: argparse.Namespace) -> None:
    from dataclasses import replace

    from .orders import GRID, measure_orders

    _check_device(options.device)
    measure_orders(
        [
            replace(problem, dtype=options.dtype, mode=options.mode, device=options.device)
            for problem in GRID[:: options.every]
        ],
        effort=_effort(options),
        allocators=options.allocators,
        threads=options.threads,
        output=options.output,
        report=report,
    )


def _add_document(parser: argparse.ArgumentParser, _: Integer) -> None:
    parser.add_argument("document", metavar="FILE", help="such as docs/speed.md")


def _document(report: Report, options: argparse.Namespace) -> None:
    from .document import fill

    try:
        fill(options.document, report=report)
    except ModuleNotFoundError as error:
        message = f"curves need {error.name}: pip install 'efficient-attention[plot]'"
        raise ImportError(message) from error


#: Of ``bench``: a name, what adds arguments, what runs, a summary, and the folder for the record if there is one.
SUBJECTS = (
    (
        "operator",
        _add_operator,
        _operator,
        "time the operator, and count its memory, beside everything else that computes it",
        RESULTS,
    ),
    (
        "module",
        _add_module,
        _module,
        "time the module over feature maps, and count its memory, beside the paper authors' and others",
        RESULTS,
    ),
    (
        "orders",
        _add_orders,
        _orders,
        "hold the planner's choice of an order against the time of every order",
        RESULTS,
    ),
    (
        "document",
        _add_document,
        _document,
        "put tables and curves of records into a document that names them",
        None,
    ),
)


def add_advice(parser: argparse.ArgumentParser, integer: Integer) -> None:
    """Add the arguments of ``advise``.

    Args:
        parser: of the command.
        integer: makes the type of an argument that is an integer from a smallest one.

    Not part of the paper.
    """
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--positions", type=integer(1), metavar="N", help="that attend to each other: the operator"
    )
    where.add_argument("--map", type=_map, metavar="HxW", help="a feature map: the module")
    parser.add_argument(
        "--heads", type=integer(1), default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--channels",
        type=integer(1),
        metavar="N",
        help="of one head (default: 64); of the map (default: 256), with half of them in keys and values",
    )
    parser.add_argument(
        "--value-channels", type=integer(1), metavar="N", help="if others than keys'"
    )
    parser.add_argument("--batch", type=integer(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--mode", choices=_MODES, default="forward", help="default: %(default)s")
    parser.add_argument("--device", choices=_DEVICES, default="cpu", help="default: %(default)s")
    _add_threads(parser, integer)


def run_advice(options: argparse.Namespace, *, report: Report) -> None:
    """Measure and advise.

    Args:
        options: of the command line.
        report: called with each line.

    Not part of the paper.
    """
    from .advice import advise
    from .problems import Module, Operator

    common = {"batch": options.batch, "heads": options.heads, "dtype": options.dtype}
    common |= {"mode": options.mode, "device": options.device}
    if options.map is None:
        channels = options.channels or 64
        values = options.value_channels or channels
        problem: Operator | Module = Operator(
            positions=options.positions, key_channels=channels, value_channels=values, **common
        )
    else:
        channels = options.channels or 256
        keys = max(1, channels // 2)
        values = options.value_channels or keys
        _check_heads(options.heads, keys, values)
        height, width = options.map
        problem = Module(
            height=height,
            width=width,
            channels=channels,
            key_channels=keys,
            value_channels=values,
            **common,
        )
    _check_device(options.device)
    advise(problem, threads=options.threads, report=report)


def _add_integers(
    parser: argparse.ArgumentParser, integer: Integer, name: str, default: list | None, what: str
) -> None:
    shown = "" if default is None else f" (default: {' '.join(map(str, default))})"
    parser.add_argument(
        f"--{name}", nargs="+", type=integer(1), default=default, metavar="N", help=what + shown
    )


def _add_what(parser: argparse.ArgumentParser, integer: Integer) -> None:
    parser.add_argument("--batch", type=integer(1), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=["float32"], help="default: float32"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=_MODES,
        default=["forward", "training"],
        help="training is forward and backward (default: forward training)",
    )
    parser.add_argument("--device", choices=_DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="entries beside ours (default: all)"
    )


def _add_effort(parser: argparse.ArgumentParser, integer: Integer) -> None:
    parser.add_argument(
        "--rounds", type=integer(1), default=5, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--budget",
        type=integer(0),
        default=1,
        metavar="SECONDS",
        help="of one call of what is quadratic; beyond, its time is computed (default: %(default)s)",
    )
    _add_threads(parser, integer)


def _add_threads(parser: argparse.ArgumentParser, integer: Integer) -> None:
    parser.add_argument(
        "--threads",
        type=integer(1),
        metavar="N",
        help="of an operator on a CPU (default: PyTorch's)",
    )


def _effort(options: argparse.Namespace) -> Effort:
    from .timing import Effort

    return Effort(rounds=options.rounds, budget=options.budget)


def _common(options: argparse.Namespace, mode: str, dtype: str) -> dict:
    return {"mode": mode, "dtype": dtype, "batch": options.batch, "device": options.device}


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be one that is here; got 'cuda', and PyTorch sees no GPU")


def _check_heads(heads: int, key_channels: int, value_channels: int) -> None:
    if key_channels % heads or value_channels % heads:
        raise InputError(
            f"heads must divide key and value channels, {key_channels} and {value_channels}; got {heads}"
        )


def _map(text: str) -> tuple[int, int]:
    """Rows and columns; one number for both."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be HxW or a number; got {text!r}")
    return int(found[1]), int(found[2] or found[1])
