"""Data for training, evaluation and prediction: which data sets, in batches of what size, in what order."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.batches import EpochBatches, ResumableLoader, Shard, aspect_groups, collate_lists
from ..errors import InputError

__all__ = ["ClassificationData", "Data", "DetectionData", "StereoData"]

# What a stage needs, by the name that recipes have for it; the first it cannot do without.
_DATA_OF = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
# A data set that is made when it is needed: reading a million annotations takes its time, in every process.
DatasetFactory = Callable[[], Dataset]


class Data(LightningDataModule, ABC):
    """Base of the data of a task; the data sets of every stage, loaded so that a run can stop and go on anywhere.

    The order of samples follows from seed and epoch, their random numbers from seed, epoch and index. A run that is
    resumed inside an epoch goes on behind the last batch that had an effect. In evaluation every sample is taken once,
    by one process; processes may have unequal numbers.

    Args:
        train: data set to train on.
        val: data set to validate on.
        test: data set to test on.
        predict: data set to predict for; default: ``test``.
        batch_size: samples of a training step, of all processes together.
        eval_batch_size: samples of a batch of evaluation or prediction, on each process.
        workers: processes that load samples, beside each process that trains; 0: none.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        train: DatasetFactory | None = None,
        val: DatasetFactory | None = None,
        test: DatasetFactory | None = None,
        predict: DatasetFactory | None = None,
        *,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.seed = workers, seed
        self._factories = {"train": train, "val": val, "test": test, "predict": predict or test}
        #: By stage, those that have been needed.
        self.datasets: dict[str, Dataset] = {}
        self._resumed: dict[str, int] | None = None

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of samples."""
        return default_collate(list(samples))

    def groups(self, dataset: Any) -> int | Tensor:
        """How many samples there are; or a number for each, so that those of one number make a batch."""
        return len(dataset)

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage."""
        for name in _DATA_OF[stage]:
            factory = self._factories[name]
            if factory is not None and name not in self.datasets:
                try:
                    self.datasets[name] = factory()
                except (OSError, TypeError, ValueError) as error:
                    raise InputError(f"data.{name} cannot be used: {error}") from error
        self.dataset(_DATA_OF[stage][0])

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this process, from where the run stands."""
        dataset = self.dataset("train")
        index, count = self._process()
        if self.batch_size % count:
            raise InputError(
                f"batch_size must divide among {count} processes; got {self.batch_size}"
            )
        batches = EpochBatches(
            self.groups(dataset),
            self.batch_size // count,
            seed=self.seed,
            drop_last=True,
            index=index,
            count=count,
        )
        return _RunLoader(
            dataset, batches, self._position, collate_fn=self.collate, **self._loading()
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every sample once, over all processes; nothing, if there is nothing to validate on."""
        return self._evaluation("val") if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """Every sample once, over all processes."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """Every sample once, over all processes."""
        return self._evaluation("predict")

    def indices(self, batch: int, size: int) -> list[int]:
        """Where in the data set the samples of a batch of evaluation are.

        Args:
            batch: its number on this process.
            size: its samples.
        """
        index, count = self._process()
        first = batch * self.eval_batch_size
        return [index + count * i for i in range(first, first + size)]

    def state_dict(self) -> dict[str, int]:
        """What the order of samples follows from."""
        return {"seed": self.seed, "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep what the order followed from, to compare."""
        self._resumed = state_dict

    def _position(self) -> dict[str, int]:
        """Where in the order the run is."""
        if self.trainer is None:
            return {"epoch": 0, "batch": 0}
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        if epoch.processed == epoch.ready:
            return {"epoch": epoch.processed, "batch": 0}
        here = self.state_dict()
        if self._resumed is not None and self._resumed != here:
            raise InputError(
                f"data must have seed and batch_size of the checkpoint to go on inside an epoch, {self._resumed}; "
                f"got {here}. A checkpoint of the end of an epoch leaves them free"
            )
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"epoch": epoch.processed, "batch": ready}

    def _evaluation(self, name: str) -> DataLoader:
        dataset: Any = self.dataset(name)
        index, count = self._process()
        if len(dataset) < count:
            raise InputError(
                f"data.{name} must have a sample for each of {count} processes; got {len(dataset)}"
            )
        return DataLoader(
            dataset=dataset,
            sampler=Shard(len(dataset), index, count),
            batch_size=self.eval_batch_size,
            collate_fn=self.collate,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _process(self) -> tuple[int, int]:
        """Index and number of the processes that have batches of their own."""
        if self.trainer is None or self.trainer.world_size == 1:
            return 0, 1
        shares: Any = self.trainer.distributed_sampler_kwargs
        return shares["rank"], shares["num_replicas"]

    def dataset(self, name: str) -> Any:
        """The data set of a stage.

        Args:
            name: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.

        Raises:
            InputError: none was given.
        """
        if name not in self.datasets:
            raise InputError(f"data.{name} must be given for this command; got none")
        return self.datasets[name]


class _RunLoader(ResumableLoader):
    """A loader that asks the run where it is, whenever an iteration begins.

    Lightning restores the state of a loader in some of the places where a run can be resumed, and iterates once or
    twice before the first batch, depending on the place; its own progress is right in all of them.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: EpochBatches,
        position: Callable[[], dict[str, int]],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batches, **options)
        self._ask = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        super().load_state_dict(self._ask())
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Nothing, as the run knows; but it says that the loader can resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing."""


class ClassificationData(Data):
    """Pictures of one size and their classes, ``(image, label)``; arguments are those of :class:`Data`."""


class StereoData(Data):
    """Pairs of views, as :class:`~efficient_attention.data.stereo.StereoSample` describes; arguments: :class:`Data`.

    Pairs of a training batch must have one size, as a crop makes them; where those of evaluation have several,
    ``eval_batch_size`` is 1.
    """


class DetectionData(Data):
    """Pictures of any size and their objects, ``(image, target)``; arguments are those of :class:`Data`.

    Pictures of a training batch are of like shape, where the data set knows them, so that little is padded.
    """

    def collate(self, samples: Sequence[Any]) -> Any:
        """Lists of images and of targets."""
        return collate_lists(samples)

    def groups(self, dataset: Any) -> int | Tensor:
        """By the ratio of width to height."""
        ratios = getattr(dataset, "aspect_ratios", None)
        return len(dataset) if ratios is None else aspect_groups(ratios)
