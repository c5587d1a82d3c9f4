"""Whether data keeps up: seconds for which training waits for a batch, beside those of a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ..errors import InputError
from ..training.command import Command
from .provenance import describe, text_hash, write_record
from .spread import PERCENTILES, percentiles
from .tables import markdown

__all__ = ["measure_loading"]


def measure_loading(
    recipe: str | Path,
    arguments: Sequence[str] = (),
    *,
    workers: Sequence[int] = (0, 1),
    batches: int = 40,
    warm_up: int = 20,
    output: str | Path = "benchmarks/results/loading",
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train by a recipe for some steps with each number of workers, and record how long each step waits for its batch.

    Without workers the training process loads, and what it waits is what a batch costs; that of CPU time is comparable
    on a busy machine, too. If it is less than a step, one worker that has a core keeps up.

    Args:
        recipe: its file.
        arguments: over it, as on the command line.
        workers: numbers of them to try.
        batches: that are measured.
        warm_up: batches before them, at least one: workers start, data sets fill what they keep.
        output: folder of the record, ``<name of the recipe>.json``.
        report: called with each line of progress, and with the table.

    Returns:
        The path of the record: for each number of workers the 20th, 50th and 80th percentile of the seconds, and of the
        training process's CPU seconds, in which a step waited and in which it was taken.

    Raises:
        InputError: a recipe that cannot be used, or that has fewer batches.

    Not part of the paper.
    """
    recipe = Path(recipe)
    measured: dict[str, Any] = {}
    for count in workers:
        measured[str(count)] = _measure(recipe, arguments, count, batches, warm_up)
        report(f"{count} workers: done")
    record = {
        "name": recipe.stem,
        "recipe": str(recipe),
        "recipe_sha256": text_hash(recipe.read_text()),
        "arguments": list(arguments),
        "batches": batches,
        "warm_up": warm_up,
        "workers": measured,
        "provenance": describe(),
    }
    path = Path(output) / f"{recipe.stem}.json"
    write_record(path, record)
    report(f"{loading_table(record)}\n\n{path}")
    return path


def loading_table(record: dict[str, Any]) -> str:
    """A row for each number of workers: medians of what a step waits and takes.

    Args:
        record: of :func:`measure_loading`.

    Not part of the paper.
    """
    headings = [
        record["name"],
        "pictures or pairs",
        "waiting, s",
        "step, s",
        "waiting, CPU s",
        "step, CPU s",
    ]
    keys = ("wait_seconds", "step_seconds", "wait_cpu_seconds", "step_cpu_seconds")
    middle = PERCENTILES.index(50)
    rows = [
        [
            f"{count} workers",
            str(found["batch_size"]),
            *(f"{found[key][middle]:.3g}" for key in keys),
        ]
        for count, found in record["workers"].items()
    ]
    return markdown(headings, rows)


class _Clock(Callback):
    """Notes when steps begin and end, in seconds and in CPU seconds of this process."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[float, float], tuple[float, float]]] = []
        self._begin = (0.0, 0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = _now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append((self._begin, _now()))


class _Timed(Command):
    """The command ``fit`` with a clock."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.clock = _Clock()
        trainer.callbacks.append(self.clock)  # type: ignore[attr-defined]
        return trainer


def _measure(
    recipe: Path, arguments: Sequence[str], workers: int, batches: int, warm_up: int
) -> dict[str, Any]:
    steps = batches + warm_up
    with TemporaryDirectory() as folder, _without_remarks():
        command = _Timed(
            "fit",
            [
                *("--config", str(recipe), *arguments, "--output", folder),
                *("--data.workers", str(workers), "--data.val", "null"),
                *("--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"),
                *("--trainer.logger", "false", "--trainer.enable_model_summary", "false"),
            ],
        )
    clock: Sequence[Any] = command.clock.steps
    if len(clock) < steps:
        raise InputError(
            f"batches must be fewer than what {recipe} trains on, {len(clock)}; got {steps}, warm-up included"
        )
    pairs = list(zip(clock[warm_up - 1 :], clock[warm_up:], strict=False))
    waits = [(_minus(here[0], before[1])) for before, here in pairs]
    taken = [_minus(end, begin) for _, (begin, end) in pairs]
    return {
        "batch_size": command.datamodule.batch_size,
        "wait_seconds": percentiles(wait[0] for wait in waits),
        "step_seconds": percentiles(step[0] for step in taken),
        "wait_cpu_seconds": percentiles(wait[1] for wait in waits),
        "step_cpu_seconds": percentiles(step[1] for step in taken),
    }


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Without what Lightning says of devices, and of its makers."""
    names = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _minus(end: tuple[float, float], begin: tuple[float, float]) -> tuple[float, float]:
    return end[0] - begin[0], end[1] - begin[1]
