"""A moving average of weights, on Lightning's."""

from __future__ import annotations

import warnings
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import EMAWeightAveraging

__all__ = ["MovingAverage"]


class MovingAverage(EMAWeightAveraging):
    """An exponential moving average of weights and statistics, after every step of the optimizer.

    ::

        average <- decay * average + (1 - decay) * weights

    Validation sees the average, and checkpoints hold it as ``state_dict``, beside the weights that training goes on
    with. When training ends, the network has it.

    Args:
        decay: between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Begin with the weights as they are."""
        with warnings.catch_warnings():
            # Of weights that are sharded: our tasks refuse to average them.
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
            super().setup(trainer, pl_module, stage)
