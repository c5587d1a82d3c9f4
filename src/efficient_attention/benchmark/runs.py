"""One run: a recipe with arguments and a seed, trained and tested in processes of its own, and never twice."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .provenance import source_version, text_hash, write_record

__all__ = ["Run"]

_STAGES = ("fit", "test")
_NOTES = "run.json"
# Of the hash of what a run follows from; enough for all runs that anybody will ever do.
_DIGITS = 12
# The package that runs here, wherever it lies.
_SOURCE = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Run:
    """A run, in a folder that is named for what the run follows from, so that experiments share those that they share.

    Args:
        recipe: its file.
        arguments: over it, as on the command line.
        seed: of weights, order and augmentation.
        checkpoint: that is tested, ``"last"`` or ``"best"``.
        runs: the folder of all runs.

    Example:
        >>> run = Run("recipes/small/resnet.yaml", ("--model.network.at", "[]"), 0, "last", Path("runs"))
        >>> run.finish()["top1"]  # trains and tests, or reads what an earlier call has left
        81.5

    Not part of the paper.
    """

    recipe: str
    arguments: tuple[str, ...]
    seed: int
    checkpoint: str
    runs: Path

    @property
    def folder(self) -> Path:
        """Where it is: ``<recipe>-<hash>-seed<seed>``; other text in the recipe, or other arguments, make another."""
        recipe = Path(self.recipe)
        digits = text_hash(recipe.read_text(), *self.arguments, self.checkpoint)[:_DIGITS]
        return self.runs / f"{recipe.stem}-{digits}-seed{self.seed}"

    @property
    def done(self) -> bool:
        """Whether it was trained and tested."""
        return set(_STAGES) <= self._notes()["stages"].keys()

    def finish(self) -> dict[str, Any]:
        """Train and test, as far as that is not done; a run that was killed goes on from its last checkpoint.

        Returns:
            What ``test`` has found, the last line of ``test.jsonl``.

        Raises:
            InputError: a process failed; its last line, and where to read more.
        """
        if self.done:
            return self.scores()
        with self._alone() as lock:
            # Whoever was at it may have done it.
            notes = self._notes()
            for stage in _STAGES:
                if stage not in notes["stages"]:
                    notes["stages"][stage] = self._process(stage, lock)
                    write_record(self.folder / _NOTES, notes)
        return self.scores()

    def scores(self) -> dict[str, Any]:
        """What ``test`` has found."""
        return json.loads((self.folder / "test.jsonl").read_text().splitlines()[-1])

    def score(self, name: str) -> float:
        """One of the scores.

        Raises:
            InputError: there is none of this name; it is not finite, as those of a training that diverged.
        """
        scores = self.scores()
        numbers = [key for key, value in scores.items() if isinstance(value, int | float)]
        if name not in numbers:
            raise InputError(
                f"score must be a number that test gives, one of {numbers}; got {name!r}"
            )
        if not math.isfinite(scores[name]):
            raise InputError(
                f"{name} must be finite; got {scores[name]} (see {self.folder}/fit.log)"
            )
        return float(scores[name])

    def describe(self) -> dict[str, Any]:
        """Seed, code and seconds of a run that is done, how often it was started, and its scores."""
        notes, scores = self._notes(), self.scores()
        # Its provenance is the record's and the stages'.
        numbers = {k: v for k, v in scores.items() if isinstance(v, int | float)}
        lines = map(json.loads, (self.folder / "history.jsonl").read_text().splitlines())
        starts = sum(line.get("event") == "start" for line in lines)
        return {"seed": self.seed, "starts": starts, **notes["stages"], "scores": numbers}

    def _notes(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / _NOTES).read_text())
        except FileNotFoundError:
            arguments = list(self.arguments)
            return {"recipe": self.recipe, "arguments": arguments, "seed": self.seed, "stages": {}}

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Wait for whoever is at this run, processes included that have outlived who started them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()

    def _process(self, stage: str, lock: int) -> dict[str, Any]:
        """Run a command to its end, and say of what code it was and how long it took."""
        version, begin = source_version(), time.perf_counter()
        log = self.folder / f"{stage}.log"
        with log.open("a") as file:
            process = subprocess.Popen(
                self._command(stage),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                pass_fds=[lock],
            )
            try:
                # Not Popen.wait, which does not tell what the process took.
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                raise
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if code:
            last = (["", *log.read_text().strip().splitlines()])[-1]
            raise InputError(
                f"{stage} of {self.recipe} {' '.join(self.arguments)} --seed {self.seed} must end with code 0; "
                f"got {code}: {last} (all of it: {log})"
            )
        seconds, cpu_seconds = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
        return {**version, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}

    def _command(self, stage: str) -> list[str]:
        checkpoint = "last" if stage == "fit" else self.checkpoint
        own = ["--seed", str(self.seed), "--output", str(self.folder), "--ckpt_path", checkpoint]
        return [
            *(sys.executable, "-m", "efficient_attention.cli", stage, "--config", self.recipe),
            *(*self.arguments, *own),
        ]


def _environment() -> dict[str, str]:
    paths = [str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
