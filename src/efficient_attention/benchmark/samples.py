"""What the samples of a recipe's training data cost, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..training.command import Command
from .provenance import describe, text_hash, write_record
from .spread import percentiles

__all__ = ["measure_samples"]


def measure_samples(
    recipe: str | Path,
    arguments: Sequence[str] = (),
    *,
    samples: int = 200,
    warm_up: int = 50,
    output: str | Path = "benchmarks/results/samples",
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make samples of the training data of a recipe in this process, and record what CPU time they take.

    Args:
        recipe: its file.
        arguments: over it, as on the command line.
        samples: that are measured.
        warm_up: samples before them, whose time is recorded apart: data sets fill what they keep, such as textures.
        output: folder of the record, named for the class of the data set.
        report: called with the results in a line.

    Returns:
        The path of the record: the 20th, 50th and 80th percentile of the CPU seconds of a sample, samples in a CPU
        second on average, and the CPU seconds of the warm-up.

    Raises:
        InputError: a recipe that cannot be used, or whose data set has fewer samples.

    Not part of the paper.
    """
    recipe = Path(recipe)
    command = _Built("fit", ["--config", str(recipe), *arguments])
    command.datamodule.setup("fit")
    dataset = command.datamodule.dataset("train")
    if len(dataset) < warm_up + samples:
        raise InputError(
            f"samples must be at most {len(dataset)}, which {recipe} has, warm-up included; got {warm_up + samples}"
        )
    seconds = []
    for index in range(warm_up + samples):
        begin = time.process_time()
        dataset[index]
        seconds.append(time.process_time() - begin)
    record: dict[str, Any] = {
        "name": type(dataset).__name__,
        "recipe": str(recipe),
        "recipe_sha256": text_hash(recipe.read_text()),
        "arguments": list(arguments),
        "samples": samples,
        "warm_up": warm_up,
        "warm_up_cpu_seconds": round(sum(seconds[:warm_up]), 3),
        "sample_cpu_seconds": percentiles(seconds[warm_up:]),
        "samples_per_cpu_second": round(samples / sum(seconds[warm_up:]), 2),
        "provenance": describe(),
    }
    path = Path(output) / f"{record['name']}.json"
    write_record(path, record)
    report(
        f"{record['name']}: {record['samples_per_cpu_second']} samples in a CPU second\n\n{path}"
    )
    return path


class _Built(Command):
    """The command ``fit``, up to where it would train."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass
