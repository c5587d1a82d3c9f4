"""Sums of a model's bytes and of attention's against runs of the model with that attention really in it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficient_attention.planning.candidates import Survey
from efficient_attention.planning.kinds import KINDS, build
from efficient_attention.planning.runs import Runs
from efficient_attention.planning.simulation import Timeline, Twin, nbytes
from efficient_attention.surgery.hosts import attach


class Sums(nn.Module):
    """Places that producers keep, that consumers keep, that both keep and that nobody keeps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)  # kept by the next layer alone
        self.relu = nn.ReLU()  # kept by itself, and by the next layer
        self.second = nn.Conv2d(16, 16, 3, padding=1)  # an addend: kept by nobody
        self.changed = nn.ReLU(inplace=True)
        self.same = nn.Identity()  # returns what it gets
        self.exponential = nn.Softplus()  # keeps its input; its own output goes to an addition
        self.last = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.changed(self.second(x) + x)
        y = self.same(y) + self.exponential(y)
        return self.last(torch.cat([y[:, :8], x[:, 8:]], 1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.inside = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.last = nn.Conv2d(16, 1, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = checkpoint(self.inside, self.first(x).sin(), use_reentrant=self.use_reentrant)
        return self.last(x)


def frozen(trained):
    """A network whose first layers are not trained."""
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)]
    network = nn.Sequential(*layers)
    network[:4].requires_grad_(False)
    network[4].requires_grad_(trained)
    return network


class Twice(nn.Module):
    """A module that is called more than once, with features of different sizes."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        small = self.shared(F.avg_pool2d(x, 2))
        return self.last(self.shared(x)), self.last(small)


class Tokens(nn.Module):
    """Transformer layers: tokens, in two orders of memory, behind a residual sum."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Conv2d(3, 32, 4, stride=4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1) for _ in range(2)
        )

    def forward(self, x):
        x = self.embedding(x).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class LatePeak(nn.Module):
    """The most memory is taken behind the place, in the backward pass of what was not kept."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.place = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(8, 64, 1))

    def forward(self, x):
        def many(x):
            for _ in range(8):
                x = x.sin()
            return x

        return self.place(checkpoint(many, self.first(x), use_reentrant=False))


class Reordered(nn.Module):
    """Tokens whose memory has another order: attention keeps a copy, and the network the tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = PositionsFirst()
        self.last = nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.tokens(x))


class PositionsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 32)

    def forward(self, x):
        x = self.linear(x.flatten(2).permute(2, 0, 1))  # [N, B, 32]
        return x.relu().transpose(0, 1)


CASES = {
    "sums": (Sums, ["first", "relu", "second", "changed"]),
    "checkpoint": (lambda: Checkpointed(False), ["first", "inside.1", "inside"]),
    "reentrant checkpoint": (lambda: Checkpointed(True), ["first", "inside.0"]),
    "frozen": (lambda: frozen(trained=True), ["0", "1", "3"]),
    "all frozen": (lambda: frozen(trained=False), ["0", "3"]),
    "twice": (Twice, ["shared"]),
    "late peak": (LatePeak, ["place"]),
    "reordered": (Reordered, ["tokens"]),
    "tokens": (Tokens, ["embedding", "layers.0"]),
}


# Where the gradient of what a place returns is held by another too: by the other addend of a sum, by a checkpoint.
SHARED = {
    "sums": (Sums, ["same", "exponential"]),
    "reentrant checkpoint": (lambda: Checkpointed(True), ["inside"]),
}


def simulated(model, example, training):
    twin = Twin(model, example)
    twin.model.train(training)
    timeline = Timeline(twin.resident())
    twin.run(timeline, gradients=training)
    return max(timeline.levels) + nbytes(twin.resident())


def planned_and_simulated(create, names):
    """Planned costs, the same with the attention in the model, and bytes of what the place returns, one by one."""
    model, x = create(), torch.randn(2, 3, 32, 24)
    twin = Twin(model, x)
    places = Survey(model, twin).chosen(names)
    assert [place.name for place in places] == names
    runs = Runs(twin, names, temporaries=True, optimizer_states=0)
    assert runs.notes == []
    plain = runs.plain()
    yield plain, simulated(model, x, False), simulated(model, x, True), 0
    for place in places:
        planned = runs.at(place, {"num_heads": 2}).costs
        assert set(planned) == set(KINDS)
        for kind, cost in planned.items():
            changed = copy.deepcopy(model)
            options = {"num_heads": 2, "device": "cpu", "dtype": torch.float32}
            attention = build(kind, place.dimensions, place.channels, options)
            attach(changed.get_submodule(place.name), attention)
            assert cost.parameters == sum(p.numel() for p in attention.parameters())
            size = 4 * math.prod(place.shape)
            yield cost, simulated(changed, x, False), simulated(changed, x, True), size


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", CASES)
def test_sum_is_what_the_model_with_attention_takes(case):
    for cost, inference, training, _ in planned_and_simulated(*CASES[case]):
        assert cost.inference == inference
        # Markers and starts of backward passes have a few bytes.
        assert cost.training == pytest.approx(training, abs=20)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", SHARED)
def test_sum_is_off_by_one_tensor_at_most_where_a_gradient_is_shared(case):
    for cost, inference, training, size in planned_and_simulated(*SHARED[case]):
        assert cost.inference == inference
        assert cost.training == pytest.approx(training, abs=size + 20)


def test_what_the_optimizer_keeps_is_counted_for_trained_parameters():
    model, x = frozen(trained=True), torch.randn(1, 3, 16, 16)
    twin = Twin(model, x)
    (place,) = Survey(model, twin).chosen("3")

    def costs(states):
        runs = Runs(twin, ["3"], temporaries=True, optimizer_states=states)
        return runs.plain(), runs.at(place, {}).costs["efficient"]

    (plain, efficient), (plain_adam, efficient_adam) = costs(0), costs(2)
    trained = sum(p.nbytes for p in model[4].parameters())
    assert plain_adam.inference == plain.inference
    assert plain_adam.training == plain.training + 2 * trained
    assert efficient_adam.training == efficient.training + 2 * (trained + 4 * efficient.parameters)


def test_multiply_adds_are_those_of_the_formulas():
    # N positions, C channels, Dk = C / 2, Dv = C.
    n, c = 32 * 24, 16
    model, x = nn.Sequential(nn.Conv2d(3, c, 1)), torch.randn(2, 3, 32, 24)
    twin = Twin(model, x)
    (place,) = Survey(model, twin).chosen("0")
    costs = Runs(twin, ["0"], temporaries=True, optimizer_states=0).at(place, {}).costs
    projections = n * c * (c // 2 + c // 2 + c + c)
    assert costs["explicit"].multiply_adds == 2 * (projections + n * n * (c // 2 + c))
    # Fused attention wants as many channels of keys as of values, and gets zeros.
    assert costs["fused"].multiply_adds == 2 * (projections + n * n * (c + c))
    # Folded: keys, queries and both products, and two products of a context's size.
    small = (c // 2) * c * c * 2
    assert costs["efficient"].multiply_adds == 2 * (n * 4 * c * (c // 2) + small)
