"""State_dicts of other implementations become modules, whole or not at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficient_attention as ea
from efficient_attention import import_attention
from efficient_attention.modules import DiffusionEfficientAttention


def authors_state():
    """The keys and shapes of the module of the paper's authors, for C = 6, dk = 4, dv = 8."""
    sizes = {"keys": (4, 6), "queries": (4, 6), "values": (8, 6), "reprojection": (6, 8)}
    state = {}
    for name, (outputs, inputs) in sizes.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 1, 1, dtype=torch.float64)
        state[f"{name}.bias"] = torch.randn(outputs, dtype=torch.float64)
    return state


def authors_map(state, x, heads):
    """Each head apart, as the authors compute: softmax of keys over positions, of queries over a head's channels."""
    k, q, v = (
        F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"]).flatten(2).chunk(heads, 1)
        for name in ("keys", "queries", "values")
    )
    attended = [
        (key.softmax(2) @ value.mT).mT @ query.softmax(1)
        for key, query, value in zip(k, q, v, strict=True)
    ]
    y = torch.cat(attended, 1).unflatten(2, x.shape[2:])
    return F.conv2d(y, state["reprojection.weight"], state["reprojection.bias"]) + x


def diffusion_state():
    module = DiffusionEfficientAttention(6, 3, 4, num_memory=5, dtype=torch.bfloat16)
    return {key: torch.randn_like(value) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_the_authors_module_computes_what_it_did(heads, wrapped):
    state = authors_state()
    checkpoint = {f"{wrapped}net.a.{key}": value for key, value in state.items()}
    checkpoint[f"{wrapped}net.ab.weight"] = torch.ones(3)
    module = import_attention(checkpoint, num_heads=heads, prefix="net.a")
    assert type(module) is ea.EfficientAttention2d
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x), authors_map(state, x, heads), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix", ["", "unet.", "module.unet"])
def test_linear_attention_of_a_diffusion_model_keeps_its_sizes_and_dtype(prefix):
    state = diffusion_state()
    start = f"{prefix.removesuffix('.')}." if prefix else ""
    module = import_attention({f"{start}{k}": v for k, v in state.items()}, prefix=prefix)
    assert type(module) is DiffusionEfficientAttention
    assert (module.num_heads, module.head_channels) == (3, 4)
    got = module.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], value) for key, value in state.items())
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_weights_are_copies():
    state = authors_state()
    module = import_attention(state, num_heads=1)
    state["keys.weight"].zero_()
    assert module.keys.weight.abs().max() > 0


def test_importing_draws_no_random_numbers():
    state, random = authors_state(), torch.get_rng_state()
    import_attention(state, num_heads=1)
    assert torch.equal(torch.get_rng_state(), random)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda s: s, {}, ValueError, "num_heads must be given: .*does not record it; got None"),
        (lambda s: s, {"num_heads": 3}, ValueError, "divisible by num_heads = 3; got 4"),
        (lambda s: s, {"num_heads": 1, "prefix": "a"}, ValueError, r"under prefix 'a', all of"),
        (
            lambda s: without(s, "values.bias"),
            {"num_heads": 1},
            ValueError,
            r"\['values.bias'\] are missing and \[\] are unknown",
        ),
        (
            lambda s: s | {"gamma": torch.ones(1)},
            {"num_heads": 1},
            ValueError,
            r"\[\] are missing and \['gamma'\] are unknown. In a live network use replace\(\)",
        ),
        (
            lambda s: s | {"values.weight": torch.ones(8, 5, 1, 1)},
            {"num_heads": 1},
            ValueError,
            r"'values.weight' must have shape \(8, 6, 1, 1\) beside the others; got \(8, 5, 1, 1\)",
        ),
        (
            lambda s: s | {"keys.weight": torch.ones(4, 6)},
            {"num_heads": 1},
            ValueError,
            r"'keys.weight' must have shape \[out, in, 1, 1\]; got \(4, 6\)",
        ),
        (lambda s: s | {"keys.bias": 3}, {"num_heads": 1}, TypeError, "got int as 'keys.bias'"),
        (
            lambda s: s | {f"module.{k}": v for k, v in s.items()},
            {"num_heads": 1},
            ValueError,
            "both with and without 'module.'",
        ),
        (lambda _: diffusion_state(), {"num_heads": 2}, ValueError, "num_heads must be 3, as in"),
        (
            lambda _: without(diffusion_state(), "mem_kv"),
            {},
            ValueError,
            r"\['mem_kv'\] are missing",
        ),
        (
            lambda _: diffusion_state() | {"mem_kv": torch.ones(2, 3, 4)},
            {},
            ValueError,
            r"'mem_kv' must have shape \[2, H, Dk, n\]; got \(2, 3, 4\)",
        ),
        (lambda s: {"state_dict": s}, {}, ValueError, r"\['state_dict'\] are unknown"),
    ],
)
def test_what_is_not_whole_is_refused(change, options, error, message):
    with pytest.raises(error, match=message):
        import_attention(change(authors_state()), **options)


def test_a_module_of_this_library_makes_the_round_trip():
    module = ea.EfficientAttention2d(8, num_heads=2, init="official")
    again = import_attention(nn.ModuleDict({"a": module}).state_dict(), num_heads=2, prefix="a")
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(again(x), module(x))
