"""Training networks that say what a picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..metrics.classification import ClassificationMetrics
from .colours import normalized
from .networks import NetworkOptions
from .optimization import Optimizer, Schedule
from .task import Task

__all__ = ["Classification"]

# Classes that a prediction names.
_BEST = 5


class Classification(Task):
    """Classification of pictures: the cross-entropy of their classes.

    Args:
        network: which network.
        optimizer: how its weights change.
        schedule: the learning rate at every step.
        label_smoothing: share of the weight that the true class gives to all classes alike.
        ema_decay: see :class:`~efficient_attention.training.task.Task`.
        seed: of the random numbers inside a step.

    Paper: Shen et al. 2021, Sec. 4 (ImageNet).
    """

    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/top1", "max")
    order: ClassVar[str] = "index"

    def __init__(
        self,
        network: NetworkOptions,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, ema_decay=ema_decay, seed=seed)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def classes(self, dataset: Any) -> int | None:
        """As the data set names them."""
        return len(dataset.classes) if hasattr(dataset, "classes") else None

    def names(self, dataset: Any) -> list[dict[str, Any]] | None:
        """The classes, whose ids are their labels."""
        if not hasattr(dataset, "classes"):
            return None
        return [{"label": i, "id": i, "name": str(name)} for i, name in enumerate(dataset.classes)]

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The cross-entropy."""
        images, labels = batch  # [B, 3, H, W], [B]
        logits = self.network(normalized(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"cross_entropy": loss}

    def new_metrics(self, dataset: Any) -> ClassificationMetrics:
        """Top-1 and top-5."""
        return ClassificationMetrics()

    def evaluate(self, batch: tuple[Tensor, Tensor], metrics: ClassificationMetrics) -> None:
        """Count right classes."""
        images, labels = batch
        metrics.update(self.network(normalized(images)), labels)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """The most probable classes of every picture, and which picture of the data set it is."""
        images, _ = batch
        probabilities = self.network(normalized(images)).float().softmax(1)
        best = probabilities.topk(min(_BEST, probabilities.shape[1]), dim=1)
        return {
            "index": self._data.indices(batch_idx, len(images)),
            "classes": best.indices.tolist(),
            "probabilities": best.values.tolist(),
        }

    def write_predictions(self, outputs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """The classes and their probabilities, from the most probable one."""
        rows = zip(*outputs.values(), strict=True)
        return [dict(zip(outputs, row, strict=True)) for row in rows]
