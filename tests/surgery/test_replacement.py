"""Replacement: attention of quadratic cost becomes efficient attention over the same parameters."""

import copy

import pytest
import torch
from torch import nn

import efficient_attention as ea
from efficient_attention.surgery import insert, remove, replace


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


@pytest.mark.parametrize("nested", [False, True])
def test_replacing_every_attention_of_an_encoder_takes_one_line(nested):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 9, 16)
    padding = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])
    keys, before = list(model.state_dict()), model(x)
    report = replace(model, "*", dropout=0.0)
    assert [c.name for c in report.changes] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(x), before)
    with torch.no_grad():
        padded = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(padded[1, :6], model(x[1:, :6])[0])
    assert len(report.notes) == nested


@pytest.mark.parametrize("name", ["a", "ab"])
def test_encoders_around_a_place_stop_making_nested_tensors_and_others_do_not(name):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({name: nn.TransformerEncoder(layer, 1) for name in ("a", "ab")})
    report = replace(model, f"{name}.*", dropout=0.0)
    assert [n for n, encoder in model.items() if not encoder.use_nested_tensor] == [name]
    (note,) = report.notes
    assert note.startswith(f"{name} makes no nested tensors of padded batches any more")
    assert str(report).endswith(note)


def test_an_error_at_one_place_leaves_all_as_they_were():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    before = repr(model)
    with pytest.raises(NotImplementedError, match=r"at 'layers.1.self_attn': dropout must be 0"):
        replace(model, {"layers.0.self_attn": {"dropout": 0.0}, "layers.1.self_attn": {}})
    assert repr(model) == before
    assert model.use_nested_tensor


def test_replace_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match=r"'0' .*it is a Conv2d, not one of .*MultiheadAttention"):
        replace(nn.Sequential(nn.Conv2d(3, 3, 1)), "0")
    with pytest.raises(
        ValueError, match=r"got '\*'; near names: \[\]; '0' matches, but it is a Re"
    ):
        replace(nn.Sequential(nn.ReLU(), nn.ReLU()), "*")
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


@pytest.mark.parametrize("place", ["0.inserted_attention", "*.inserted_attention", "*"])
def test_inserted_non_local_blocks_are_replaced_where_they_are(place):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1)).double(), torch.randn(2, 3, 6, 5).double()
    options = {"normalization": "scaling", "init": "official"}
    report = insert(model, "0", example=x, kind="non_local", **options)
    expected, keys = model(x), list(model.state_dict())
    (change,) = replace(model, place).changes
    assert change[:2] == ("0.inserted_attention", "NonLocal2d -> EfficientAttention2d")
    assert change.outputs == "exact"
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys
    assert remove(model).removed_keys == report.new_keys


def test_a_pattern_without_places_tells_the_nearest_misses():
    class WindowAttention(nn.Module):
        pass

    class Attn(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(4, 12), nn.Linear(4, 4), 2
            self.position = nn.Parameter(torch.zeros(1))

    blocks = [nn.ModuleDict({"w": WindowAttention(), "a": Attn()}) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), *blocks)
    message = (
        r"; '1.w' matches, but it is a WindowAttention, not one of .*"
        r"; '1.a' matches, but it has \['position'\] beside \['qkv'.*\]$"
    )
    with pytest.raises(ValueError, match=message):
        replace(model, "*")


def test_scripted_attention_is_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    model["b"] = torch.jit.script(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match="got 'b' by 'b', but it is scripted or traced"):
        replace(model, ["a", "b"])
    assert type(model["a"]) is nn.MultiheadAttention
