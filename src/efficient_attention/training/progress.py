"""What a run is, and how far: a few lines at its beginning; a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Callback, ProgressBar, RichProgressBar
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from .checkpointing import Checkpoints
from .task import Task

__all__ = ["Bar", "Lines", "Summary", "progress"]


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


class Summary(Callback):
    """Says what is trained, on what and for how long, when training begins, and where to find what came out.

    Args:
        output: folder of the run.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """The network, its data and its steps."""
        assert isinstance(pl_module, Task)
        _tell("network", _network(pl_module.network))
        for stage, dataset in trainer.datamodule.datasets.items():
            _tell(stage, _dataset(dataset))
        samples = trainer.datamodule.batch_size * trainer.accumulate_grad_batches
        _tell(
            "steps",
            f"{trainer.estimated_stepping_batches} of {samples} samples, from {trainer.global_step}; "
            f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}",
        )

    @rank_zero_only
    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The folder of the run, and how good the best was."""
        best = [
            f"{callback.monitor} {callback.best:.4g}"
            for callback in trainer.callbacks
            if isinstance(callback, Checkpoints) and callback.best is not None
        ]
        _tell("output", f"{self.output}{''.join(f'; best {value}' for value in best)}")

    @rank_zero_only
    def on_predict_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The folder of the predictions."""
        _tell("output", str(self.output / "predictions"))


def _network(network: Any) -> str:
    options = network.configuration
    places = ", ".join(options.get("at", ())) or "no place"
    attention = f"{options.get('attention')} attention at {places}"
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    part = f", of which {trained / 1e6:.2f} M train" if trained < count else ""
    return f"{options.get('name')}, {attention}; {count / 1e6:.2f} M parameters{part}"


def _dataset(dataset: Any) -> str:
    told = repr(dataset)
    # What every object says of itself.
    return f"{type(dataset).__name__}, {len(dataset)} samples" if " object at 0x" in told else told


def _tell(what: str, text: str) -> None:
    print(f"{what:8} {text}", flush=True)  # noqa: T201


def _of(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith(f"{stage}/")}
