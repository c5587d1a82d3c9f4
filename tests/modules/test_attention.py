"""Attention on tokens: to themselves, across, and to contexts that were kept."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import efficient_attention as ea
from efficient_attention.ops.planner import MODULE_ORDERS

EXACT = {"rtol": 0, "atol": 1e-12}


def build(**options):
    return ea.EfficientAttention(
        12, 2, key_channels=8, value_channels=6, context_dim=10, dtype=torch.float64, **options
    )


TOKENS = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(2, 15, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(module, x, source):
    q, k, v = module.queries(x), module.keys(source), module.values(source)
    heads = [
        q_h.softmax(-1) @ (k_h.softmax(-2).mT @ v_h)
        for q_h, k_h, v_h in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
    ]
    return module.reprojection(torch.cat(heads, -1))


@pytest.mark.parametrize("order", MODULE_ORDERS)
def test_cross_attention_is_the_papers_map_between_two_inputs(order):
    module = build(order=order)
    torch.testing.assert_close(module(TOKENS, OTHERS), by_hand(module, TOKENS, OTHERS), **EXACT)


def test_self_attention_is_cross_attention_to_itself():
    module = ea.EfficientAttention(12, 3, dtype=torch.float64)
    torch.testing.assert_close(module(TOKENS), module(TOKENS, TOKENS.clone()), **EXACT)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["auto", "linear", "folded"])
def test_a_kept_context_equals_its_tokens(normalization, order):
    module = build(normalization=normalization, order=order)
    mask = torch.rand(2, 15) > 0.3
    memory = module.summarize(OTHERS, key_mask=mask)
    assert memory.mean.shape == (2, 2, 4, 3)
    torch.testing.assert_close(
        module(TOKENS, memory), module(TOKENS, OTHERS, key_mask=mask), **EXACT
    )


@pytest.mark.parametrize("order", ["linear", "folded"])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_a_kept_context_grows_as_tokens_arrive(order, normalization):
    module = build(order=order, normalization=normalization)
    memory = module.summarize(OTHERS[:, :4])
    for token in OTHERS[:, 4:].split(1, 1):
        memory = memory.merge(module.summarize(token))
    torch.testing.assert_close(module(TOKENS, memory), module(TOKENS, OTHERS), **EXACT)


@pytest.mark.parametrize("order", ["linear", "quadratic", "folded"])
def test_padding_changes_nothing(order):
    module = build(order=order)
    padded = torch.cat((OTHERS, torch.full((2, 4, 10), 1e6).double()), 1)
    mask = torch.arange(19).expand(2, 19) < 15
    torch.testing.assert_close(
        module(TOKENS, padded, key_mask=mask), module(TOKENS, OTHERS), **EXACT
    )


@pytest.mark.parametrize("order", ["linear", "quadratic", "folded"])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_a_sample_without_tokens_gets_the_output_bias(order, normalization):
    module = build(order=order, normalization=normalization)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1] = False
    output = module(TOKENS, OTHERS, key_mask=mask)
    torch.testing.assert_close(output[1], module.reprojection.bias.expand(9, 12), **EXACT)
    torch.testing.assert_close(output[0], module(TOKENS, OTHERS)[0], **EXACT)
    grads = torch.autograd.grad(output.square().sum(), tuple(module.parameters()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("order", MODULE_ORDERS)
def test_works_without_biases(order):
    module = build(order=order, bias=False)
    assert not any("bias" in name for name, _ in module.named_parameters())
    torch.testing.assert_close(module(TOKENS, OTHERS), by_hand(module, TOKENS, OTHERS), **EXACT)


@pytest.mark.parametrize("order", MODULE_ORDERS)
def test_gradients_are_right(order):
    module = build(order=order)
    x, source = TOKENS[:1, :3].clone().requires_grad_(), OTHERS[:1, :4].clone().requires_grad_()
    parameters = [p for name, p in module.named_parameters() if name != "keys.bias"]

    def function(x, source, *_):
        return module(x, source)

    assert torch.autograd.gradcheck(function, (x, source, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, source, *parameters), fast_mode=True)


def test_zero_init_and_residual_start_as_the_identity():
    module = ea.EfficientAttention(12, residual=True, init="zero", dtype=torch.float64)
    assert torch.equal(module(TOKENS), TOKENS)


def test_reset_parameters_restores_the_initialization():
    module = ea.EfficientAttention(12, init="zero")
    torch.nn.init.ones_(module.reprojection.weight)
    old = module.keys.weight.clone()
    module.reset_parameters()
    assert not module.reprojection.weight.any()
    assert not torch.equal(module.keys.weight, old)


def reset_every_layer(module):
    """As FSDP and others initialize what was built on the meta device: each module by itself, parents first."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


@pytest.mark.parametrize("kind", [ea.EfficientAttention, ea.EfficientAttention2d, ea.NonLocal2d])
def test_zero_init_survives_whoever_resets_every_layer(kind):
    module = kind(12, init="zero", residual=True)
    x = torch.randn(2, 12, 12) if kind is ea.EfficientAttention else torch.randn(2, 12, 5, 4)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    materialized = kind(12, init="zero", residual=True, device="meta").to_empty(device="cpu")
    for each in (module, *copies, materialized):
        reset_every_layer(each)
        assert torch.equal(each(x), x)
        # Nothing is different about the layer for those who look at it.
        assert type(each.reprojection) is type(each.values)
        assert list(each.reprojection.state_dict()) == ["weight", "bias"]
    # Copies reset themselves, and not what they were copied from.
    nn.init.ones_(module.reprojection.weight)
    reset_every_layer(copies[0])
    assert module.reprojection.weight.all()

    ordinary = kind(12, init="official", residual=True)
    reset_every_layer(ordinary)
    assert not torch.equal(ordinary(x), x)


def test_modules_free_their_memory_at_once():
    module = ea.EfficientAttention(12, init="zero")
    weight = weakref.ref(module.reprojection.weight)
    gc.disable()
    try:
        del module
        assert weight() is None
    finally:
        gc.enable()


def test_copies_are_equal():
    module = build()
    again = build()
    again.load_state_dict(module.state_dict(), strict=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        assert torch.equal(other(TOKENS, OTHERS), module(TOKENS, OTHERS))


def test_errors_name_the_argument():
    module = build()
    memory = module.summarize(OTHERS)
    with pytest.raises(
        ValueError, match=r"x must have shape \[B, N, C\] with C = 12; got \(2, 15, 10\)"
    ):
        module(OTHERS)
    with pytest.raises(
        ValueError, match=r"context must have shape \[B, N, C\] with C = 10; got \(2, 9, 12\)"
    ):
        module(TOKENS, TOKENS)
    with pytest.raises(
        ValueError, match=r"source must have shape \[B, N, C\] with C = 10; got \(2, 9, 12\)"
    ):
        module.summarize(TOKENS)
    with pytest.raises(ValueError, match="key_mask must be None with a ready-made Context"):
        module(TOKENS, memory, key_mask=torch.ones(2, 15).bool())
    with pytest.raises(TypeError, match="context must be a Context; got tuple"):
        module.attend(TOKENS, tuple(memory))
    with pytest.raises(
        ValueError, match=r"key_mask must have shape \[B, N\] = \(2, 15\); got \(2, 9\)"
    ):
        module(TOKENS, OTHERS, key_mask=torch.ones(2, 9).bool())
    with pytest.raises(ValueError, match=r"context must have B = 2, as x; got 1"):
        module(TOKENS, OTHERS[:1])
    with pytest.raises(ValueError, match=r"x's keys|context\.mean must have shape"):
        module(TOKENS, ea.EfficientAttention(12, 3, dtype=torch.float64).summarize(TOKENS))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "embed_dim must be a positive integer; got 0"),
        ((12.0,), {}, r"embed_dim must be a positive integer; got 12\.0"),
        ((True,), {}, "embed_dim must be a positive integer; got True"),
        ((12,), {"context_dim": -1}, "context_dim must be a positive integer; got -1"),
        ((12, 2.0), {}, r"num_heads must be a positive integer; got 2\.0"),
        ((12, 5), {}, "key_channels must be divisible by num_heads = 5; got 12"),
    ],
)
def test_constructor_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ea.EfficientAttention(*arguments, **options)


def flops(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("order", MODULE_ORDERS)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("bias", [True, False])
def test_costs_of_cross_attention_are_those_that_run(order, normalization, bias):
    module = build(order=order, normalization=normalization, bias=bias)
    counted = flops(lambda: module(TOKENS, OTHERS))
    assert counted == 2 * module.costs(9, 15, batch=2)[order].multiply_adds


def test_orders_are_planned_for_both_lengths():
    # Folding a side costs one product of the size of a context: it pays for the long side alone.
    module = ea.EfficientAttention(64, key_channels=48, value_channels=64)
    short, long = torch.empty(1, 40, 64), torch.empty(1, 5000, 64)
    assert module.planned_order(short, long) == "folded_values"
    assert module.planned_order(long, short) == "folded_output"
    assert module.planned_order(long, long) == "folded"


def test_kept_contexts_are_made_and_used_in_the_cheapest_order():
    module = ea.EfficientAttention(64, key_channels=32, value_channels=64)
    tokens = torch.randn(1, 5000, 64)
    memory = module.summarize(tokens)
    auto = flops(lambda: module.summarize(tokens)), flops(lambda: module.attend(tokens, memory))
    module.order = "linear"
    linear = flops(lambda: module.summarize(tokens)), flops(lambda: module.attend(tokens, memory))
    assert auto[0] < 0.75 * linear[0]
    assert auto[1] < 0.75 * linear[1]


@pytest.mark.parametrize("order", ["auto", "linear", "folded"])
def test_a_context_of_another_module_is_refused(order):
    module = build(order=order)
    other = ea.EfficientAttention(
        12, 4, key_channels=8, value_channels=8, context_dim=10, dtype=torch.float64
    )
    message = r"context\.mean must have shape .* = \(2, 2, 4, 3\), .* got \(2, 4, 2, 2\)"
    with pytest.raises(ValueError, match=message):
        module(TOKENS, other.summarize(OTHERS))


def test_an_order_without_a_context_is_refused_where_there_is_one():
    module = build(order="quadratic")
    memory = build().summarize(OTHERS)
    message = "order='quadratic': it has no context, .* use order='auto'"
    for call in (
        lambda: module.summarize(OTHERS),
        lambda: module.attend(TOKENS, memory),
        lambda: module(TOKENS, memory),
        lambda: module.planned_order(TOKENS, memory),
        lambda: next(ea.attend_tiles(module, OTHERS[:1].split(5, 1))),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    module(TOKENS, OTHERS)


def test_contexts_are_planned_among_the_orders_that_have_one():
    # Three positions are cheapest in the quadratic order, five thousand folded; a context is linear or folded.
    module = ea.EfficientAttention(64, key_channels=48)
    memory = module.summarize(torch.randn(1, 3, 64))
    assert module.planned_order(torch.empty(1, 3, 64)) == "quadratic"
    assert module.planned_order(torch.empty(1, 3, 64), memory) == "linear"
    assert module.planned_order(torch.empty(1, 5000, 64), memory) == "folded"


def test_an_order_that_is_assigned_is_checked():
    module = build()
    module.order = "fold"
    with pytest.raises(ValueError, match=r"order must be one of 'auto', .* got 'fold'"):
        module(TOKENS, OTHERS)
