"""Training networks that find objects: boxes, classes and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..data.segmentations import encode_masks
from ..metrics.detection import DetectionMetrics
from .networks import NetworkOptions
from .optimization import Optimizer, Schedule
from .task import Task

__all__ = ["Detection"]

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class Detection(Task):
    """Detection and segmentation of objects: the losses of Mask R-CNN, added up.

    Args:
        network: which network.
        optimizer: how its weights change.
        schedule: the learning rate at every step.
        masks: whether masks are evaluated and predicted, beside boxes.
        ema_decay: see :class:`~efficient_attention.training.task.Task`.
        seed: of the random numbers inside a step, which pick the proposals that train.

    Paper: Shen et al. 2021, Sec. 4 (MS-COCO); He et al. 2017 (arXiv 1703.06870).
    """

    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/box_ap", "max")
    order: ClassVar[str] = "image_id"

    def __init__(
        self,
        network: NetworkOptions,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        masks: bool = True,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, ema_decay=ema_decay, seed=seed)
        self.masks = masks
        # Of the data set that was last evaluated, as it may take long to put together.
        self._truth: tuple[Any, dict[str, Any]] | None = None

    def classes(self, dataset: Any) -> int | None:
        """The categories of the data set, and the background."""
        return getattr(dataset, "num_classes", None)

    def names(self, dataset: Any) -> list[dict[str, Any]] | None:
        """The categories, with the ids of the json."""
        categories = getattr(dataset, "categories", None)
        return None if categories is None else [category._asdict() for category in categories]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the proposals and of the heads."""
        images, targets = batch
        parts = self.network(images, targets)
        return {name.removeprefix("loss_"): part for name, part in parts.items()}

    def new_metrics(self, dataset: Any) -> DetectionMetrics:
        """COCO's average precision and recall."""
        if self._truth is None or self._truth[0] is not dataset:
            self._truth = (dataset, dataset.ground_truth())
        return DetectionMetrics(self._truth[1], masks=self.masks)

    def evaluate(self, batch: Batch, metrics: DetectionMetrics) -> None:
        """Collect what is found."""
        images, targets = batch
        metrics.update(self.network(images), [target["image_id"] for target in targets])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """What is found in every picture."""
        images, targets = batch
        return [
            {"image_id": target["image_id"], **{k: v.cpu() for k, v in found.items()}}
            for target, found in zip(targets, self.network(images), strict=True)
        ]

    def write_predictions(
        self, outputs: list[dict[str, Any]], folder: Path
    ) -> list[dict[str, Any]]:
        """Results as COCO has them, with the ids of images and categories that the data set came with."""
        categories = getattr(self._data.dataset("predict"), "categories", ())
        ids = {category.label: category.id for category in categories}
        return [record for found in outputs for record in _results(found, ids, self.masks)]


def _results(found: dict[str, Any], ids: dict[int, int], masks: bool) -> list[dict[str, Any]]:
    low, high = found["boxes"].double().split(2, 1)
    records = [
        {
            "image_id": found["image_id"],
            "category_id": ids.get(label, label),
            "score": score,
            "bbox": [*corner, *size],
        }
        for label, score, corner, size in zip(
            found["labels"].tolist(),
            found["scores"].tolist(),
            low.tolist(),
            (high - low).tolist(),
            strict=True,
        )
    ]
    if masks:
        outlines = encode_masks(found["masks"][:, 0] > 0.5)
        for record, outline in zip(records, outlines, strict=True):
            record["segmentation"] = outline
    return records
