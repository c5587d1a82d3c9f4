"""The attention of vision transformers: the paper's equations, timm's interface, masks of keys."""

import pytest
import torch
from torch import nn

import efficient_attention as ea
from efficient_attention import ViTEfficientAttention
from efficient_attention.testing import assert_as_precise_as_plain

X = (2, 7, 12)


def plain(block, x, log_weight=None):
    """The equations, written with the block's own layers; ``log_weight [B, N]`` is added to the logits of keys."""
    q, k, v = (
        part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
        for part in block.qkv(x).chunk(3, -1)
    )
    q, k = block.q_norm(q), block.k_norm(k)
    if log_weight is not None:
        k = k + log_weight[:, None, :, None]
    if block.normalization == "softmax":
        y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    else:
        y = q @ (k.mT @ v) / k.shape[-2]
    y = block.norm(y.transpose(1, 2).flatten(2))
    y = y if block.gate is None else y * torch.sigmoid(block.gate(x))
    return block.proj(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "num_heads": 4},
        {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        {"attn_head_dim": 5, "dim_out": 9, "gated": True, "proj_bias": False},
        {"normalization": "scaling", "order": "quadratic"},
    ],
)
def test_output_and_gradients_are_those_of_the_equations(options):
    block = ViTEfficientAttention(12, **{"num_heads": 3, **options}, dtype=torch.float64)
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    results = []
    for compute in (block, lambda x: plain(block, x)):
        block.zero_grad()
        y = compute(x)
        gradients = torch.autograd.grad(y.sin().sum(), (x, *block.parameters()))
        results.append((y, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_precise_as_the_plain_equations(dtype):
    block = ViTEfficientAttention(32, 4, qkv_bias=True).double()
    x = torch.randn(2, 300, 32, dtype=torch.float64)
    truth = plain(block, x)
    block.to(dtype)
    assert_as_precise_as_plain(block(x.to(dtype)), plain(block, x.to(dtype)), truth, str(dtype))


def test_names_shapes_and_arguments_are_timms():
    timm = pytest.importorskip("timm.layers")
    options = {
        "num_heads": 3,
        "qkv_bias": True,
        "qk_norm": True,
        "scale_norm": True,
        "gated": True,
        "norm_layer": nn.LayerNorm,
    }
    theirs, ours = timm.Attention(12, **options), ViTEfficientAttention(12, **options)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(
    "shaped",
    [lambda m: m, lambda m: m[:, None, None], lambda m: m[:, None, None].expand(-1, 3, -1, -1)],
)
def test_hidden_keys_may_hold_anything(normalization, shaped):
    block = ViTEfficientAttention(12, 3, normalization=normalization).eval()
    x = torch.randn(X)
    attends = torch.arange(7) < torch.tensor([[7], [4]])
    x[1, 4:] = torch.nan
    added = torch.zeros(2, 7).masked_fill(~attends, -torch.inf)
    lowest = added.clamp(min=torch.finfo(torch.float32).min)
    expected = block(x[1:, :4])[0]
    for mask in (attends, added, lowest):
        torch.testing.assert_close(block(x, shaped(mask))[1, :4], expected)


def test_a_mask_for_all_samples_is_one_row():
    block, x = ViTEfficientAttention(12, 3), torch.randn(X)
    attends = torch.arange(7) < 4
    expected = block(x[:, :4])
    torch.testing.assert_close(block(x, attends[None])[:, :4], expected)
    torch.testing.assert_close(block(x, attends[None, None, None])[:, :4], expected)


def test_an_added_mask_is_the_logarithm_of_how_often_a_key_counts():
    block = ViTEfficientAttention(12, 3, dtype=torch.float64)
    x = torch.randn(X, dtype=torch.float64)
    thrice = torch.tensor([1, 1, 3, 1, 1, 1, 1], dtype=torch.float64).log()
    repeated = torch.cat((x, x[:, 2:3], x[:, 2:3]), 1)
    got = block(x, thrice.expand(2, 1, 1, 7))
    torch.testing.assert_close(got, block(repeated)[:, :7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, plain(block, x, thrice.expand(2, 7)), rtol=1e-12, atol=1e-12)


def test_an_idle_key_bias_gets_no_gradient_and_a_normalized_one_does():
    x = torch.randn(X)
    for qk_norm, is_idle in ((False, True), (True, False)):
        options = {"qkv_bias": True, "qk_norm": qk_norm, "norm_layer": nn.LayerNorm}
        block = ViTEfficientAttention(12, 3, **options)
        block(x).square().sum().backward()
        _, bias_k, bias_v = block.qkv.bias.grad.chunk(3)
        assert (bias_k.abs().max() == 0) == is_idle
        assert bias_v.abs().max() > 0


def test_the_output_is_dropped_from_in_training_alone():
    block = ViTEfficientAttention(12, 3, proj_drop=0.5)
    x = torch.randn(X)
    assert 0.2 < (block(x) == 0).float().mean() < 0.8
    assert (block.eval()(x) != 0).all()


def test_hooks_of_the_packed_projection_run():
    block, seen = ViTEfficientAttention(12, 3, qkv_bias=True), []
    block.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(torch.randn(X))
    assert seen == [(2, 7, 36)]


def test_freezing_names_its_order():
    block = ViTEfficientAttention(12, 3)
    model = nn.Sequential(block)
    assert ea.freeze(model, torch.randn(1, 3, 12)) == {"0": "quadratic"}
    assert block.order == "quadratic"
    block.order = "auto"
    assert ea.freeze(model, torch.randn(1, 99, 12)) == {"0": "linear"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"is_causal": True}, NotImplementedError, "is_causal must be False: .*Keep dot-product"),
        ({"attn_mask": torch.ones(7, 7)}, NotImplementedError, r"one of keys.*got \(7, 7\).*use_k"),
        (
            {"attn_mask": torch.ones(2, 1, 7, 7)},
            NotImplementedError,
            r"one of keys, \[B, N\] or \[B, 1, 1, N\]; got \(2, 1, 7, 7\): .*no linear form",
        ),
        ({"attn_mask": torch.ones(2, 6)}, ValueError, r"for B, N = \(2, 7\); got \(2, 6\)"),
        ({"attn_mask": torch.ones(3, 1, 1, 7)}, ValueError, r"\(2, 7\); got \(3, 1, 1, 7\)"),
        ({"attn_mask": torch.ones(2, 7).long()}, TypeError, "bool or floating; got torch.int64"),
        ({"attn_mask": [[True] * 7] * 2}, TypeError, "attn_mask must be a tensor; got list"),
        ({"attn_mask": torch.ones(2, 2, 1, 7) > 0}, ValueError, "key_mask must be"),
    ],
)
def test_what_has_no_linear_form_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ViTEfficientAttention(12, 3)(torch.randn(X), **arguments)


def test_a_mask_that_may_be_one_of_n_x_n_is_refused():
    block, x = ViTEfficientAttention(12, 3), torch.randn(7, 7, 12)
    causal = torch.ones(7, 7).tril() > 0
    with pytest.raises(ValueError, match=r"\(7, 7\) may be one, because B = N.*\[B, 1, 1, N\]"):
        block(x, causal)
    block(x, causal[:, None, None])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "dim must be divisible by num_heads = 5; got 12"),
        ({"num_heads": 0}, ValueError, "num_heads must be a positive integer; got 0"),
        ({"attn_head_dim": 0}, ValueError, "attn_head_dim must be a positive integer; got 0"),
        ({"dim_out": 0}, ValueError, "dim_out must be a positive integer; got 0"),
        ({"attn_drop": 0.1}, NotImplementedError, "attn_drop must be 0: .*got 0.1.*proj_drop"),
        ({"qk_norm": True}, ValueError, "norm_layer must be given with qk_norm or scale_norm"),
        ({"normalization": "none"}, ValueError, "normalization must be one of"),
        ({"order": "folded"}, ValueError, "order must be one of"),
    ],
)
def test_the_constructor_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        ViTEfficientAttention(12, **{"num_heads": 3, **options})


@pytest.mark.parametrize("x", [torch.randn(7, 12), torch.randn(2, 7, 11), None])
def test_inputs_are_tokens(x):
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, C\] with C = 12; got"):
        ViTEfficientAttention(12, 3)(x)
