"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Callback, ProgressBar, RichProgressBar
from pytorch_lightning.trainer.states import TrainerFn

__all__ = ["Bar", "Lines", "progress"]


def progress() -> Callback:
    """What shows progress best where standard output goes to."""
    return Bar() if sys.stdout.isatty() else Lines()


class Bar(RichProgressBar):
    """Lightning's bar, for runs that end after a number of steps too."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        of = f"/{last - 1}" if last is not None and last > 0 else ""
        return f"Epoch {current_epoch}{of} "


class Lines(ProgressBar):
    """A line for every logged step of training, and one for every evaluation.

    Example of a line::

        epoch 3  step 1250/90000  0.412 s/step  train/loss 0.731  train/lr 0.02
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._since, self._steps = time.perf_counter(), 0

    def disable(self) -> None:
        """Say nothing: this is not the first process."""
        self._enabled = False

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since, self._steps = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line, as often as values are logged."""
        done = trainer.global_step - self._steps
        if done >= trainer.log_every_n_steps:
            seconds = (time.perf_counter() - self._since) / done
            total = trainer.estimated_stepping_batches
            step = f"step {trainer.global_step}/{total}"
            place = f"epoch {trainer.current_epoch}  {step}  {seconds:.3g} s/step"
            self._write(place, _of("train", trainer.callback_metrics))
            self._since, self._steps = time.perf_counter(), trainer.global_step

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The values, in one line."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(f"epoch {trainer.current_epoch}", _of("val", trainer.callback_metrics))

    def _write(self, place: str, values: Mapping[str, Any]) -> None:
        if self._enabled:
            text = "".join(f"  {name} {float(value):.4g}" for name, value in values.items())
            print(place + text, flush=True)  # noqa: T201


def _of(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith(f"{stage}/")}
