"""What ``efficient-attention bench SUBJECT`` takes and calls: light, so that help and errors come at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..errors import InputError
from .speed.arguments import SUBJECTS

__all__ = ["add_subjects"]

Report = Callable[[str], None]
_EXPERIMENTS = "benchmarks/results/experiments"


def add_subjects(
    bench: argparse.ArgumentParser, *, integer: Callable[[int], Callable], report: Report
) -> None:
    """Add the subjects to the parser of ``bench``; each sets ``run``, to be called with the options, and ``command``.

    Args:
        bench: the parser.
        integer: makes the type of an argument that is an integer from a smallest one.
        report: takes each line of results.

    Not part of the paper.
    """
    subjects = bench.add_subparsers(title="subjects", metavar="SUBJECT", required=True)
    for name, add, run, summary, output in (
        (
            "experiment",
            _add_experiment,
            _experiment,
            "train variants of a recipe under several seeds, and compare them",
            _EXPERIMENTS,
        ),
        (
            "capacity",
            _add_capacity,
            _capacity,
            "plan and measure what PSMNet needs with each kind of attention, for views that grow",
            _EXPERIMENTS,
        ),
        (
            "loading",
            _add_loading,
            _loading,
            "tell for how long a step of training waits for its batch",
            "benchmarks/results/loading",
        ),
        (
            "samples",
            _add_samples,
            _samples,
            "tell what a sample of training data costs",
            "benchmarks/results/samples",
        ),
        (
            "predict",
            _add_nothing,
            _predict,
            "compile the kernels for GPUs that are not at hand, and predict their times",
            "benchmarks/results/predictions",
        ),
        *SUBJECTS,
    ):
        parser = subjects.add_parser(name, help=summary, description=summary.capitalize() + ".")
        parser.set_defaults(run=partial(run, report), command=f"bench {name}")
        add(parser, integer)
        if output is not None:
            parser.add_argument(
                "--output",
                default=output,
                metavar="DIR",
                help="folder for the record (default: %(default)s)",
            )


def _add_experiment(parser: argparse.ArgumentParser, integer: Callable[[int], Callable]) -> None:
    parser.add_argument("file", metavar="FILE", help="such as recipes/experiments/insertion.yaml")
    parser.add_argument(
        "--seeds", nargs="+", type=integer(0), metavar="N", help="default: those of the file"
    )
    parser.add_argument(
        "--runs",
        default="runs/experiments",
        metavar="DIR",
        help="folder of the runs, which go on where they were (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs", type=integer(1), default=1, metavar="N", help="runs at a time (default: 1)"
    )


def _experiment(report: Report, options: argparse.Namespace) -> None:
    with _training_installed():
        from .comparison import compare
    compare(
        options.file,
        seeds=options.seeds,
        output=options.output,
        runs=options.runs,
        jobs=options.jobs,
        report=report,
    )


def _add_capacity(parser: argparse.ArgumentParser, _: Callable[[int], Callable]) -> None:
    parser.add_argument(
        "--limit",
        default="2 GiB",
        metavar="SIZE",
        help="measure what needs no more (default: %(default)s)",
    )


def _capacity(report: Report, options: argparse.Namespace) -> None:
    from ..planning.units import parse_bytes
    from .capacity import measure_capacity

    try:
        parse_bytes("limit", options.limit)
    except ValueError as error:
        raise InputError(str(error)) from error
    measure_capacity(limit=options.limit, output=options.output, report=report)


def _add_loading(parser: argparse.ArgumentParser, integer: Callable[[int], Callable]) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--workers",
        nargs="+",
        type=integer(0),
        default=[0, 1],
        metavar="N",
        help="processes that load (default: 0 1)",
    )
    _add_counts(parser, integer, "batches", measured=40, warm_up=20)


def _loading(report: Report, options: argparse.Namespace) -> None:
    with _training_installed():
        from .loading import measure_loading
    measure_loading(
        options.recipe,
        options.arguments,
        workers=options.workers,
        batches=options.batches,
        warm_up=options.warm_up,
        output=options.output,
        report=report,
    )


def _add_samples(parser: argparse.ArgumentParser, integer: Callable[[int], Callable]) -> None:
    _add_recipe(parser)
    _add_counts(parser, integer, "samples", measured=200, warm_up=50)


def _samples(report: Report, options: argparse.Namespace) -> None:
    with _training_installed():
        from .samples import measure_samples
    measure_samples(
        options.recipe,
        options.arguments,
        samples=options.samples,
        warm_up=options.warm_up,
        output=options.output,
        report=report,
    )


def _add_nothing(parser: argparse.ArgumentParser, integer: Callable[[int], Callable]) -> None: ...


def _predict(report: Report, options: argparse.Namespace) -> None:
    try:
        from .prediction import predict_kernels
    except ModuleNotFoundError as error:
        raise ImportError(f"it needs {error.name}, which comes with torch for CUDA") from error
    predict_kernels(output=options.output, report=report)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    # What the parser does not know is the recipe's.
    parser.set_defaults(arguments=())
    parser.add_argument(
        "recipe", metavar="RECIPE", help="its file; behind it, what is to be other than there"
    )


def _add_counts(
    parser: argparse.ArgumentParser,
    integer: Callable[[int], Callable],
    what: str,
    *,
    measured: int,
    warm_up: int,
) -> None:
    for name, default, when in ((what, measured, "measured"), ("warm-up", warm_up, "before them")):
        parser.add_argument(
            f"--{name}",
            type=integer(1),
            default=default,
            metavar="N",
            help=f"{what} {when} (default: %(default)s)",
        )


@contextmanager
def _training_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"it needs {error.name}: pip install 'efficient-attention[train]'"
        raise ImportError(message) from error
