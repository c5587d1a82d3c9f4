"""Surgery: attention goes into any model and out again, and the model's own names, numbers and abilities stay."""

import copy
import doctest
import inspect
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
from efficient_attention.surgery import insert, remove, replace

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


class Lines(nn.Module):
    """Features of rank 3 whose layers say which axis holds channels, and one that does not say."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(self.act(self.conv(x)).mT)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


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


@pytest.mark.parametrize("name", ["Report", "insert", "replace", "remove"])
def test_examples_print_what_they_say(name):
    thing = getattr(surgery, name)
    scope = {**vars(surgery), "torch": torch, "efficient_attention": ea}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, name, None, 0)
    assert test.examples
    runner = doctest.DocTestRunner(verbose=False)
    out = []
    runner.run(test, out=out.append)
    assert runner.failures == 0, "".join(out)
    if inspect.isfunction(thing):
        for argument in inspect.signature(thing).parameters:
            assert f"\n    {argument}:" in inspect.getdoc(thing)


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


def test_the_dry_run_leaves_no_trace():
    model = Network()
    state = copy.deepcopy(model.state_dict())
    model.layer2.register_forward_hook(lambda module, inputs, output: None)
    hooks = dict(model.layer2._forward_hooks)
    insert(model, "layer1.1", example=torch.randn(IMAGE))
    assert dict(model.layer2._forward_hooks) == hooks
    assert model.training
    torch.testing.assert_close({k: model.state_dict()[k] for k in state}, state, rtol=0, atol=0)


# Where to, and what flows there.


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("layer2", ["layer2"]),
        (["layer1", "layer2"], ["layer1", "layer2"]),
        ("layer?", ["layer1", "layer2"]),
        ("layer1.[0-9]", ["layer1.0", "layer1.1"]),
        ("*.bn", ["layer1.0.bn", "layer1.1.bn", "layer2.bn"]),
        (
            lambda name, module: isinstance(module, Block) and name != "layer2",
            ["layer1.0", "layer1.1"],
        ),
        ({lambda name, module: name == "stem": {"num_heads": 2}, "layer2": {}}, ["stem", "layer2"]),
    ],
)
def test_places_are_names_patterns_and_predicates(places, expected):
    _, _, report = inserted(places)
    assert [change.name for change in report.changes] == expected


def test_options_of_a_place_go_before_those_of_all():
    model, _, report = inserted(
        {"layer1": {"num_heads": 4}, "layer2": {"kind": "non_local"}},
        num_heads=2,
        key_channels=4,
        normalization="scaling",
    )
    first, second = model.layer1.inserted_attention, model.layer2.inserted_attention
    assert (first.num_heads, second.num_heads) == (4, 2)
    assert isinstance(first, ea.EfficientAttention2d)
    assert isinstance(second, ea.NonLocal2d)
    assert {first.key_channels, second.key_channels} == {4}
    assert {first.normalization, second.normalization} == {"scaling"}
    assert report.changes[1].what == "NonLocal2d inserted"


def test_other_initializations_are_reported_as_changes():
    _, _, report = inserted("layer2", init="official")
    assert report.changes[0].outputs == "changed"


@pytest.mark.parametrize(
    ("model", "place", "shape", "dimensions", "channels"),
    [
        (Lines(), "conv", (2, 3, 10), 1, 8),
        (Lines(), "linear", (2, 3, 10), "tokens", 6),
        (nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU()), "0", (1, 3, 4, 5, 6), 3, 4),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "1", (1, 3, 4, 5), 2, 4),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)), "1", (2, 3, 7), 1, 4),
        (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), "1", (2, 7, 6), "tokens", 4),
        (
            nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), Returns(lambda x: x.mT))
            ),
            "0",
            (2, 3, 6, 6),
            "tokens",
            4,
        ),
    ],
)
def test_dimensions_and_channels_are_those_that_flow(model, place, shape, dimensions, channels):
    x = torch.randn(shape)
    model.eval()
    expected = model(x)
    report = insert(model, place, example=x)
    assert report.changes[0][2:4] == (dimensions, channels)
    assert torch.equal(model(x), expected)


def test_given_dimensions_and_channels_need_no_example():
    model = Lines()
    insert(model, {"act": {"dimensions": 1, "in_channels": 8}})
    assert isinstance(model.act.inserted_attention, ea.EfficientAttention1d)
    insert(model, {"linear": {"dimensions": "tokens", "in_channels": 6, "bias": False}})
    assert model.linear.inserted_attention.keys.bias is None


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_example_is_an_input_a_tuple_or_a_dict(wrap):
    assert insert(Network(), "layer2", example=wrap(torch.randn(IMAGE))).changes[0].channels == 8


def test_what_follows_the_places_may_need_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Returns(lambda x: x[x > x.mean().item()]))
    assert insert(model, "0", example=torch.randn(IMAGE)).changes[0].channels == 4
    with pytest.raises(ValueError, match=r"example must call '1'; it does not before .*give in_ch"):
        insert(model, "1", example=torch.randn(IMAGE))


def test_transformer_encoders_attend_after_a_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 16)
    padding = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])
    expected = model(x), model(x, src_key_padding_mask=padding)
    report = insert(model, "layers.[01]", example=x, num_heads=2)
    assert [c[:4] for c in report.changes] == [
        (f"layers.{i}", "EfficientAttention inserted", "tokens", 16) for i in (0, 1)
    ]
    assert torch.equal(model(x), expected[0])
    assert torch.equal(model(x, src_key_padding_mask=padding), expected[1])
    # Without gradients PyTorch's layer leaves its fused path where there are hooks: the same up to rounding.
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0])


def test_nested_tensors_are_refused_with_the_way_out():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    insert(model, "layers.0.norm2", dimensions="tokens", in_channels=16)
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
    with pytest.raises(
        NotImplementedError, match=r"no nested tensors; build .*enable_nested_tensor"
    ):
        model.layers[0].norm2(nested)


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


# Replacement.


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("normalization", ["scaling", "softmax"])
def test_replacing_a_non_local_block_keeps_weights_and_is_exact_for_scaling(
    dimensions, normalization
):
    kind = (ea.NonLocal1d, ea.NonLocal2d, ea.NonLocal3d)[dimensions - 1]
    block = kind(
        6, 4, 8, num_heads=2, normalization=normalization, init="official", dtype=torch.float64
    )
    model = nn.Sequential(block).eval()
    x = torch.randn(2, 6, *(7, 5, 4)[:dimensions], dtype=torch.float64)
    expected, parameters = model(x), dict(model.named_parameters())
    (change,) = replace(model, "0").changes
    assert type(model[0]).__name__ == f"EfficientAttention{dimensions}d"
    assert change[1:5] == (f"NonLocal{dimensions}d -> {type(model[0]).__name__}", dimensions, 6, 0)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(parameters)
    assert not model[0].training
    exact = normalization == "scaling"
    assert change.outputs == ("exact" if exact else "approximate")
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12) == exact


def test_a_replacement_takes_options():
    block = ea.NonLocal2d(8, normalization="softmax", init="official")
    model = nn.Sequential(block)
    (change,) = replace(model, {"0": {"normalization": "scaling", "order": "linear"}}).changes
    assert change.outputs == "approximate"
    assert (model[0].normalization, model[0].order) == ("scaling", "linear")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
)
def test_replacing_multihead_attention_keeps_weights_and_names(options):
    old = nn.MultiheadAttention(8, 2, **options)
    model, state = nn.ModuleDict({"attention": old}), copy.deepcopy(old.state_dict())
    parameters = dict(old.named_parameters())
    (change,) = replace(model, "*").changes
    assert change == (
        "attention",
        "MultiheadAttention -> MultiheadEfficientAttention",
        "tokens",
        8,
        0,
        "approximate",
    )
    new = model["attention"]
    assert all(parameters[name] is parameter for name, parameter in new.named_parameters())
    torch.testing.assert_close(dict(new.state_dict()), dict(state), rtol=0, atol=0)
    query, key, value = (torch.randn(4, 3, c) for c in (8, new.kdim, new.vdim))
    other = ea.MultiheadEfficientAttention(8, 2, **options)
    other.load_state_dict(state)
    assert torch.equal(new(query, key, value)[0], other(query, key, value)[0])


def test_replacing_every_attention_of_an_encoder_takes_one_line():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 16)
    keys, before = list(model.state_dict()), model(x)
    report = replace(model, "*", dropout=0.0)
    assert [c.name for c in report.changes] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(model(x), model(x), strict=True))


# Errors.


class Loop(nn.Module):
    """Goes over its children, and none of PyTorch's containers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Head(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean((2, 3))


def shared():
    block = nn.Conv2d(3, 3, 1)
    return nn.Sequential(block, nn.ReLU(), block)


def in_a_row(*modules):
    return nn.Sequential(*modules)


@pytest.mark.parametrize(
    ("model", "places", "options", "error", "message"),
    [
        (Network, "layer3", {}, ValueError, "got 'layer3'; near names: .*'layer2'"),
        (
            Network,
            "layer.*",
            {},
            ValueError,
            "must match modules; got 'layer.*'; near names: .*layer1",
        ),
        (Network, lambda name, module: False, {}, ValueError, "must match modules; got '<lambda>'"),
        (
            Network,
            ["layer2", "layer?"],
            {},
            ValueError,
            "'layer2' by 'layer.', but it is asked for tw",
        ),
        (
            Network,
            "layer2",
            {"num_head": 2},
            ValueError,
            "options of 'layer2' .*'num_heads'.*got 'num_head'",
        ),
        (
            Network,
            "layer2",
            {"kind": "linear"},
            ValueError,
            "kind of 'layer2' .*'non_local'.*'linear'",
        ),
        (
            Network,
            "layer2",
            {"dimensions": 4},
            ValueError,
            "dimensions of 'layer2' .*'tokens'.*got 4",
        ),
        (Network, "layer2", {"bias": False}, ValueError, "options of 'layer2' .*got 'bias'"),
        (
            Network,
            "layer2",
            {"num_heads": 3},
            ValueError,
            "at 'layer2': .*divisible by num_heads = 3",
        ),
        (Network, "layer2", {"in_channels": 4}, ValueError, r"fits .*4.*got \(2, 8, 16, 12\)"),
        (Network, "layer2", {"dimensions": 3}, ValueError, r"fits .*3.*got \(2, 8, 16, 12\)"),
        (Network, "head", {}, ValueError, r"'head' must return \[B, C, ...\].*got \(2, 5\)"),
        (Loop, "", {}, ValueError, "it is a Loop, which goes over its children"),
        (
            lambda: in_a_row(Head(nn.Conv2d(3, 4, 1))),
            "0",
            {},
            ValueError,
            "'0' by '0', but it is a Head, which",
        ),
        (
            lambda: nn.ModuleDict({"a": nn.ReLU()}),
            "",
            {},
            ValueError,
            "it is a ModuleDict, which goes over",
        ),
        (shared, "0", {}, ValueError, r"\['0', '2'\] are one module"),
        (
            lambda: in_a_row(Returns(lambda x: {"a": x})),
            "0",
            {},
            TypeError,
            r"got dict of \['a'\]. Name one in",
        ),
        (
            lambda: in_a_row(Returns(lambda x: (x, x))),
            "0",
            {},
            TypeError,
            "must return a tensor; got tuple",
        ),
        (
            lambda: in_a_row(nn.Conv2d(3, 12, 1), nn.LayerNorm(12)),
            "1",
            {},
            ValueError,
            r"got \(2, 12, 16, 12\), which the layers in it do not show",
        ),
        (
            lambda: in_a_row(nn.Flatten(2), nn.ReLU()),
            "1",
            {},
            ValueError,
            r"got \(2, 3, 192\).*Give dimensions",
        ),
        (
            lambda: in_a_row(nn.Flatten(2), nn.TransformerEncoderLayer(192, 2, 8)),
            "1",
            {},
            ValueError,
            r"batch-first tokens \[B, N, C\]; got \(2, 3, 192\)",
        ),
        (
            lambda: in_a_row(nn.Flatten(2), nn.Linear(192, 4)),
            "1",
            {"kind": "non_local"},
            ValueError,
            "kind of '1' must be 'efficient' on tokens",
        ),
    ],
)
def test_errors_say_what_came_and_leave_the_model_as_it_was(model, places, options, error, message):
    model = model()
    before = repr(model)
    with pytest.raises(error, match=message):
        insert(model, places, example=torch.randn(IMAGE), **options)
    assert repr(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_an_example_is_asked_for_where_one_is_needed():
    with pytest.raises(
        ValueError, match=r"example must be .*give in_channels= and dimensions= at 'layer2'"
    ):
        insert(Network(), "layer2", dimensions=2)


def test_a_place_takes_one_attention():
    for place in ("layer1", "layer2"):
        model, x, _ = inserted()
        with pytest.raises(ValueError, match=f"'{place}' .*has inserted attention already"):
            insert(model, place, example=x)


def test_a_place_that_is_never_called_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(
        ValueError, match=r"must call 'self_attn.out_proj'; it does not in eval mode"
    ):
        insert(layer, "self_attn.out_proj", example=torch.randn(2, 5, 16))


def test_a_place_whose_calls_differ_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv = nn.ReLU(), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.act(self.conv(self.act(x)))

    with pytest.raises(ValueError, match="'act' must return the same channels in all calls"):
        insert(Twice(), "act", example=torch.randn(IMAGE))


def test_replace_refuses_what_it_cannot_keep():
    with pytest.raises(
        ValueError, match=r"'stem' .*it is a Conv2d, not one of .*MultiheadAttention"
    ):
        replace(Network(), "stem")
    with pytest.raises(ValueError, match=r"must match modules; got '\*'"):
        replace(Network(), "*")
    with pytest.raises(ValueError, match="it is the model itself"):
        replace(ea.NonLocal2d(8), "")
    with pytest.raises(ValueError, match="got 'init'"):
        replace(nn.Sequential(ea.NonLocal2d(8)), "0", init="zero")
    with pytest.raises(NotImplementedError, match="at 'self_attn': dropout must be 0"):
        replace(nn.TransformerEncoderLayer(16, 2, 32), "self_attn")
    hooked = nn.Sequential(ea.NonLocal2d(8))
    hooked[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="it has hooks"):
        replace(hooked, "0")


def test_remove_says_where_nothing_is():
    model, _, _ = inserted("layer2")
    with pytest.raises(ValueError, match="'layer1' by 'layer1', but nothing is inserted there"):
        remove(model, "layer1")
    with pytest.raises(ValueError, match=r"got 'layer\[13\]'; near names: \['layer2'\]"):
        remove(model, "layer[13]")


# Networks that people have.


def test_resnet50_takes_attention_after_a_stage():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50(weights=None).eval()
    x = torch.rand(1, 3, 64, 64)
    keys, before = set(model.state_dict()), model(x)
    report = insert(model, {"layer2": {}, "layer3.5": {"num_heads": 4}}, example=x)
    assert [c.channels for c in report.changes] == [512, 1024]
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) - keys == set(report.new_keys)


def test_mask_rcnn_takes_attention_in_its_body_and_its_pyramid():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=5,
    ).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 60)]
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(images)
    report = insert(
        model, {"backbone.body.layer2": {}, "backbone.fpn.layer_blocks.[0-9]": {}}, example=images
    )
    assert [c[2:4] for c in report.changes] == [(2, 512)] + [(2, 256)] * 4
    assert set(model.state_dict()) - keys == set(report.new_keys)
    with torch.no_grad():
        after = model(images)
    assert sum(len(picture["boxes"]) for picture in before) > 0
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    with pytest.raises(TypeError, match="got OrderedDict of"):
        insert(model, "backbone.fpn", example=images)


@pytest.mark.parametrize(
    ("name", "place", "dimensions"),
    [("resnet18", "layer2", 2), ("vit_tiny_patch16_224", "blocks.3", "tokens")],
)
def test_timm_networks_take_attention(name, place, dimensions):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    x = torch.rand(1, 3, 224, 224)
    before = model(x)
    assert insert(model, place, example=x).changes[0].dimensions == dimensions
    assert torch.equal(model(x), before)
