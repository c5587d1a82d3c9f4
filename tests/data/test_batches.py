"""The order of samples follows from seed and epoch, wherever a run was resumed and however many workers there are."""

from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from efficient_attention.data.batches import (
    EpochBatches,
    ResumableLoader,
    Shard,
    aspect_groups,
    collate_lists,
)
from efficient_attention.data.draws import as_draw

GROUPS = [0] * 7 + [1] * 5 + [-2] * 9


class Draws(Dataset):
    """Samples that are their own draws."""

    def __len__(self):
        return len(GROUPS)

    def __getitem__(self, key):
        return tuple(as_draw(key, len(self)))


def loader(workers=0, **options):
    return ResumableLoader(
        Draws(),
        EpochBatches(GROUPS, 2, seed=3),
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
        **options,
    )


def read(loader, batches):
    """So many batches, over the ends of epochs."""
    read = []
    while len(read) < batches:
        read += islice(loader, batches - len(read))
    return read


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_takes_every_sample_once(shuffle):
    batches = EpochBatches(GROUPS, 4, shuffle=shuffle)
    for epoch in range(3):
        taken = Counter(i for batch in batches.batches(epoch) for i in batch)
        assert taken == Counter(range(len(GROUPS)))


def test_a_batch_holds_one_group_unless_it_holds_the_rest():
    # 7 = 4 + 3, 5 = 4 + 1, 9 = 4 + 4 + 1: four whole batches and a rest of 5, in the order of the groups.
    batches = [[GROUPS[i] for i in batch] for batch in EpochBatches(GROUPS, 4).batches(0)]
    whole = sorted(batch for batch in batches if len(set(batch)) == 1 and len(batch) == 4)
    assert whole == [[-2] * 4, [-2] * 4, [0] * 4, [1] * 4]
    assert sorted(batch for batch in batches if batch not in whole) == [[-2, 0, 0, 0], [1]]


def test_only_the_short_batch_is_dropped():
    batches = EpochBatches(GROUPS, 4, drop_last=True)
    assert [len(batch) for batch in batches.batches(0)] == [4] * 5
    assert len(batches) == 5


def test_the_order_follows_from_seed_and_epoch():
    batches = EpochBatches(GROUPS, 2, seed=1)
    assert batches.batches(4) == EpochBatches(GROUPS, 2, seed=1).batches(4)
    assert batches.batches(4) != batches.batches(5)
    assert batches.batches(4) != EpochBatches(GROUPS, 2, seed=2).batches(4)


def test_without_shuffling_the_order_is_by_group_and_index():
    batches = EpochBatches([1, 0, 1, 0], 2, shuffle=False)
    assert batches.batches(0) == batches.batches(1) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_an_epoch_evenly(drop_last):
    shares = [
        EpochBatches(GROUPS, 2, drop_last=drop_last, index=i, count=3).batches(2) for i in range(3)
    ]
    assert {len(share) for share in shares} == {len(EpochBatches(GROUPS, 2, index=0, count=3))}
    taken = Counter(i for share in shares for batch in share for i in batch)
    assert max(taken.values()) == 1
    # Of 11 batches, 9 are taken; of 10 whole ones, 9.
    assert sum(map(len, shares)) == 9


def test_samples_get_other_numbers_in_every_epoch():
    first, second = (
        dict(sample for batch in epoch for sample in batch)
        for epoch in (read(loader(), 11), read(loader(), 22)[11:])
    )
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 10, 11, 15, 22])
def test_a_resumed_loader_goes_on_as_if_never_stopped(workers, stop):
    expected = read(loader(), 30)
    before = loader(workers)
    assert read(before, stop) == expected[:stop]
    after = loader(workers)
    after.load_state_dict(before.state_dict())
    assert read(after, 30 - stop) == expected[stop:]


def test_an_epoch_that_is_left_early_is_over():
    here = loader()
    next(iter(here))
    assert here.state_dict() == {"epoch": 0, "batch": 1}
    whole = [sample for batch in here for sample in batch]
    assert len(whole) == len(GROUPS)
    assert whole == [tuple(d) for batch in _epoch(1) for d in batch]


def _epoch(number):
    batches = EpochBatches(GROUPS, 2, seed=3)
    batches.load_state_dict({"epoch": number, "batch": 0})
    return batches


def test_behind_the_last_batch_is_before_the_next_epoch():
    here = loader()
    list(here)
    assert here.state_dict() == {"epoch": 1, "batch": 0}


def test_the_length_of_a_resumed_loader_is_that_of_an_epoch():
    here = loader()
    here.load_state_dict({"epoch": 2, "batch": 9})
    assert len(here) == 11
    assert len(list(here)) == 2


@pytest.mark.parametrize("length", [11, 12, 1])
def test_shards_are_a_partition(length):
    shards = [list(Shard(length, i, 2)) for i in range(2)]
    assert sorted(shards[0] + shards[1]) == list(range(length))
    loaders = [DataLoader(range(length), sampler=Shard(length, i, 2)) for i in range(2)]
    assert sum(len(loader) for loader in loaders) == length


def test_aspect_groups_are_symmetric_and_bounded():
    ratios = torch.tensor([0.01, 0.5, 2**-0.34, 0.9, 1.0, 1.1, 2**0.34, 2.0, 100.0])
    assert aspect_groups(ratios).tolist() == [-3, -3, -1, 0, 0, 0, 1, 3, 3]


def test_lists_are_collated_by_part():
    images = [torch.zeros(3, 2, 2), torch.zeros(3, 4, 4)]
    first, second = collate_lists(list(zip(images, "ab", strict=True)))
    assert first == images
    assert second == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive; got 0"),
        ({"batch_size": 2, "index": 2, "count": 2}, "index must be from 0 to count - 1 = 1; got 2"),
        ({"batch_size": 30, "drop_last": True}, "got 21 with drop_last=True"),
        ({"batch_size": 2, "count": 12}, "on each of 12 processes; got 21"),
    ],
)
def test_batches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EpochBatches(GROUPS, **options)
