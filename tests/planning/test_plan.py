"""A plan agrees with what a model really takes, allocates nothing and changes nothing."""

import copy
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from efficient_attention import EfficientAttention2d, EfficientAttention3d, create_model, plan
from efficient_attention.memory import peak_bytes
from efficient_attention.planning.kinds import build
from efficient_attention.planning.units import parse_bytes
from efficient_attention.surgery.hosts import attach


class UNet(nn.Module):
    """Skips keep early maps alive to the end."""

    def __init__(self, channels=16):
        super().__init__()
        self.down1, self.down2 = block(3, channels), block(channels, 2 * channels)
        self.middle = block(2 * channels, 2 * channels)
        self.up1 = block(3 * channels, channels)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        first = self.down1(x)
        middle = self.middle(self.down2(F.max_pool2d(first, 2)))
        return self.head(self.up1(torch.cat([F.interpolate(middle, scale_factor=2), first], 1)))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(16, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.ReLU())
        self.up = nn.ConvTranspose3d(16, 8, 3, 2, 1, 1)

    def forward(self, x):
        return self.up(self.body(self.stem(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 8, 8)
        layers = [nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True) for _ in range(3)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


def block(channels, out):
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


NETWORKS = {
    "resnet": (lambda: create_model("resnet_small", "none"), (2, 3, 128, 128), "layer1"),
    "unet": (UNet, (1, 3, 64, 96), "middle"),
    "volumes": (Volumes, (2, 2, 16, 24, 24), "body"),
    "transformer": (Transformer, (2, 3, 160, 160), "embed"),
}


def run(model, x, training):
    if not training:
        with torch.no_grad():
            return model(x)
    return sum(y.sum() for y in tree_leaves(model(x))).backward()


def measured(model, x, training):
    """Bytes of all that is there at one time: parameters, buffers, input, and what a pass adds."""
    model.train(training)
    standing = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))
    return standing + peak_bytes(lambda: run(model, x, training))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_peaks_are_those_measured(name, training):
    make, shape, place = NETWORKS[name]
    x, model = torch.randn(shape), make()
    planned = plan(model, x, places=place, optimizer_states=0)
    (at,) = planned.places
    assert set(at.costs) == {"efficient", "explicit", "fused"}
    costs = {"plain": planned.plain, **at.costs}
    for kind, cost in costs.items():
        candidate = copy.deepcopy(model)
        if kind != "plain":
            own = {"device": "cpu", "dtype": torch.float32}
            attention = build(kind, len(shape) - 2, at.channels, own)
            attach(candidate.get_submodule(place), attention)
        predicted = cost.training if training else cost.inference
        assert predicted == pytest.approx(measured(candidate, x, training), rel=0.15), kind


def test_a_plan_of_what_no_machine_holds_takes_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv3d(8, 32, 3, padding=1), nn.ReLU())
        volume = torch.empty(1, 8, 48, 64, 128)
    planned = plan(model, volume, places="0", budget="16 GiB")
    costs = planned.places[0].costs
    # One float32 map of 393,216 x 393,216 is 576 GiB.
    assert costs["explicit"].inference > 576 * 2**30
    assert planned.fits(costs["explicit"]) == "nothing"
    assert planned.fits(costs["efficient"]) == "training"
    # The scores and their product with values: N x N x (dk + dv).
    assert costs["explicit"].multiply_adds > 393_216**2 * (16 + 32)
    grown = peak_bytes(lambda: plan(model, volume, places="0"))
    assert grown < 2**20


def test_planning_leaves_model_mode_and_random_numbers_as_they_were():
    model, x = create_model("resnet_small", "none").train(), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    plan(model, x, places="layer1")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_default_places_are_those_a_network_names():
    planned = plan(create_model("resnet_small", "none"), torch.randn(1, 3, 64, 64))
    assert [p.name for p in planned.places] == ["layer1", "layer2", "layer3", "layer4"]
    assert [p.positions for p in planned.places] == [256, 64, 16, 4]


def test_a_detector_is_planned_up_to_where_values_decide():
    model = create_model("mask_rcnn_small", "none", num_classes=3, min_size=64, max_size=96)
    planned = plan(model.eval(), [torch.rand(3, 64, 96)])
    assert planned.stopped_at == "rpn"
    assert "what follows is not counted" in str(planned)
    assert [p.name for p in planned.places if "fpn" in p.name] != []


class Picky(nn.Module):
    """Runs in some modes and not in others, and may return something else in training."""

    def __init__(self, train=None, evaluate=lambda x: x):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.train_with, self.evaluate_with = train, evaluate

    def forward(self, x):
        if self.training and self.train_with is None:
            raise AssertionError("targets should not be none\nin training mode")
        return (self.train_with if self.training else self.evaluate_with)(self.layer(x))


def test_training_is_planned_in_evaluation_mode_where_training_mode_does_not_run():
    x = torch.randn(1, 3, 64, 64)
    picky, plain = (plan(model, x) for model in (Picky(), Picky(lambda x: x)))
    assert picky.places == plain.places
    assert picky.notes[-1] == (
        "training is planned in evaluation mode, with gradients: in training mode the model raises "
        "AssertionError: targets should not be none"
    )
    assert len(plain.notes) == 1


def test_training_that_ends_before_a_place_is_planned_in_evaluation_mode():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

        def forward(self, x):
            return self.layer(x[:, :, : int(x.sum())] if self.training else x)

    planned = plan(Late(), torch.randn(1, 3, 64, 64), places="layer")
    assert planned.places[0].costs["efficient"].training > 0
    why = "stops at the model, where aten._local_scalar_dense.default needs values, and has not called ['layer']"
    assert why in planned.notes[-1]


def test_training_that_cannot_be_planned_is_told_and_fits_nothing():
    def detached(x):
        return x.detach()

    model = Picky(detached, detached)
    planned = plan(model, torch.randn(1, 3, 64, 64), places="layer", budget="1 TB")
    for cost in (planned.plain, *planned.places[0].costs.values()):
        assert cost.training is None
        assert planned.fits(cost) == "inference"
    assert planned.notes[-1].startswith("training is not planned: the model raises ValueError")
    assert "?" in str(planned)


def test_fused_attention_has_no_scaling_which_is_told():
    planned = plan(Picky(), torch.randn(1, 3, 16, 16), normalization="scaling")
    assert set(planned.places[0].costs) == {"efficient", "explicit"}
    assert "there is no fused attention under scaling" in planned.notes


def test_what_cpu_operators_hold_is_left_out_for_a_gpu():
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), torch.randn(2, 16, 64, 64)
    standing = x.nbytes + sum(p.nbytes for p in model.parameters())
    gpu = plan(model, x, places="0", device="cuda").plain.inference
    cpu = plan(model, x, places="0").plain.inference
    assert gpu == standing + x.nbytes  # the output
    assert cpu >= standing + 2 * x.nbytes  # and a copy


def test_the_largest_places_are_shown_and_the_rest_is_told(monkeypatch):
    monkeypatch.setattr(sys.modules[plan.__module__], "_MOST_PLACES", 2)
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)) for _ in range(3)]
    planned = plan(nn.Sequential(*layers), torch.empty(1, 3, 32, 32))
    assert [place.name for place in planned.places] == ["0", "1"]
    assert "1 smaller places are left out; name them" in planned.notes


def test_a_compiled_model_is_planned_as_it_is_written():
    model, x = Picky(lambda x: x), torch.randn(1, 3, 32, 32)
    compiled = plan(torch.compile(model), x, places="_orig_mod.layer")
    assert compiled.places[0].costs == plan(model, x, places="layer").places[0].costs


def test_autocast_around_a_plan_is_that_of_the_model():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 1000, 64)
    full = plan(model, x, places="0").places[0].costs["fused"].inference
    with torch.autocast("cpu", torch.bfloat16):
        half = plan(model, x, places="0").places[0].costs["fused"].inference
    assert half < full


def test_the_table_of_a_plan_fits_a_terminal_and_says_what_fits():
    planned = plan(
        create_model("resnet_small", "none"), torch.randn(1, 3, 224, 224), budget="200 MB"
    )
    lines = str(planned).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith("fits 191 MiB")
    assert any(line.startswith("layer1: 1 x 64 x 56 x 56, 3,136 positions") for line in lines)
    plain = json.loads(json.dumps(planned.as_dict()))["plain"]
    assert plain["parameters"] == 5_418_792
    assert plain["fits"] == "training"


def test_a_large_network_is_planned_in_seconds():
    with torch.device("meta"):
        model, x = create_model("resnet50", "none"), torch.empty(8, 3, 1024, 1024)
    start = time.process_time()
    plan(model, x)
    assert time.process_time() - start < 20


def test_options_of_the_attention_count():
    model, x = create_model("resnet_small", "none"), torch.randn(1, 3, 64, 64)
    few = plan(model, x, places="layer2", key_channels=8, value_channels=16).places[0]
    many = plan(model, x, places="layer2", key_channels=64, value_channels=128).places[0]
    assert few.costs["efficient"].parameters == EfficientAttention2d(
        128, 8, 16
    ).keys.weight.numel() * 2 + (8 * 2 + 128 * 16 * 2 + 16 + 128)
    assert few.costs["efficient"].multiply_adds < many.costs["efficient"].multiply_adds


@pytest.mark.parametrize(
    ("size", "number"),
    [("8 GiB", 8 * 2**30), ("500 MB", 5 * 10**8), ("1.5kib", 1536), (4096, 4096), ("7 B", 7)],
)
def test_budgets_are_read_with_their_units(size, number):
    assert parse_bytes("budget", size) == number


@pytest.mark.parametrize("size", ["", "GiB", "8 GiBs", "-1 GiB", "0 MB", "8,5 GB", 0])
def test_what_is_no_budget_is_an_error(size):
    with pytest.raises(ValueError, match="budget must be a positive size such as '8 GiB'"):
        plan(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4), budget=size)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (F.relu, {}, TypeError, "model must be an nn.Module; got function"),
        (nn.Conv2d(4, 4, 1), {}, ValueError, "model must run on input; .*RuntimeError"),
        (nn.Conv2d(3, 4, 1), {"heads": 2}, ValueError, "options must be among .*got 'heads'"),
        (nn.Conv2d(3, 4, 1), {"optimizer_states": -1}, ValueError, "optimizer_states must be"),
        (nn.Conv2d(3, 4, 1), {"device": "tpu"}, ValueError, "device must be one of"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"places": "layer9"}, ValueError, "'layer9'"),
    ],
)
def test_what_cannot_be_planned_is_an_error(model, options, error, message):
    with pytest.raises(error, match=message):
        plan(model, torch.randn(1, 3, 4, 4), **options)


def test_attention_over_the_volume_of_a_stereo_network_keeps_to_its_plan():
    """Forward and backward over 48 x 64 x 128 positions, which an N x N map would need 576 GiB for."""
    attention = EfficientAttention3d(32, init="official")
    x = torch.randn(1, 32, 48, 64, 128)
    planned = plan(nn.Sequential(attention), x, places="0", optimizer_states=0).plain
    assert planned.training == pytest.approx(measured(attention, x, True), rel=0.15)
    assert planned.training < 2**29
