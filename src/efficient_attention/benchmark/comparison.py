"""An experiment from its file to its record: every variant under every seed, and what their scores say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..errors import InputError
from .experiment import Experiment, read_experiment
from .provenance import describe, text_hash, write_record
from .runs import Run
from .spread import differences, spread
from .tables import comparison_table

__all__ = ["compare"]


def compare(
    file: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    output: str | Path = "benchmarks/results/experiments",
    runs: str | Path = "runs/experiments",
    jobs: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train and test every variant of an experiment under every seed, as far as that is not done, and record it.

    What an earlier call has trained is not trained again, and a run that was killed goes on from its last checkpoint.
    Runs are processes of their own, which take the number of threads from the environment.

    Args:
        file: see :func:`~efficient_attention.benchmark.experiment.read_experiment`.
        seeds: instead of those of the file.
        output: folder of the record, ``<name of the experiment>.json``.
        runs: folder of the runs, which experiments share.
        jobs: runs at a time.
        report: called with each line of progress, and with the table.

    Returns:
        The path of the record. It is written when all runs are done, and has each run's scores and seconds.

    Raises:
        InputError: a file that cannot be used, a run that fails, a score that ``test`` does not give or that is not
            finite.

    Paper: Shen et al. 2021, Sec. 4, compares variants so, by single runs.
    """
    experiment = read_experiment(file)
    if seeds is not None:
        experiment = experiment.with_seeds(list(seeds))
    planned = _plan(experiment, Path(runs))
    _finish(planned, experiment.score, jobs, report)
    record = _record(experiment, planned, Path(file).read_text())
    path = Path(output) / f"{experiment.name}.json"
    write_record(path, record)
    report(f"{experiment.question}\n\n{comparison_table(record)}\n\n{path}")
    return path


def _plan(experiment: Experiment, runs: Path) -> dict[tuple[str, int], Run]:
    """Every variant under the first seed, then under the next: what is wrong with one shows early."""
    return {
        (variant, seed): Run(
            recipe=experiment.recipe,
            arguments=(*experiment.arguments, *own),
            seed=seed,
            checkpoint=experiment.checkpoint,
            runs=runs,
        )
        for seed in experiment.seeds
        for variant, own in experiment.variants.items()
    }


def _finish(
    planned: dict[tuple[str, int], Run], score: str, jobs: int, report: Callable[[str], None]
) -> None:
    """Do what is not done; begin no more behind the first that fails."""
    done = sum(run.done for run in planned.values())
    report(f"{len(planned)} runs, of which {done} are done")
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run.finish): key for key, run in planned.items()}
        try:
            for future in as_completed(futures):
                variant, seed = futures[future]
                run = planned[variant, seed]
                try:
                    future.result()
                    value = run.score(score)
                except InputError as error:
                    raise InputError(f"variant {variant!r}, seed {seed}: {error}") from error
                report(f"{variant}, seed {seed}: {score} {value:.4g}, {run.folder}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _record(
    experiment: Experiment, planned: dict[tuple[str, int], Run], text: str
) -> dict[str, Any]:
    scores = {
        variant: {seed: planned[variant, seed].score(experiment.score) for seed in experiment.seeds}
        for variant in experiment.variants
    }
    baseline = scores[experiment.baseline]
    variants = {
        variant: {
            "arguments": list(experiment.variants[variant]),
            "score": spread(by_seed)._asdict(),
            "minus_baseline": None
            if variant == experiment.baseline
            else differences(by_seed, baseline)._asdict(),
            "runs": [planned[variant, seed].describe() for seed in experiment.seeds],
        }
        for variant, by_seed in scores.items()
    }
    return {
        "name": experiment.name,
        "question": experiment.question,
        "recipe": experiment.recipe,
        "arguments": list(experiment.arguments),
        "checkpoint": experiment.checkpoint,
        "recipe_sha256": text_hash(Path(experiment.recipe).read_text()),
        "experiment_sha256": text_hash(text),
        "score": experiment.score,
        "better": experiment.better,
        "baseline": experiment.baseline,
        "seeds": list(experiment.seeds),
        "variants": variants,
        "provenance": describe(),
    }
