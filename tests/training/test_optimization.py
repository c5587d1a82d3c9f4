"""Learning rates by hand, and what decays."""

import pytest

pytest.importorskip("pytorch_lightning")

import torch
from torch import nn

from efficient_attention.training.optimization import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Rates,
    Steps,
)


def factors(schedule, steps, per_epoch=10, total=40):
    return [schedule.factor(step, steps_per_epoch=per_epoch, total_steps=total) for step in steps]


def test_steps_fall_at_the_beginning_of_their_epochs():
    schedule = Steps(epochs=[1, 2.5], gamma=0.5)
    assert factors(schedule, [0, 9, 10, 24, 25, 39]) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_goes_from_one_to_the_final_factor_at_the_last_step():
    schedule = Cosine(final=0.2)
    # Half way 0.2 + 0.8 / 2; at a third of the way the cosine of 60 degrees is one half: 0.2 + 0.8 * 0.75.
    assert factors(schedule, [0, 10, 15, 30], total=30) == pytest.approx([1, 0.8, 0.6, 0.2])


def test_the_rise_multiplies_what_is_behind_it():
    assert factors(Constant(warmup_steps=4, warmup_from=0.2), [0, 1, 2, 4, 5]) == pytest.approx(
        [0.2, 0.4, 0.6, 1, 1]
    )
    schedule = Steps(epochs=[1], warmup_steps=20, warmup_from=0.0)
    assert factors(schedule, [5, 10, 20]) == pytest.approx([0.25, 0.05, 0.1])


def test_cosine_needs_an_end():
    with pytest.raises(ValueError, match=r"trainer.max_epochs"):
        factors(Cosine(), [0], total=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=0), "lr must be positive; got 0"),
        (lambda: Adam(lr=1, weight_decay=-1), "weight_decay must not be negative; got -1"),
        (lambda: Constant(warmup_steps=-1), "warmup_steps must not be negative; got -1"),
        (lambda: Constant(warmup_from=2), "warmup_from must be from 0 to 1; got 2"),
        (lambda: Steps(epochs=[3, 1]), r"epochs must be positive and ascending; got \[3, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
def test_vectors_decay_only_if_they_are_to(optimizer):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    network[0].bias.requires_grad_(False)
    (group,) = optimizer(lr=1, weight_decay=0.1, decay_vectors=True).build(network).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(3, 2), (3,), (3,)]
    assert group["weight_decay"] == 0.1
    groups = optimizer(lr=1, weight_decay=0.1, decay_vectors=False).build(network).param_groups
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [1, 1]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_network_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="all of them are frozen"):
        SGD(lr=1).build(nn.Linear(1, 1).requires_grad_(False))


def test_rates_are_those_of_the_step_and_of_this_run():
    def make(lr, momentum):
        optimizer = SGD(lr=lr, momentum=momentum).build(nn.Linear(1, 1))
        return optimizer, Rates(optimizer, lambda step: 0.5**step)

    optimizer, rates = make(8.0, 0.9)
    seen = []
    for _ in range(3):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    assert seen == [8, 4, 2]

    resumed, again = make(80.0, 0.5)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(rates.state_dict())
    # The optimizer's state brought the old options; those of this run are put over them.
    assert resumed.param_groups[0]["momentum"] == 0.9
    again.apply()
    assert resumed.param_groups[0]["momentum"] == 0.5
    assert resumed.param_groups[0]["lr"] == 80 * 0.5**3
    assert again.get_last_lr() == [10]


def test_adams_options_reach_pytorch():
    options = Adam(lr=0.1, betas=(0.5, 0.6), eps=0.7).build(nn.Linear(1, 1)).defaults
    assert (options["lr"], options["betas"], options["eps"]) == (0.1, (0.5, 0.6), 0.7)
    assert SGD(lr=1, momentum=0.3, nesterov=True).build(nn.Linear(1, 1)).defaults["nesterov"]
    assert isinstance(AdamW().build(nn.Linear(1, 1)), torch.optim.AdamW)
