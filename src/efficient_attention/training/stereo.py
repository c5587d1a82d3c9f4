"""Training networks that see depth: disparity from two views."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..data.disparity_files import write_pfm
from ..data.stereo import StereoSample
from ..metrics.stereo import StereoMetrics
from .colours import normalized
from .networks import NetworkOptions
from .optimization import Optimizer, Schedule
from .task import Task

__all__ = ["Stereo"]


class Stereo(Task):
    """Stereo: for every head of the network the smooth L1 distance to the true disparity, weighted and summed.

    ::

        loss = sum_h w_h mean_{pixels with 0 < d < max_disparity} smooth_l1(d_h - d)

    with PSMNet's weights 0.5, 0.7 and 1, and a distance that is quadratic below one pixel. A batch without such a pixel
    has no part in the gradient.

    Args:
        network: which network.
        optimizer: how its weights change.
        schedule: the learning rate at every step.
        max_disparity: of the pixels that train and count, in pixels; default: the network's.
        occluded: whether pixels that the right view does not show count in evaluation.
        average: of the errors, over pixels or over images, as ``StereoMetrics`` has it.
        least_valid: share of pixels that count, below which an image is left out of evaluation.
        ema_decay: see :class:`~efficient_attention.training.task.Task`.
        seed: of the random numbers inside a step.

    Paper: Shen et al. 2021, Sec. 4 (EA-PSMNet); Chang and Chen 2018, Sec. 3.6.
    """

    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/end_point_error", "min")

    def __init__(
        self,
        network: NetworkOptions,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        max_disparity: float | None = None,
        occluded: bool = True,
        average: Literal["pixel", "image"] = "pixel",
        least_valid: float = 0.0,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, ema_decay=ema_decay, seed=seed)
        self.max_disparity = max_disparity or self.network.max_disparity
        self._protocol: dict[str, Any] = {
            "occluded": occluded,
            "average": average,
            "least_valid": least_valid,
        }
        # What is wrong with the protocol shows before the first epoch has passed.
        self.new_metrics(None)

    def losses(self, batch: StereoSample) -> dict[str, Tensor]:
        """The weighted losses of the heads, coarse to fine."""
        true, valid = batch["disparity"], batch["valid"]  # [B, H, W]
        mask = (valid & (true > 0) & (true < self.max_disparity)).float()
        pixels = mask.sum().clamp(min=1)
        # What is not known may be infinite.
        true = true.where(mask > 0, 0)
        heads = self.network(normalized(batch["left"]), normalized(batch["right"]))
        return {
            f"head{i}": weight
            * (F.smooth_l1_loss(head, true, reduction="none") * mask).sum()
            / pixels
            for i, (head, weight) in enumerate(
                zip(heads, self.network.loss_weights, strict=True), 1
            )
        }

    def new_metrics(self, dataset: Any) -> StereoMetrics:
        """Errors in pixels, and shares of bad pixels."""
        return StereoMetrics(max_disparity=self.max_disparity, **self._protocol)

    def evaluate(self, batch: StereoSample, metrics: StereoMetrics) -> None:
        """Count errors."""
        disparity = self._disparity(batch)
        metrics.update(disparity, batch["disparity"], batch["valid"], batch.get("visible"))

    def predict_step(self, batch: StereoSample, batch_idx: int) -> dict[str, Any]:
        """The disparity of every pair."""
        return {"name": batch["name"], "disparity": self._disparity(batch).float().cpu()}

    def write_predictions(self, outputs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """A portable float map for every pair."""
        records = []
        for name, disparity in zip(outputs["name"], outputs["disparity"], strict=True):
            path = folder / f"{name.replace('/', '_')}.pfm"
            write_pfm(path, disparity)
            records.append({"name": name, "file": path.name})
        return records

    def _disparity(self, batch: StereoSample) -> Tensor:
        return self.network(normalized(batch["left"]), normalized(batch["right"]))  # [B, H, W]
