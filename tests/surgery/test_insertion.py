"""Insertion and removal: attention goes into any model and out again, and the model's own names and abilities stay."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import efficient_attention as ea
from efficient_attention import surgery
from efficient_attention.surgery import insert, remove

IMAGE = (2, 3, 16, 12)


class Block(nn.Module):
    """A host with a forward of its own, unlike nn.Sequential."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = Block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))


PLACES = ["layer1", "layer2", "layer1.0", "layer2.conv"]


def inserted(places=("layer1", "layer2"), **options):
    model, x = Network(), torch.randn(IMAGE)
    report = insert(model, places, example=x, **options)
    return model, x, report


def awake(model):
    """Give every inserted reprojection weights, so that the attention is seen in the output."""
    for name, parameter in model.named_parameters():
        if "inserted_attention.reprojection" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("place", [*PLACES, "*"])
def test_insertion_leaves_outputs_bit_identical(mode, place):
    places = PLACES if place == "*" else [place]
    model, x = Network(), torch.randn(IMAGE)
    model.train(mode == "train")
    twin = copy.deepcopy(model)
    report = insert(model, places, example=x)
    assert torch.equal(model(x), twin(x))
    assert {c.outputs for c in report.changes} == {"unchanged"}
    assert all(m.training == (mode == "train") for m in model.modules())
    assert not torch.equal(awake(model)(x), twin(x))


@pytest.mark.parametrize("place", PLACES)
def test_attention_is_applied_to_the_output_of_the_place(place):
    model, x, _ = inserted(place, init="official")
    model.eval()
    plain = copy.deepcopy(model)
    attention = plain.get_submodule(f"{place}.inserted_attention")
    remove(plain)
    host = plain.get_submodule(place)
    host.register_forward_hook(lambda module, inputs, output: attention(output))
    assert torch.equal(model(x), plain(x))


def test_report_names_exactly_the_new_keys_and_the_old_ones_keep_their_order():
    before = list(Network().state_dict())
    model, _, report = inserted(PLACES)
    after = list(model.state_dict())
    assert [key for key in after if key not in report.new_keys] == before
    assert set(after) - set(before) == set(report.new_keys)
    assert "layer1.0.inserted_attention.keys.weight" in report.new_keys
    added = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in Network().parameters()
    )
    assert sum(c.parameters for c in report.changes) == added


def test_a_checkpoint_of_the_plain_model_loads_but_for_the_new_keys():
    plain = Network()
    model, _, report = inserted()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == set(report.new_keys)
    assert unexpected == []
    x = torch.randn(IMAGE)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_report_prints_a_table():
    _, _, report = inserted({"layer1": {"num_heads": 2}, "layer2": {"kind": "non_local"}})
    assert str(report) == (
        "name    what                           dimensions  channels  parameters  outputs\n"
        "layer1  EfficientAttention2d inserted  2           8         216         unchanged\n"
        "layer2  NonLocal2d inserted            2           8         216         unchanged\n"
        "16 new state_dict keys: layer1.inserted_attention.*, layer2.inserted_attention.*"
    )


# What a model with insertions can still do.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_attend_with_their_own_weights(copied):
    model, x, _ = inserted(PLACES)
    model = awake(model).eval()
    twin = copied(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(x), expected)
    assert len(remove(twin).changes) == len(PLACES)


def test_an_unpickled_model_keeps_its_attention_when_hooks_are_added_in_a_new_process(tmp_path):
    # Numbers of hooks start from 0 in every process.
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    insert(model, "0", example=torch.randn(IMAGE), init="official")
    x = torch.randn(IMAGE)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "model[0].register_forward_hook(lambda module, inputs, output: None)\n"
        "torch.testing.assert_close(model(x), y)\n"
    )
    environment = {"PYTHONPATH": str(Path(ea.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, env=environment)


def test_compiles_to_one_graph():
    model, x, _ = inserted()
    awake(model).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.layer2.inserted_attention.values.weight.grad is not None


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_free_sizes(strict):
    model, x, _ = inserted()
    awake(model).eval()
    free = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=({**free},), strict=strict)
    other = torch.randn(2, 3, 20, 8)
    torch.testing.assert_close(program.module()(other), model(other))


def test_trains_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x, _ = inserted(PLACES)
        model(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        DistributedDataParallel(model)(x).square().sum().backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(got, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_reach_every_new_parameter_after_one_step():
    model, x, _ = inserted(PLACES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        # Softmax over positions does not see the key bias.
        if "inserted_attention" in name and "keys.bias" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_device_and_dtype_follow_the_host():
    model = Network().double()
    model.layer2.to(torch.bfloat16)
    x = torch.randn(IMAGE, dtype=torch.float64)
    insert(model, {"layer1": {}, "layer1.0": {}}, example=x)
    insert(model, "layer2", in_channels=8, dimensions=2)
    assert model.layer1.inserted_attention.keys.weight.dtype == torch.float64
    assert model.layer2.inserted_attention.keys.weight.dtype == torch.bfloat16
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    meta = nn.Sequential(nn.Conv2d(3, 8, 1, device="meta"), nn.ReLU())
    insert(meta, "1", in_channels=8, dimensions=2)
    assert meta[1].inserted_attention.keys.weight.device.type == "meta"


def test_the_dtype_is_that_of_the_last_parameter_or_of_the_output_where_it_is_seen():
    class Cast(nn.Sequential):
        """Normalizes in float32 between layers in bfloat16."""

        def forward(self, x):
            return self[1](self[0](x).float()).bfloat16()

    def cast():
        return nn.ModuleDict({"a": Cast(nn.Conv2d(3, 8, 1).bfloat16(), nn.GroupNorm(2, 8))})["a"]

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = cast()

        def forward(self, x):
            return self.layers(x)

    x = torch.randn(IMAGE, dtype=torch.bfloat16)
    for options, dtype in (({"example": x}, torch.bfloat16), ({}, torch.float32)):
        model = nn.Sequential(Host())
        given = {"in_channels": 8, "dimensions": 2} if not options else {}
        insert(model, "0.layers.0", example=options.get("example"), **given)
        assert model[0].layers[0].inserted_attention.keys.weight.dtype == torch.bfloat16
        insert(model, "0", example=options.get("example"), **given)
        assert model[0].inserted_attention.keys.weight.dtype == dtype


def test_modules_inserted_one_after_another_start_from_weights_of_their_own():
    model = Network()
    for place in ("layer1.0", "layer1.1"):
        insert(model, place, in_channels=8, dimensions=2)
    keys = [m.keys.weight for m in model.modules() if isinstance(m, ea.EfficientAttention2d)]
    assert not torch.equal(keys[0], keys[1])


def test_looking_at_a_model_draws_no_random_numbers():
    model = Network()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="'layer9'"):
        insert(model, "layer9", example=torch.zeros(IMAGE))
    with pytest.raises(ValueError, match="heads"):
        insert(model, "layer1", example=torch.zeros(IMAGE), heads=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_plain_model_lends_no_program_where_hooks_are_guarded():
    torch.compiler.reset()
    plain = Network().eval()
    model, x = copy.deepcopy(plain), torch.randn(IMAGE)
    insert(model, "layer2", example=x, init="official")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for network in (plain, model):
            torch.testing.assert_close(torch.compile(network, backend="eager")(x), network(x))


@pytest.mark.parametrize("place", ["0.0", "1"])
def test_a_compiled_model_is_refused(place):
    def plain():
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.ReLU())

    given = {"in_channels": 4, "dimensions": 2}
    model = plain()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"the model is compiled, .*insert, then compile"):
        insert(model, place, **given)
    model = torch.compile(plain(), backend="eager")
    with pytest.raises(ValueError, match=f"got '_orig_mod.{place}' .*the model is compiled"):
        insert(model, f"_orig_mod.{place}", **given)
    model = plain()
    model[0].compile(backend="eager")
    if place == "0.0":
        with pytest.raises(ValueError, match="'0' is compiled"):
            insert(model, place, **given)
    else:
        insert(model, place, **given)


def test_the_dry_run_leaves_no_trace():
    model = Network()
    state = copy.deepcopy(model.state_dict())
    model.layer2.register_forward_hook(lambda module, inputs, output: None)
    hooks = dict(model.layer2._forward_hooks)
    insert(model, "layer1.1", example=torch.randn(IMAGE))
    assert dict(model.layer2._forward_hooks) == hooks
    assert model.training
    torch.testing.assert_close({k: model.state_dict()[k] for k in state}, state, rtol=0, atol=0)


# Out again.


@pytest.mark.parametrize("places", [None, PLACES, "*"])
def test_removal_restores_everything(places):
    plain = Network()
    model = copy.deepcopy(plain)
    x = torch.randn(IMAGE)
    report = insert(model, PLACES, example=x, init="official")
    gone = remove(model, places)
    assert gone.removed_keys == report.new_keys
    assert [c.parameters for c in gone.changes] == [-216] * 4
    assert {c.outputs for c in gone.changes} == {"restored"}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(model(x), plain(x))
    assert remove(model) == surgery.Report(())


def test_removal_at_one_place_leaves_the_others():
    model, _, _ = inserted(PLACES)
    assert [c.name for c in remove(model, "layer1").changes] == ["layer1"]
    assert [c.name for c in remove(model).changes] == ["layer1.0", "layer2", "layer2.conv"]


def test_a_place_takes_one_attention():
    for place in ("layer1", "layer2"):
        model, x, _ = inserted()
        with pytest.raises(ValueError, match=f"'{place}' .*has inserted attention already"):
            insert(model, place, example=x)


def test_remove_says_where_nothing_is():
    model, _, _ = inserted("layer2")
    with pytest.raises(ValueError, match="'layer1' by 'layer1', but nothing is inserted there"):
        remove(model, "layer1")
    with pytest.raises(ValueError, match=r"got 'layer\[13\]'; near names: \['layer2'\]"):
        remove(model, "layer[13]")
