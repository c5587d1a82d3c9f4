"""The drop-in for nn.MultiheadAttention."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from efficient_attention import MultiheadEfficientAttention

EXACT = {"rtol": 0, "atol": 1e-12}
X = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(**options):
    module = MultiheadEfficientAttention(12, 3, batch_first=True, dtype=torch.float64, **options)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    return module


def by_hand(module, query, key, value, mask=None):
    """rho_q(Q) rho_k(K)^T V, head by head; keys that are masked are left out, one sample at a time."""
    q, k, v = (
        nn.functional.linear(x, w, b)
        for x, w, b in zip(
            (query, key, value),
            module.in_proj_weight.chunk(3),
            module.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    outputs, maps = [], []
    for i in range(len(q)):
        kept = slice(None) if mask is None else ~mask[i]
        weights = [
            q_h.softmax(-1) @ k_h.softmax(-2).mT
            for q_h, k_h in zip(q[i].chunk(3, -1), k[i][kept].chunk(3, -1), strict=True)
        ]
        values = v[i][kept].chunk(3, -1)
        outputs.append(torch.cat([w @ v_h for w, v_h in zip(weights, values, strict=True)], -1))
        maps.append(torch.stack(weights))
    return module.out_proj(torch.stack(outputs)), maps


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 10, "vdim": 7}]
)
def test_parameters_have_the_names_shapes_and_order_of_pytorchs(options):
    ours = MultiheadEfficientAttention(12, 3, **options)
    theirs = nn.MultiheadAttention(12, 3, **options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_constructor_and_forward_have_pytorchs_signature():
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        ours = inspect.signature(getattr(MultiheadEfficientAttention, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].default == parameter.default, name


def test_initialization_is_pytorchs():
    torch.manual_seed(3)
    ours = MultiheadEfficientAttention(12, 3, add_bias_kv=True).state_dict()
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 3, add_bias_kv=True).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("order", ["auto", "linear", "quadratic"])
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_weights_are_those_of_the_formula(order, masked):
    module = build(order=order)
    mask = torch.rand(2, 15) > 0.6 if masked else None
    expected, maps = by_hand(module, X, Y, Y, mask)
    output, weights = module(X, Y, Y, key_padding_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(output, expected, **EXACT)
    assert weights.shape == (2, 3, 9, 15)
    for i in range(2):
        kept = slice(None) if mask is None else ~mask[i]
        torch.testing.assert_close(weights[i][..., kept], maps[i], **EXACT)
    assert mask is None or not weights.movedim(-1, 1)[mask].any()
    _, average = module(X, Y, Y, key_padding_mask=mask)
    torch.testing.assert_close(average, weights.mean(1), **EXACT)


def test_self_attention_through_one_projection_equals_three():
    module = build()
    packed, _ = module(X, X, X, need_weights=False)
    apart, none = module(X, X.clone(), X.clone(), need_weights=False)
    torch.testing.assert_close(packed, apart, **EXACT)
    assert none is None


def test_every_calling_convention_agrees():
    module = build()
    expected, weights = module(X, Y, Y)
    sequence_first = copy.deepcopy(module)
    sequence_first.batch_first = False
    output, again = sequence_first(X.transpose(0, 1), Y.transpose(0, 1), Y.transpose(0, 1))
    torch.testing.assert_close(output.transpose(0, 1), expected, **EXACT)
    torch.testing.assert_close(again, weights, **EXACT)
    for other in (module, sequence_first):
        alone, alone_weights = other(X[0], Y[0], Y[0])
        assert alone.shape == (9, 12)
        torch.testing.assert_close(alone, expected[0], **EXACT)
        torch.testing.assert_close(alone_weights, weights[0], **EXACT)


def test_different_key_and_value_widths_work():
    module = build(kdim=10, vdim=7)
    output, weights = module(X, torch.randn(2, 15, 10).double(), torch.randn(2, 15, 7).double())
    assert output.shape == (2, 9, 12)
    assert weights.shape == (2, 9, 15)


def test_appended_keys_and_values_are_positions_of_their_own():
    module = build(add_bias_kv=True, add_zero_attn=True)
    mask = torch.rand(2, 15) > 0.6
    output, weights = module(X, Y, Y, key_padding_mask=mask)
    assert weights.shape == (2, 9, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9).double(), **EXACT)
    # By hand: the rows that are appended after projection.
    _, k_weight, v_weight = module.in_proj_weight.chunk(3)
    _, k_bias, v_bias = module.in_proj_bias.chunk(3)
    k = torch.cat(
        (
            nn.functional.linear(Y, k_weight, k_bias),
            module.bias_k.expand(2, 1, 12),
            torch.zeros(2, 1, 12),
        ),
        1,
    )
    v = torch.cat(
        (
            nn.functional.linear(Y, v_weight, v_bias),
            module.bias_v.expand(2, 1, 12),
            torch.zeros(2, 1, 12),
        ),
        1,
    )
    plain = build()
    plain.load_state_dict(
        {n: p for n, p in module.state_dict().items() if n not in ("bias_k", "bias_v")}
    )
    with torch.no_grad():
        plain.in_proj_weight[12:] = torch.cat((torch.eye(12), torch.eye(12)))
        plain.in_proj_bias[12:] = 0
    expected, _ = plain(X, k, v, key_padding_mask=nn.functional.pad(mask, (0, 2)))
    torch.testing.assert_close(output, expected, **EXACT)


def test_float_masks_mean_the_same_as_bool_masks():
    module, mask = build(), torch.rand(2, 15) > 0.6
    expected, _ = module(X, Y, Y, key_padding_mask=mask)
    floats = torch.zeros(2, 15).double().masked_fill(mask, -torch.inf)
    got, _ = module(X, Y, Y, key_padding_mask=floats)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_a_float_mask_says_how_many_times_a_key_counts(normalization, options):
    module = build(normalization=normalization, **options)
    # A weight of two is the same key twice.
    logit = torch.zeros(2, 15).double()
    logit[:, 4] = math.log(2.0)
    twice = torch.cat((Y, Y[:, 4:5]), 1)
    torch.testing.assert_close(
        module(X, Y, Y, key_padding_mask=logit)[0], module(X, twice, twice)[0], **EXACT
    )


def test_the_lowest_number_of_a_dtype_hides_as_minus_infinity_does():
    module, mask = build().half(), torch.ones(2, 15, dtype=torch.bool)
    x, y = X.half(), Y.half()
    expected, _ = module(x, y, y, key_padding_mask=mask)
    for low in (torch.finfo(torch.float16).min, -1e9):
        got, _ = module(x, y, y, key_padding_mask=torch.zeros(2, 15).masked_fill(mask, low))
        assert torch.equal(got, expected)


def test_key_bias_has_exactly_zero_gradient_under_softmax():
    for source in (X, Y):
        module = build()
        module(X, source, source)[0].sin().sum().backward()
        d_query, d_key, d_value = module.in_proj_bias.grad.chunk(3)
        assert not d_key.any()
        assert d_query.all()
        assert d_value.all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_run_our_map_in_training_and_evaluation(training, padded, norm_first):
    # In evaluation PyTorch's layer may skip self_attn.forward and run dot-product attention on its weights.
    layer = nn.TransformerEncoderLayer(
        12, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    layer.self_attn = MultiheadEfficientAttention(12, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(training)
    x = X
    mask = (torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])) if padded else None

    def layer_by_hand(layer, x):
        def attention(y):
            return layer.self_attn(y, y, y, key_padding_mask=mask, need_weights=False)[0]

        if norm_first:
            x = x + attention(layer.norm1(x))
            return x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
        x = layer.norm1(x + attention(x))
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))

    with torch.inference_mode():
        expected = layer_by_hand(encoder.layers[1], layer_by_hand(encoder.layers[0], x))
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask), expected, **EXACT)


def test_decoder_layers_attend_across():
    layer = nn.TransformerDecoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    layer.multihead_attn = MultiheadEfficientAttention(12, 2, batch_first=True)
    target, memory = X.float(), Y.float()
    hidden = torch.rand(2, 15) > 0.7
    output = layer(target, memory, memory_key_padding_mask=hidden)
    changed = layer(
        target, memory.masked_fill(hidden[..., None], 1e3), memory_key_padding_mask=hidden
    )
    torch.testing.assert_close(output, changed)


def test_copies_are_equal():
    module = build()
    again = build()
    again.load_state_dict(module.state_dict(), strict=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        assert torch.equal(other(X, Y, Y)[0], module(X, Y, Y)[0])


def test_compiles_whole():
    module = build()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(X, X, X, need_weights=False), module(X, X, X, need_weights=False), **EXACT
    )


def flops(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("order", "per_head"), [("linear", (9 + 17) * 4 * 4), ("quadratic", 9 * 17 * 8)]
)
def test_the_named_order_is_the_one_that_runs(order, per_head):
    module = build(order=order, add_bias_kv=True, add_zero_attn=True)
    projections = 2 * (9 + 15 + 15 + 9) * 12 * 12
    counted = flops(lambda: module(X, Y, Y, need_weights=False))
    assert counted == 2 * (projections + 2 * 3 * per_head)


def test_orders_are_planned_for_the_positions_that_there_are():
    # Per head 4 and 4 channels: the quadratic order is cheaper for N = 3 up to 6 keys, appended ones included.
    module = MultiheadEfficientAttention(12, 3, add_zero_attn=True)
    query = torch.empty(3, 50, 12)
    assert module.planned_order(query, torch.empty(4, 50, 12)) == "quadratic"
    assert module.planned_order(query, torch.empty(6, 50, 12)) == "linear"
    module.add_zero_attn = False
    assert module.planned_order(query, torch.empty(5, 50, 12)) == "quadratic"
    module.batch_first = True
    assert module.planned_order(torch.empty(50, 3, 12), torch.empty(50, 5, 12)) == "quadratic"


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
)
def test_positions_that_are_appended_are_planned_for(options):
    # Per head 4 and 4 channels, 5 queries: the quadratic order is cheaper for up to 3 keys, appended ones included.
    query = torch.empty(1, 5, 12)
    module = MultiheadEfficientAttention(12, 3, batch_first=True, **options)
    appended = len(options)
    for keys, order in ((3, "quadratic"), (4, "linear")):
        assert module.planned_order(query, torch.empty(1, keys - appended, 12)) == order


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_weights_times_values_are_the_output(normalization):
    module = build(normalization=normalization)
    output, weights = module(X, Y, Y, average_attn_weights=False)
    _, _, value = module._project(X, Y, Y)
    values = value.unflatten(-1, (3, 4)).transpose(1, 2)
    expected = module.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, **EXACT)


def test_reset_parameters_initializes_everything_anew():
    module = build(add_bias_kv=True)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    module.reset_parameters()
    for name, x in module.state_dict().items():
        assert not torch.equal(x, before[name]) or name == "out_proj.bias", name
