"""Predictions on disk: files of the task's own kind, and a list of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from .task import Task

__all__ = ["Predictions"]


class Predictions(Callback):
    """Writes what a task predicts, batch by batch, and ``predictions.json`` when all are there.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._records: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of a batch."""
        assert isinstance(pl_module, Task)
        self._records += pl_module.write_predictions(outputs, self.folder)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the list, of the predictions of all processes."""
        assert isinstance(pl_module, Task)
        records = _of_all_processes(self._records)
        if trainer.is_global_zero:
            records.sort(key=lambda record: record[pl_module.order])
            path = self.folder / "predictions.json"
            incomplete = path.with_suffix(".incomplete")
            incomplete.write_text(json.dumps(records))
            incomplete.replace(path)


def _of_all_processes(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return list(records)
    parts: list[Sequence[dict[str, Any]]] = [()] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return [record for part in parts for record in part]
