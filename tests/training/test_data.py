"""Every sample has its turn: in training once an epoch, in evaluation once over all processes."""

from types import SimpleNamespace

import pytest

pytest.importorskip("pytorch_lightning")

import torch
from torch.utils.data import Dataset

from efficient_attention.data.draws import as_draw
from efficient_attention.errors import InputError
from efficient_attention.training.data import Data, DetectionData


class Indices(Dataset):
    """Samples that are their index, and the seed of their draw."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        draw = as_draw(key, self.length)
        return torch.tensor([draw.item, draw.seed])


class Shapes(Indices):
    aspect_ratios = torch.tensor([1.0, 2.0] * 4)

    def __getitem__(self, key):
        return torch.zeros(3, 1, 1), {"image_id": as_draw(key, self.length).item}


def made(kind=Data, stage="fit", process=(0, 1), **options):
    data = kind(**{"workers": 0, **options})
    data._process = lambda: process
    data.setup(stage)
    return data


def test_evaluation_takes_every_sample_once_over_all_processes():
    taken = []
    for rank in range(3):
        data = made(stage="test", process=(rank, 3), test=lambda: Indices(7), eval_batch_size=2)
        for number, batch in enumerate(data.test_dataloader()):
            assert batch[:, 0].tolist() == data.indices(number, len(batch))
            taken += batch[:, 0].tolist()
    assert sorted(taken) == list(range(7))


def test_prediction_takes_the_test_data_if_it_has_none():
    assert len(made(stage="predict", test=lambda: Indices(3)).predict_dataloader()) == 3
    other = made(stage="predict", test=lambda: Indices(3), predict=lambda: Indices(5))
    assert len(other.predict_dataloader()) == 5


def test_training_takes_whole_batches_and_shares_them_out():
    def batches(rank):
        data = made(process=(rank, 2), train=lambda: Indices(9), batch_size=4)
        return [batch[:, 0].tolist() for batch in data.train_dataloader()]

    first, second = batches(0), batches(1)
    assert [len(batch) for batch in first + second] == [2, 2, 2, 2]
    assert len({i for batch in first + second for i in batch}) == 8


def test_another_seed_is_another_order():
    def order(seed):
        data = made(train=lambda: Indices(20), batch_size=1, seed=seed)
        return [batch.flatten().tolist() for batch in data.train_dataloader()]

    assert order(0) == order(0)
    assert [i for i, _ in order(0)] != [i for i, _ in order(1)]
    assert sorted(i for i, _ in order(1)) == list(range(20))


def test_pictures_of_like_shape_make_a_batch():
    data = made(DetectionData, train=lambda: Shapes(8), batch_size=2)
    for images, targets in data.train_dataloader():
        assert len(images) == 2
        first, second = (target["image_id"] for target in targets)
        assert first % 2 == second % 2


def test_data_sets_are_made_when_they_are_needed():
    def fail():
        raise OSError("no such folder")

    data = made(stage="validate", train=fail, val=lambda: Indices(2), test=fail)
    assert len(data.val_dataloader()) == 2
    with pytest.raises(InputError, match=r"data\.test cannot be used: no such folder"):
        data.setup("test")


def run_at(processed, ready, batch):
    epoch = SimpleNamespace(processed=processed, ready=ready)
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=epoch),
        epoch_loop=SimpleNamespace(
            batch_progress=SimpleNamespace(current=SimpleNamespace(ready=batch))
        ),
    )
    return SimpleNamespace(fit_loop=loop)


@pytest.mark.parametrize(
    ("place", "position"),
    [
        ((0, 0, 0), {"epoch": 0, "batch": 0}),
        ((2, 3, 4), {"epoch": 2, "batch": 4}),
        ((3, 3, 9), {"epoch": 3, "batch": 0}),
    ],
    ids=["new", "inside", "between"],
)
def test_batches_begin_where_the_run_is(place, position):
    data = made(train=lambda: Indices(20), batch_size=2)
    data.trainer = run_at(*place)
    assert data._position() == position
    rest = [batch.tolist() for batch in data.train_dataloader()]
    data.trainer = run_at(position["epoch"], position["epoch"] + 1, 0)
    whole = [batch.tolist() for batch in data.train_dataloader()]
    assert rest == whole[position["batch"] :]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 5}])
def test_inside_an_epoch_the_order_must_be_that_of_the_checkpoint(changed):
    options = {"train": lambda: Indices(20), "batch_size": 2}
    data = made(**{**options, **changed})
    data.load_state_dict(made(**options).state_dict())
    data.trainer = run_at(2, 2, 0)
    assert data._position() == {"epoch": 2, "batch": 0}
    data.trainer = run_at(2, 3, 4)
    with pytest.raises(InputError, match="must have seed and batch_size of the checkpoint"):
        data._position()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1; got 0"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Data(**options)
