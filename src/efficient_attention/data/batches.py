"""The order of samples: a function of seed and epoch, so that a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .draws import Draw, generator, seed_of

__all__ = ["EpochBatches", "ResumableLoader", "Shard", "aspect_groups", "collate_lists"]

# Keeps the seeds of the order apart from those of the samples.
_ORDER, _SAMPLE = 0, 1


class EpochBatches(Sampler[list[Draw]]):
    """Batches of one epoch after the other, each sample once an epoch, alike samples together.

    The batches of an epoch follow from ``seed`` and its number alone, and so do the random numbers of every sample. A
    batch holds samples of one group; what is left over in the groups makes the last batches, neighbours together, so
    that at most one batch is short.

    Over several processes each takes every ``count``-th batch. All get equally many, as gradients are averaged:
    up to ``count - 1`` batches are left out, others in each epoch if it is shuffled.

    Args:
        groups: a number for every sample, see :func:`aspect_groups`; or how many samples there are, of one group.
        batch_size: samples of a batch.
        seed: of order and samples.
        shuffle: an order of its own for every epoch; otherwise by group and index, always the same.
        drop_last: leaves the short batch out.
        index: of this process, from 0.
        count: of processes.

    Raises:
        ValueError: sizes that are not positive, ``index`` not below ``count``, or nothing to take.

    Example:
        >>> batches = EpochBatches([0, 0, 1, 1, 0], batch_size=2, shuffle=False)
        >>> [[draw.item for draw in batch] for batch in batches]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        groups: int | Sequence[int] | Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.groups = torch.zeros(groups) if isinstance(groups, int) else torch.as_tensor(groups)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.drop_last, self.index, self.count = drop_last, index, count
        self.epoch, self.start = 0, 0
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive; got {batch_size}")
        _check_process(index, count)
        if len(self) == 0:
            raise ValueError(
                f"groups must have samples for a batch of {batch_size} on each of {count} processes; "
                f"got {len(self.groups)} with drop_last={drop_last}"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.groups), self.batch_size)
        return (whole + bool(rest and not self.drop_last)) // self.count

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._draws(self.epoch, self.start)

    def _draws(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        for batch in self.batches(epoch)[start:]:
            yield [Draw(i, seed_of(_SAMPLE, self.seed, epoch, i)) for i in batch]

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of every batch of an epoch that this process takes."""
        random = generator(_ORDER, self.seed, epoch)
        size = len(self.groups)
        order = torch.randperm(size, generator=random) if self.shuffle else torch.arange(size)
        order = order[self.groups[order].argsort(stable=True)]
        _, lengths = self.groups.unique(return_counts=True)
        full, rest = [], []
        for members in order.split(lengths.tolist()):
            whole = len(members) // self.batch_size * self.batch_size
            full += members[:whole].split(self.batch_size)
            rest.append(members[whole:])
        full += torch.cat(rest).split(self.batch_size)
        full = [batch for batch in full if len(batch)]
        if self.drop_last:
            full = [batch for batch in full if len(batch) == self.batch_size]
        if self.shuffle:
            full = [full[i] for i in torch.randperm(len(full), generator=random)]
        return [batch.tolist() for batch in full[self.index :: self.count][: len(self)]]

    def state_dict(self) -> dict[str, int]:
        """Where iteration begins."""
        return {"epoch": self.epoch, "batch": self.start}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin there."""
        self.epoch, self.start = state["epoch"], state["batch"]


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over :class:`EpochBatches` that knows how far it has been read.

    Every iteration is an epoch, whether it is read to its end or not. After ``load_state_dict`` the next iteration goes
    on behind the last batch that had been handed out when ``state_dict`` was called: what workers had fetched ahead is
    fetched again, and comes out the same. ``len`` is that of a whole epoch.

    Args:
        dataset: takes a :class:`Draw`.
        batches: which, and in what order.
        options: of ``torch.utils.data.DataLoader``, beside those that say which samples to take.

    Example:
        >>> from efficient_attention.data.generated_shapes import GeneratedShapes
        >>> shapes = GeneratedShapes(6, size=(32, 32))
        >>> loader = ResumableLoader(shapes, EpochBatches(6, 2), collate_fn=collate_lists)
        >>> images, targets = next(iter(loader))
        >>> loader.state_dict()
        {'epoch': 0, 'batch': 1}
    """

    def __init__(self, dataset: Dataset[Any], batches: EpochBatches, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **options)
        self.batches = batches
        self._epoch, self._batch, self._begun = 0, 0, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._begun:
            self._epoch, self._batch = self._epoch + 1, 0
        self._begun = True
        self.batches.load_state_dict(self._position())
        return self._count(super().__iter__())

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        return self._position()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there at the next iteration."""
        self._epoch, self._batch, self._begun = state["epoch"], state["batch"], False

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._batch += 1
            yield batch

    def _position(self) -> dict[str, int]:
        # Behind the last batch is before the first of the next epoch.
        if self._batch >= len(self):
            return {"epoch": self._epoch + 1, "batch": 0}
        return {"epoch": self._epoch, "batch": self._batch}


class Shard(Sampler[int]):
    """The samples that one of several processes evaluates: every ``count``-th, each sample in one process only.

    ``torch.utils.data.DistributedSampler`` hands some samples out twice so that all processes get equally many, which
    changes the result. Here they may get unequal numbers, so the network must not talk to other processes meanwhile.

    Args:
        length: of the data set.
        index: of this process, from 0.
        count: of processes.

    Example:
        >>> [list(Shard(5, i, 2)) for i in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, length: int, index: int, count: int) -> None:
        _check_process(index, count)
        self.indices = range(index, length, count)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def aspect_groups(ratios: Sequence[float] | Tensor, *, per_octave: int = 3) -> Tensor:
    """Numbers of groups of images that need little padding to be put into one batch.

    Args:
        ratios: width / height of every image.
        per_octave: groups between a ratio and its double; beyond 1:2 and 2:1 all are one.

    Returns:
        int64, in the order of ``ratios``.

    Example:
        >>> aspect_groups([0.75, 1.5, 1.4, 1.0, 10.0], per_octave=2).tolist()
        [-1, 1, 1, 0, 2]
    """
    octaves = torch.as_tensor(ratios, dtype=torch.float64).log2().clamp(-1, 1)
    return (octaves * per_octave).round().long()


def collate_lists(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Lists of the samples' parts, as pictures of unlike sizes do not stack.

    Example:
        >>> collate_lists([("image 1", "target 1"), ("image 2", "target 2")])
        (['image 1', 'image 2'], ['target 1', 'target 2'])
    """
    return tuple(map(list, zip(*samples, strict=True)))


def _check_process(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"index must be from 0 to count - 1 = {count - 1}; got {index}")
