"""Places: which modules they mean, what flows there, and what is said where attention cannot be."""

import pytest
import torch
from torch import nn

import efficient_attention as ea
from efficient_attention.surgery import insert

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


def inserted(places=("layer1", "layer2"), **options):
    model, x = Network(), torch.randn(IMAGE)
    report = insert(model, places, example=x, **options)
    return model, x, report


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
        (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), "1", (2, 7, 5, 6), "channels_last", 4),
        (nn.Sequential(nn.LayerNorm(4)), "0", (2, 7, 5, 3, 4), "channels_last", 4),
        (nn.Sequential(nn.Conv2d(4, 3, 1), nn.LayerNorm([3, 7, 6])), "1", (2, 4, 7, 6), 2, 3),
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


def test_channels_may_be_said_to_be_last():
    model, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU()), torch.randn(2, 12, 5, 12)
    expected = model(x)
    with pytest.raises(ValueError, match="which the layers in it and around it do not show"):
        insert(model, "0", example=x)
    insert(model, {"0": {"dimensions": "channels_last"}}, example=x)
    insert(model, {"1": {"dimensions": "channels_last", "in_channels": 12, "bias": False}})
    assert torch.equal(model(x), expected)
    kinds = {type(layer.inserted_attention) for layer in model}
    assert kinds == {ea.EfficientAttentionChannelsLast}
    options = {"dimensions": "channels_last", "kind": "non_local"}
    with pytest.raises(ValueError, match="kind of '0' must be 'efficient' on channels_last"):
        insert(nn.Sequential(nn.Linear(12, 12)), {"0": options}, example=x)


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
            "must return a tensor of real numbers; got tuple",
        ),
        (
            lambda: in_a_row(nn.Conv2d(3, 12, 1), nn.LayerNorm(12)),
            "1",
            {},
            ValueError,
            r"got \(2, 12, 16, 12\), which the layers in it and around it do not show",
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


@pytest.mark.parametrize("places", ["*", lambda name, module: bool(name)])
def test_patterns_and_predicates_pass_over_what_cannot_be_a_host(places):
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(3, 3, 1)]), "b": nn.Conv2d(3, 3, 1)})
    nn.utils.parametrizations.weight_norm(model["b"])
    model["c"] = torch.jit.script(nn.ReLU())
    report = insert(model, places, in_channels=3, dimensions=2)
    assert [change.name for change in report.changes] == ["a.0", "b"]
    for name, message in (
        ("a", "it is a ModuleList, which goes over"),
        ("b.parametrizations.weight.0", "it makes a parametrized weight, not features"),
        ("c", "it is scripted or traced, a program that takes no more modules"),
    ):
        with pytest.raises(ValueError, match=f"got '{name}' by '{name}', but {message}"):
            insert(model, name, in_channels=3, dimensions=2)


@pytest.mark.parametrize(
    "program",
    [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(1, 3, 5, 5))],
)
@pytest.mark.parametrize("place", ["b", "b.0"])
def test_scripted_hosts_are_refused_before_anything_changes(program, place):
    convolutions = [nn.Conv2d(3, 3, 1) for _ in range(2)]
    model = nn.ModuleDict({"a": convolutions[0], "b": program(nn.Sequential(convolutions[1]))})
    with pytest.raises(ValueError, match=f"got '{place}' .*it is scripted or traced"):
        insert(model, ["a", place], in_channels=3, dimensions=2)
    assert not model["a"]._modules


def test_what_is_given_is_checked_against_an_example():
    model, given = Network(), {"in_channels": 8, "dimensions": 2}
    with pytest.raises(
        ValueError, match=r"'layer2' must return what fits .*4.*got \(2, 8, 16, 12\)"
    ):
        insert(model, "layer2", example=torch.randn(IMAGE), in_channels=4, dimensions=2)
    with pytest.raises(
        ValueError, match=r"call 'layer2'; (?s:.*)TypeError(?s:.*); or give no example"
    ):
        insert(model, "layer2", example="nonsense", **given)
    insert(model, "layer2", example=torch.randn(IMAGE), **given)


def test_what_is_given_is_believed_where_a_run_without_values_cannot_see_it():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), Returns(lambda x: x * float(x.mean().item() > 0)), nn.Conv2d(4, 5, 1)
    )
    given = {"in_channels": 5, "dimensions": 2}
    insert(model, {"0": {}, "2": given}, example=torch.randn(IMAGE))
    assert model[2].inserted_attention.in_channels == 5


def test_only_real_numbers_are_attended_to():
    model = nn.Sequential(Returns(lambda x: x.long()), Returns(lambda x: x.float()))
    with pytest.raises(TypeError, match=r"'0' must .* real numbers; got one of torch.int64"):
        insert(model, "0", example=torch.randn(IMAGE), in_channels=3, dimensions=2)


def test_places_are_seen_in_evaluation_mode():
    # In training a batch of one has no variance.
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).train()
    insert(model, "2", example=torch.randn(1, 3, 8, 8))
    assert model.training
