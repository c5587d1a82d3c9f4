"""Checkpoints on disk: whole or not there at all, the best and the last, and the network that comes out of a run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ..models import create_model, load_checkpoint

__all__ = ["AtomicCheckpointIO", "Checkpoints", "read_checkpoint"]

BEST, LAST, NETWORK, CLASSES = "best.ckpt", "last.ckpt", "network", "classes.json"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a run: tensors and plain values, never code.

    Args:
        path: a file that a run wrote.

    Returns:
        What it holds. Tensors are read from the file when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is no checkpoint of a run; the message has its name and size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path must be a file; got {path}")
    size = path.stat().st_size
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A damaged file shows in as many ways as there are places to damage.
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"ckpt_path must be a whole checkpoint; {path} ({size} bytes) cannot be read: {reason}"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "global_step"} <= content.keys():
        raise ValueError(
            f"ckpt_path must be the checkpoint of a run; {path} ({size} bytes) holds something else. "
            "Weights alone belong to model.network.weights"
        )
    return content


class AtomicCheckpointIO(CheckpointIO):
    """Writes a file beside its place, and moves it there when all of it is on the disk.

    Whenever a run is killed, the last checkpoint is the one before or the one after, never a part.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file; see the class.

        Raises:
            OSError: it cannot be written, the disk is full for one; nothing is left of it, and the one before is there.
        """
        if storage_options is not None:
            raise TypeError("storage_options must be None; files are local")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_name(f".{path.name}.incomplete")
        try:
            with incomplete.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            incomplete.replace(path)
        # torch tells of the end of a file that it could not write, which hides why.
        except (OSError, RuntimeError) as error:
            incomplete.unlink(missing_ok=True)
            cause = _cause(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file to the CPU, without running code that may be in it; see :func:`read_checkpoint`."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file, if it is there."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keeps two checkpoints of a run, both of which training goes on from: ``last.ckpt`` and ``best.ckpt``.

    The last one is written at the end of every epoch (under ``max_steps``, of every validation and of the run), inside
    it every so many steps, and when the run is sent SIGTERM; the best one when validation has found a better value than
    ever before. When training ends, the network with the best weights (the last, without validation) is written to the
    folder ``network`` beside theirs, as ``save_pretrained`` does, and with it ``classes.json``, what its labels mean::

        [{"label": 1, "id": 18, "name": "dog"}, ...]

    where ``label`` is the network's number and ``id`` that of the training data.

    Args:
        folder: where they are.
        monitor: the value that says which is best; default: the task's own.
        mode: whether ``"max"`` or ``"min"`` of it is best; default: the task's own.
        every_n_steps: of the optimizer, between two last checkpoints inside an epoch; 0: none inside.

    Raises:
        ValueError: a negative number of steps; one of monitor and mode without the other; validation has no such value.
    """

    def __init__(
        self,
        folder: str | Path = ".",
        *,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        every_n_steps: int = 0,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must not be negative; got {every_n_steps}")
        if (monitor is None) != (mode is None):
            raise ValueError(
                f"monitor and mode go together; got monitor={monitor!r}, mode={mode!r}"
            )
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None
        self._saved_step, self._postponed = -1, False

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Take the task's own measure, where none was given."""
        own = getattr(pl_module, "monitor", None)
        if self.monitor is None and own is not None:
            self.monitor, self.mode = own

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and what it is of."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best value so far, if it is of the same measure."""
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Write the last checkpoint, if its time has come."""
        # Behind the last batch of an epoch comes its validation, which belongs to it.
        inside = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every_n_steps and inside and trainer.global_step % self.every_n_steps == 0:
            # So does one that comes now to this step.
            self._postponed = _is_validated_now(trainer)
            if not self._postponed:
                self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the last checkpoint."""
        # Lightning counts an epoch twice that a run with max_steps resumes at the end of.
        if trainer.max_steps < 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the last checkpoint of a run that may end inside an epoch."""
        if trainer.max_steps >= 0:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the best checkpoint, if this is it."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:
            return
        if self.monitor is not None and self._is_best(trainer):
            trainer.save_checkpoint(self.folder / BEST, weights_only=False)
        if trainer.max_steps >= 0 or self._postponed:
            self._postponed = False
            self._save_last(trainer)

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the last checkpoint of a run that is asked to end, as machines do before they take themselves away."""
        # It is raised between two batches. In validation, which is begun again, what was written before must do.
        if isinstance(exception, SIGTERMException) and trainer.training:
            self._save_last(trainer)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the network."""
        origin = next((p for p in (self.folder / BEST, self.folder / LAST) if p.is_file()), None)
        network = getattr(pl_module, "network", None)
        if trainer.is_global_zero and not trainer.fast_dev_run and origin and network is not None:
            best = create_model(**network.configuration)
            load_checkpoint(best, read_checkpoint(origin), prefix="network.")
            _save_names(pl_module, self.folder.parent / NETWORK)
            best.save_pretrained(self.folder.parent / NETWORK)

    def _is_best(self, trainer: Any) -> bool:
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(f"monitor must be one of {known}; got {self.monitor!r}")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            return False
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best = value
            return True
        return False

    def _save_last(self, trainer: Any) -> None:
        # Gradients that are being accumulated are not in a checkpoint.
        batch, every = trainer.fit_loop.batch_idx + 1, trainer.accumulate_grad_batches
        whole = batch % every == 0 or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if whole and trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)


def _cause(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _save_names(pl_module: Any, folder: Path) -> None:
    names = pl_module.trained_names() if hasattr(pl_module, "trained_names") else None
    if names is not None:
        folder.mkdir(parents=True, exist_ok=True)
        incomplete = folder / f".{CLASSES}.incomplete"
        incomplete.write_text(json.dumps(names, indent=1) + "\n")
        incomplete.replace(folder / CLASSES)


def _is_validated_now(trainer: Any) -> bool:
    """Whether validation follows the present batch."""
    loop, every, epochs = trainer.fit_loop, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or math.isinf(every):
        return False
    if epochs is None:
        return (loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (loop.batch_idx + 1) % every == 0
