"""What training is for every task: a network, how its weights change, random numbers, and what is written down."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ..data.draws import seed_of
from ..errors import InputError
from .averaging import MovingAverage
from .data import Data
from .merging import Metrics, broadcast_buffers, merged_scores
from .networks import NetworkOptions, differences
from .optimization import Optimizer, Rates, Schedule

__all__ = ["Task"]

_CONFIGURATION, _OPTIMIZER = "network_configuration", "optimizer"


class Task(LightningModule, ABC):
    """Base of what can be trained: :class:`Classification`, :class:`Detection`, :class:`Stereo`.

    A task says what the loss of a batch is, how predictions are counted, and how they are written. What a step does
    depends on the weights, the seed, the epoch and the batch alone, so that a run that is resumed goes on as if it had
    never stopped, to the bit where the arithmetic of the device is deterministic.

    Args:
        network: which network.
        optimizer: how its weights change.
        schedule: the learning rate at every step.
        ema_decay: of an exponential moving average of the weights, which is then what is evaluated and what checkpoints
            hold as ``state_dict``; None: no average.
        seed: of the random numbers inside a step.
    """

    #: The value of validation that says which checkpoint is best, and whether ``"max"`` or ``"min"`` of it is.
    monitor: ClassVar[tuple[str, Literal["max", "min"]]]
    #: What the records of predictions are sorted by.
    order: ClassVar[str] = "name"

    def __init__(
        self,
        network: NetworkOptions,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1; got {ema_decay}")
        self.network: Any = network.build()
        self.seed = seed
        self._sharded = False
        self._optimizer, self._schedule, self._ema_decay = optimizer, schedule, ema_decay
        self._metrics: Metrics | None = None
        #: Of the last evaluation, by name, with the protocol where there are several.
        self.scores: dict[str, Any] = {}

    def classes(self, dataset: Any) -> int | None:
        """How many classes the labels of a data set are of, the background of detection included; None: unknown."""
        return None

    def names(self, dataset: Any) -> list[dict[str, Any]] | None:
        """What the labels of a data set mean: ``label`` as the network gives it, ``id`` in the data, ``name``."""
        return None

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The parts of the loss of a batch, by name; training descends on their sum."""

    @abstractmethod
    def new_metrics(self, dataset: Any) -> Metrics:
        """What counts the predictions for a data set, before the first of them."""

    @abstractmethod
    def evaluate(self, batch: Any, metrics: Any) -> None:
        """Count the predictions for a batch."""

    @abstractmethod
    def write_predictions(self, outputs: Any, folder: Path) -> list[dict[str, Any]]:
        """Write what ``predict_step`` returned, and say it in records that JSON can hold."""

    def setup(self, stage: str) -> None:
        """See that the network has a number for every class of the data."""
        ours = self.network.configuration.get("num_classes")
        for name, dataset in self._data.datasets.items():
            theirs = self.classes(dataset)
            if ours is not None and theirs is not None and theirs > ours:
                raise InputError(
                    f"model.network.options.num_classes must be at least {theirs} for data.{name}; got {ours}"
                )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        losses = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        parts = {f"train/loss_{name}": loss.detach() for name, loss in losses.items()}
        logged = {"train/loss": total.detach(), **(parts if len(losses) > 1 else {})}
        self.log_dict(logged, batch_size=1, sync_dist=True)
        (optimizer,) = self.trainer.optimizers
        self.log("train/lr", optimizer.param_groups[0]["lr"], batch_size=1)
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the predictions for a batch."""
        self.evaluate(batch, self._metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the predictions for a batch."""
        self.evaluate(batch, self._metrics)

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        broadcast_buffers(self.network)
        self._metrics = self.new_metrics(self._data.dataset("val"))

    def on_test_epoch_start(self) -> None:
        """Begin to count."""
        self._metrics = self.new_metrics(self._data.dataset("test"))

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_scores("test")

    def on_train_start(self) -> None:
        """Set the learning rate, now that the length of an epoch is known."""
        rates = self.lr_schedulers()
        assert isinstance(rates, Rates)
        rates.apply()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the random numbers of a step from its place alone."""
        torch.manual_seed(seed_of(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See that the loss is a number, as often as it is logged: asking more often would make the device wait."""
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            losses = {k: v.item() for k, v in trainer.callback_metrics.items() if "/loss" in k}
            if not math.isfinite(losses["train/loss"]):
                parts = ", ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in losses.items())
                raise self._diverged(f"the loss must be a number; it is {parts}")

    def configure_optimizers(self) -> Any:
        """The optimizer, and the learning rate of every step."""
        optimizer = self._optimizer.build(self.network)
        rates = Rates(optimizer, self._factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": rates, "interval": "step", "name": "train/lr"},
        }

    def configure_callbacks(self) -> list[Callback]:
        """The moving average, in training."""
        if self._ema_decay is None or self.trainer.state.fn != TrainerFn.FITTING:
            return []
        return [MovingAverage(self._ema_decay)]

    def configure_model(self) -> None:
        """Share gradients and the optimizer's state out over the processes, under ``ModelParallelStrategy`` (FSDP2)."""
        if self.device_mesh is None or self._sharded:
            return
        if self._ema_decay is not None:
            raise InputError("ema_decay must be None under ModelParallelStrategy")
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
        self._sharded = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the weights and the optimizer's state are of; weights that are no numbers are not kept."""
        # Gathered from all processes, which parameters that are shared out are not.
        weights = checkpoint["state_dict"]
        trained = [weights[name] for name, _ in self.named_parameters() if name in weights]
        if not all(tensor.isfinite().all() for tensor in trained):
            raise self._diverged("weights must be numbers to be kept; some are not")
        checkpoint[_CONFIGURATION] = self.network.configuration
        checkpoint[_OPTIMIZER] = type(self._optimizer).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how the network of the checkpoint differs from this one; this one's options count."""
        there: Mapping[str, Any] = checkpoint.get(_CONFIGURATION, {})
        other = differences(there, self.network.configuration)
        for option, (theirs, ours) in other.items():
            rank_zero_info(
                f"The network of the checkpoint has {option}={theirs!r}; here {ours!r} counts"
            )
        # Of another network the weights do not fit, which comes next.
        if self.trainer.state.fn == TrainerFn.FITTING and not other:
            self._check_optimizer(checkpoint)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, and tell in one line if they are of another network."""
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            _, *problems = (line.strip() for line in str(error).splitlines())
            raise InputError(
                f"ckpt_path must hold weights of this network: {' '.join(problems)[:400]}"
            ) from error

    def trained_names(self) -> list[dict[str, Any]] | None:
        """The names of what the network is trained to tell apart, see :meth:`names`; None: it has none."""
        return self.names(self._data.dataset("train"))

    @property
    def _data(self) -> Data:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, Data):
            raise TypeError(f"datamodule must be a {Data.__name__}; got {type(data).__name__}")
        return data

    def _log_scores(self, stage: str) -> None:
        assert self._metrics is not None
        try:
            self.scores = merged_scores(self._metrics)
        except ValueError:
            # The first few samples, before training, need not have anything that counts.
            if self.trainer.sanity_checking:
                return
            raise
        values = {f"{stage}/{k}": v for k, v in self.scores.items() if isinstance(v, int | float)}
        # They are the same on all processes: their largest is what they are, to the bit.
        self.log_dict(values, batch_size=1, sync_dist=True, reduce_fx="max")

    def _diverged(self, what: str) -> InputError:
        step = self.trainer.global_step
        return InputError(
            f"{what} at step {step}. Go on from the checkpoint before it, --ckpt_path last, with a smaller "
            "model.optimizer.lr, a longer model.schedule.warmup_steps or with trainer.gradient_clip_val"
        )

    def _check_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        theirs, ours = checkpoint.get(_OPTIMIZER), type(self._optimizer).__name__
        (state,) = checkpoint.get("optimizer_states") or [None]
        if theirs != ours or state is None:
            raise InputError(
                f"model.optimizer must be the checkpoint's, {theirs}, to go on with it; got {ours}. "
                "A new run takes its weights by model.network.weights and weights_prefix=network."
            )
        counts = [
            [len(group["params"]) for group in groups]
            for groups in (state["param_groups"], self._optimizer.groups(self.network))
        ]
        if counts[0] != counts[1]:
            raise InputError(
                f"model.optimizer must have groups of {counts[0]} parameters, as in the checkpoint; got {counts[1]}, "
                "by decay_vectors or by layers that are frozen"
            )

    def _factor(self, step: int) -> float:
        trainer = self.trainer
        batches = trainer.num_training_batches
        # Before the data is there, only the first step is asked for, and on_train_start asks again.
        if not math.isfinite(batches):
            return self._schedule.factor(0, steps_per_epoch=1, total_steps=1)
        steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        ends = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            ends.append(trainer.max_epochs * steps_per_epoch)
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps)
        total_steps = min(ends, default=None)
        return self._schedule.factor(step, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
