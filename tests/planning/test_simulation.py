"""Runs on fake tensors: what they count against sizes known beforehand, and where they end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import efficient_attention
from efficient_attention.memory import peak_bytes
from efficient_attention.planning.simulation import Timeline, Twin, nbytes


def run(model, example, *, gradients=False):
    twin = Twin(model, example)
    timeline = Timeline(twin.resident())
    stop = twin.run(timeline, gradients=gradients)
    return timeline, stop


class Calculation(nn.Module):
    """A module that computes a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def test_timeline_counts_what_is_alive_at_one_time():
    def function(x):
        y = x + 1  # 4,000 bytes, and y
        z = y * 2  # and z: 8,000
        del y
        return z + 1  # z and the result: 8,000

    timeline, _ = run(Calculation(function), torch.ones(1000))
    assert timeline.levels == [4000, 8000, 8000]


def test_views_and_changes_in_place_take_nothing():
    timeline, _ = run(Calculation(lambda x: (x + 1).view(10, 100).mul_(2).t()), torch.ones(1000))
    assert set(timeline.levels) == {4000}


class Exponentials(nn.Module):
    """Three of them, one after another: the backward pass needs each result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        return (x * self.weight).exp().exp().exp().sum()


def test_what_the_backward_pass_needs_is_kept_and_then_released():
    forward, _ = run(Exponentials(), torch.ones(1000))
    assert max(forward.levels) == 8000  # one and the next
    both, _ = run(Exponentials(), torch.ones(1000), gradients=True)
    assert 16_000 <= max(both.levels) < 16_100  # all of them, and the gradient of the last
    assert both.alive == 0


def test_inputs_come_alone_in_tuples_and_in_dicts():
    add = Calculation(lambda x, y: x + y)
    total = Calculation(lambda pictures: sum(picture.sum() for picture in pictures))
    x, y = torch.ones(1000), torch.ones(1000)
    assert run(add, (x, y))[0].levels == [4000]
    assert run(add, {"y": y, "x": x})[0].levels == [4000]
    assert run(total, [x, y])[1] is None


def test_size_does_not_matter():
    # A layer of 4 TB, an input of 4 GB.
    with torch.device("meta"):
        model, x = nn.Linear(10**6, 10**6), torch.empty(1000, 10**6)
    assert peak_bytes(lambda: run(model, x, gradients=True)) < 10**6
    timeline, _ = run(model, x)
    assert max(timeline.levels) == 4 * 10**9
    assert timeline.multiply_adds == 10**15


def test_model_on_meta_is_thought_to_be_on_the_cpu():
    with torch.device("meta"):
        twin = Twin(nn.Linear(2, 3), torch.empty(4, 2))
    assert {x.device.type for x in twin.resident()} == {"cpu"}


def test_tensors_that_are_no_parameters_are_fake_too():
    model = Calculation(lambda x: x + model.offset)
    model.offset = torch.ones(1000)
    twin = Twin(model, torch.ones(1000))
    assert twin.model.offset.device.type == "cpu"
    assert type(twin.model.offset) is not torch.Tensor


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    twin = Twin(model, torch.ones(1, 2)).model
    assert twin[1].weight is twin[0].weight


def test_shared_memory_is_counted_once():
    x = torch.ones(1000)
    assert nbytes([x, x.view(10, 100), x[:5], torch.ones(10)]) == 4040


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x[x > 0], "aten.nonzero.default"),
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: x if x.sum() > 0 else -x, "aten._local_scalar_dense.default"),
    ],
)
def test_a_run_ends_where_values_are_needed_and_says_where(function, operator):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Calculation(function)))
    _, stop = run(model, torch.ones(2, 4))
    assert stop == ("1.1", f"{operator} needs values")


def test_other_errors_are_not_taken_for_an_end_nor_logged(capfd, caplog):
    with pytest.raises(RuntimeError, match=r"\[2, 5\] X \[4, 4\]"):
        run(nn.Linear(4, 4), torch.ones(2, 5))
    assert capfd.readouterr().err == ""
    assert caplog.records == []


def test_backward_begins_from_what_was_held_where_the_run_ended():
    def function(x):
        features = x.exp()
        unused = features * 2
        del unused
        return features[features > 0]

    whole = nn.Sequential(nn.Linear(1000, 1000), Calculation(torch.exp))
    ending = nn.Sequential(nn.Linear(1000, 1000), Calculation(function))
    x = torch.ones(1, 1000)
    # The gradient of the weight is the largest: it is there only if backward got to it.
    assert max(run(ending, x, gradients=True)[0].levels) > 4_000_000
    assert max(run(whole, x, gradients=True)[0].levels) > 4_000_000


def test_multiply_adds_are_those_of_the_forward_pass():
    convolution = nn.Conv2d(8, 16, 3, padding=1)
    timeline, _ = run(convolution, torch.ones(2, 8, 10, 10))
    assert timeline.multiply_adds == 2 * 100 * 8 * 16 * 9


def test_multiply_adds_of_transformers_are_the_same_on_their_fast_path():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.ones(2, 100, 32)
    for model, example in ((layer, x), (attention, (x, x, x))):
        fast = run(model.eval(), example)[0].multiply_adds
        model.register_forward_hook(lambda *_: None)
        slow = run(model.train(), example)[0].multiply_adds
        assert fast == slow > 2 * 2 * 100 * 100 * 32


def test_a_process_that_has_planned_can_be_forked():
    """Its children differentiate, which autograd refuses where it has started threads for devices."""
    code = """
import os, torch, efficient_attention
efficient_attention.plan(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), torch.empty(1, 3, 8, 8), places="0")
child = os.fork()
if not child:
    torch.ones(2, requires_grad=True).sum().backward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    path = str(Path(efficient_attention.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})
