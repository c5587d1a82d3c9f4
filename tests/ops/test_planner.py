"""Counts worked out by hand, and against what PyTorch's own counter sees."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from efficient_attention import EfficientAttention2d, efficient_attention
from efficient_attention.memory import peak_bytes
from efficient_attention.ops.planner import (
    SHORT_MULTIPLY_ADDS,
    block_bytes,
    block_length,
    cheapest,
    crossover,
    folding_saves_little,
    maps_per_block,
    module_costs,
    operator_costs,
    quadratic_gradients_are_cheaper,
    streamed_bytes,
)


def test_operator_multiply_adds_match_hand_computed_numbers():
    costs = operator_costs(queries=10, keys=20, key_channels=3, value_channels=4, batch=2, heads=5)
    assert costs["linear"].multiply_adds == 2 * 5 * (10 + 20) * 3 * 4 == 3600
    assert costs["quadratic"].multiply_adds == 2 * 5 * 10 * 20 * (3 + 4) == 14_000


def test_operator_bytes_match_hand_computed_numbers():
    costs = operator_costs(queries=10, keys=20, key_channels=3, value_channels=4, itemsize=2)
    # In float32, whatever the storage: a context of 3 x 4 and three numbers a channel. The weights of 20 keys twice.
    assert costs["linear"].bytes == (3 * 4 + 3 * 3) * 4 + 20 * 3 * (4 + 2)
    # The 10 x 20 map and both softmaxes.
    assert costs["quadratic"].bytes == (10 * 20 + 10 * 3 + 20 * 3) * 4


def test_blocks_are_counted_as_they_are_made():
    # 64 + 64 channels in 4 MiB: blocks of up to 8,192 positions, or that many of several maps.
    assert block_bytes(1, 5, 9000, 64, 64, 4) == 8192 * 64 * 4
    assert block_bytes(3, 5, 1000, 64, 64, 4) == 8 * 1000 * 64 * 4
    assert block_bytes(1, 5, 1000, 96, 32, 4) == 5 * 1000 * 96 * 4
    assert block_bytes(4096, 4, 49, 32, 32, 4) == 334 * 49 * 32 * 4
    # In bfloat16 twice as many, whose weights are there in float32 and in bfloat16; in float64 half as many.
    assert block_bytes(1, 5, 99999, 64, 64, 2) == 16384 * 64 * (4 + 2)
    assert block_bytes(1, 5, 99999, 64, 64, 8) == 4096 * 64 * 8


@pytest.mark.parametrize("sizes", [(1, 8, 5000, 64, 64), (9, 2, 300, 32, 96), (1, 1, 200, 16, 16)])
def test_operator_bytes_are_those_that_are_held(sizes):
    batch, heads, positions, key_channels, value_channels = sizes
    query = key = torch.randn(batch, heads, positions, key_channels)
    value = torch.randn(batch, heads, positions, value_channels)
    planned = operator_costs(
        queries=positions,
        keys=positions,
        key_channels=key_channels,
        value_channels=value_channels,
        batch=batch,
        heads=heads,
    )
    # Named, as small problems are otherwise computed in few operators, whatever they hold.
    options = {"order": "linear", "backend": "blocked"}
    held = peak_bytes(lambda: efficient_attention(query, key, value, **options))
    assert held - value.nbytes == pytest.approx(planned["linear"].bytes, rel=0.02)


def test_module_multiply_adds_match_hand_computed_numbers():
    # The paper's module: C = 256, dk = 128, dv = 256, one head; per position 131,072 folded against 262,144.
    costs = module_costs(
        queries=65536, keys=65536, in_channels=256, key_channels=128, value_channels=256
    )
    per_position = {order: cost.multiply_adds / 65536 for order, cost in costs.items()}
    assert per_position["linear"] == 256 * 128 * 2 + 256 * 256 * 2 + 128 * 256 * 2 == 262_144
    context = 128 * 256 * 256 / 65536  # one product of the size of a context on each side
    assert per_position["folded"] == 4 * 256 * 128 + 2 * context == 131_072 + 256
    assert per_position["folded_values"] == per_position["folded_output"] == 196_608 + context
    assert per_position["quadratic"] == 256 * 128 * 2 + 256 * 256 * 2 + 65536 * (128 + 256)


def test_module_bytes_match_hand_computed_numbers():
    costs = module_costs(
        queries=100, keys=50, in_channels=6, key_channels=4, value_channels=8, heads=2, itemsize=2
    )
    # In float32: means of 4 value channels a head and three numbers a key channel; the weights of one block, twice.
    context, weights = 4 * (8 // 2 + 3) * 4, 100 * 4 * (4 + 2)
    folded = 4 * 6 * 4  # the context of inputs or of outputs, in float32
    assert costs["linear"].bytes == 100 * (4 + 8) * 2 + context + weights
    assert costs["folded"].bytes == 100 * 4 * 2 + folded + context + weights
    # All projections, the map of each head, and both softmaxes in float32.
    everything = (100 + 50) * (4 + 8) * 2
    assert costs["quadratic"].bytes == everything + (2 * 100 * 50 + (100 + 50) * 4) * 4


def test_a_streamed_module_takes_contexts_and_pages():
    sizes = {"in_channels": 6, "key_channels": 4, "value_channels": 8, "heads": 2}
    costs = module_costs(queries=100, keys=50, **sizes, itemsize=2, streamed=True)
    summary, contexts = 4 * (6 + 4) * 4, 4 * (8 // 2 + 6) * 4  # in float32
    # For each query a page of 4 channels in float32 and in 2 bytes, and a float32 for each head.
    assert costs["folded"].bytes == summary + contexts + 100 * (4 * (4 + 2) + 2 * 4)
    # Multiplied in float32, that page alone, and a block of 6 channels twice.
    options = {"itemsize": 2, "streamed": True, "widened": True}
    wide = module_costs(queries=100, keys=50, **sizes, **options)
    assert wide["folded"].bytes == summary + contexts + 100 * (4 * 4 + 2 * 6 * 4 + 2 * 4)
    per_position = 4 * (6 + 6)
    folding = 4 * (8 // 2) * (6 + 6)
    assert costs["folded"].multiply_adds == (100 + 50) * per_position + folding
    # Nothing of it grows with the positions but sums over blocks that wait for others.
    long = [
        module_costs(queries=n, keys=n, **sizes, streamed=True)["folded"].bytes
        for n in (1 << 20, 1 << 21)
    ]
    assert long[1] - long[0] in (0, 4 * 6 * 4)


def test_streamed_blocks_match_hand_computed_numbers():
    # One block of 1000 positions: a page of 32 channels, and one number for each of 2 heads.
    assert streamed_bytes(1, 1000, 64, 32, 2, 4) == 1000 * (32 * 4 + 2 * 4)
    assert streamed_bytes(1, 1000, 64, 32, 2, 2) == 1000 * (32 * (4 + 2) + 2 * 4)
    assert streamed_bytes(1, 1000, 64, 32, 2, 8, pages=3) == 1000 * (3 * 32 * 8 + 2 * 8)


@pytest.mark.parametrize(("queries", "keys"), [(5000, 10), (10, 5000)])
def test_projections_take_the_bytes_of_their_dtype_on_the_side_that_is_long(queries, keys):
    def bytes_of(order, itemsize):
        costs = module_costs(
            queries=queries,
            keys=keys,
            in_channels=6,
            key_channels=4,
            value_channels=8,
            itemsize=itemsize,
        )
        return costs[order].bytes

    folded = "folded_output" if queries > keys else "folded_values"
    for order, channels in (("linear", 4 + 8), ("folded", 4), (folded, 4)):
        # Contexts are in float32 for both; weights too, and once more in half precision.
        assert bytes_of(order, 4) - bytes_of(order, 2) == 5000 * channels * 2 - 5000 * 4 * 2


def test_column_sums_match_hand_computed_numbers():
    sizes = {"queries": 100, "keys": 5000, "in_channels": 6, "key_channels": 4, "value_channels": 8}
    without, costs = module_costs(**sizes), module_costs(**sizes, column_sums=True)
    for order in ("folded", "folded_values"):
        # One number for each of 4 key channels, from 5000 keys.
        assert costs[order].multiply_adds - without[order].multiply_adds == 4 * 5000
        assert costs[order].bytes - without[order].bytes == 4 * 4
    for order in ("linear", "quadratic", "folded_output"):
        assert costs[order] == without[order]


@pytest.mark.parametrize("order", ["linear", "folded_values", "folded_output", "folded"])
@pytest.mark.parametrize("channels", [(64, 32, 64, 4), (64, 64, 32, 1), (16, 64, 16, 2)])
def test_module_bytes_are_those_that_are_held(order, channels):
    c, dk, dv, heads = channels
    module = EfficientAttention2d(c, dk, dv, num_heads=heads, order=order)
    x = torch.randn(1, c, 100, 100)
    with torch.no_grad():
        held = peak_bytes(lambda: module(x))
    planned = module.costs(10_000)[order].bytes
    # The output may or may not be there already when the most is held, and with it what a residual is added to; and a
    # block of queries may be copied for its softmax.
    copied = 4 * dk * block_length(dk + c, 4)
    assert 0.98 * planned <= held <= 1.02 * (planned + 2 * x.nbytes + copied)


@pytest.mark.parametrize("order", ["linear", "folded_values", "folded_output", "folded"])
@pytest.mark.parametrize("channels", [(16, 8, 16, 1), (16, 8, 24, 4), (8, 8, 4, 2)])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_module_multiply_adds_are_those_that_run(order, channels, normalization):
    c, dk, dv, heads = channels
    module = EfficientAttention2d(
        c, dk, dv, num_heads=heads, order=order, normalization=normalization
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(2, c, 9, 7))
    costs = module.costs(63, batch=2)
    assert counter.get_total_flops() == 2 * costs[order].multiply_adds


def test_folding_pays_by_the_rule_of_channels():
    # For long inputs a side is folded if and only if C dk < C dv + dk dv / h.
    for c in (64, 256):
        for dk in (32, 128, 512):
            for dv in (32, 128, 256):
                for heads in (1, 8):
                    costs = module_costs(
                        queries=1 << 30,
                        keys=1 << 30,
                        in_channels=c,
                        key_channels=dk,
                        value_channels=dv,
                        heads=heads,
                    )
                    pays = c * dk < c * dv + dk * dv / heads
                    assert cheapest(costs) == ("folded" if pays else "linear")


def test_what_folding_saves_is_what_the_costs_say():
    choices = random.Random(0)
    answers = set()
    for _ in range(500):
        heads = choices.choice([1, 2, 8])
        sizes = {
            "batch": choices.choice([1, 4]),
            "queries": choices.choice([1, 64, 500]),
            "keys": choices.choice([1, 64, 500]),
            "in_channels": choices.choice([8, 64, 256]),
            "source_channels": choices.choice([8, 64, 256]),
            "key_channels": heads * choices.choice([1, 8, 64]),
            "value_channels": heads * choices.choice([1, 8, 64]),
            "heads": heads,
        }
        costs = module_costs(**sizes, streamed=True)
        saved = costs["linear"].multiply_adds - costs["folded"].multiply_adds
        assert folding_saves_little(**sizes) == (saved <= SHORT_MULTIPLY_ADDS), sizes
        answers.add(saved <= SHORT_MULTIPLY_ADDS)
    assert answers == {True, False}


def test_a_short_module_folds_where_that_saves_much():
    for channels, expected in ((32, "linear"), (256, "folded")):
        module = EfficientAttention2d(channels)
        assert module.planned_order(torch.empty(1, channels, 16, 16)) == expected
        assert module.planned_order(torch.empty(1, channels, 32, 32)) == "folded"


def test_cheapest_breaks_ties_by_bytes_and_respects_a_choice():
    costs = operator_costs(queries=64, keys=64, key_channels=64, value_channels=64)
    assert costs["linear"].multiply_adds == costs["quadratic"].multiply_adds
    assert cheapest(costs) == "linear"
    assert cheapest(costs, among=["quadratic"]) == "quadratic"


@pytest.mark.parametrize(
    ("channels", "expected"), [((64, 64), 64), ((128, 256), 512 / 3), ((512, 1024), 2048 / 3)]
)
def test_crossover_is_where_both_orders_cost_the_same(channels, expected):
    assert crossover(*channels) == pytest.approx(expected)
    length = int(crossover(*channels))
    for n, order in ((length - 1, "quadratic"), (length + 1, "linear")):
        costs = operator_costs(
            queries=n, keys=n, key_channels=channels[0], value_channels=channels[1]
        )
        assert min(costs, key=lambda name: costs[name].multiply_adds) == order


def test_gradients_take_the_order_with_fewer_products_as_the_counter_sees_them():
    def quadratic(a, w, v, d_output):
        d_scores = d_output @ v.mT
        return (a @ w.mT).mT @ d_output, d_scores.mT @ a, d_scores @ w

    def linear(a, w, v, d_output):
        d_context = a.mT @ d_output
        return w @ d_context, v @ d_context.mT, d_output @ (w.mT @ v).mT

    generator = random.Random(0)
    chosen = set()
    for _ in range(50):
        queries, keys, key_channels, value_channels = (generator.randint(1, 99) for _ in range(4))
        shapes = (queries, key_channels), (keys, key_channels), (keys, value_channels)
        inputs = [torch.empty(s, device="meta") for s in (*shapes, (queries, value_channels))]
        counts = []
        for order in (quadratic, linear):
            with FlopCounterMode(display=False) as counter:
                order(*inputs)
            counts.append(counter.get_total_flops())
        sizes = queries, keys, key_channels, value_channels
        assert quadratic_gradients_are_cheaper(*sizes) == (counts[0] <= counts[1])
        chosen.add(counts[0] <= counts[1])
    assert chosen == {False, True}
    assert quadratic_gradients_are_cheaper(64, 64, 64, 64)  # as many


def test_the_quadratic_order_is_planned_only_while_it_fits_the_cache():
    for keys, order in ((1000, "quadratic"), (100_000, "linear")):
        costs = operator_costs(queries=1, keys=keys, key_channels=64, value_channels=64)
        assert costs["quadratic"].multiply_adds < costs["linear"].multiply_adds
        assert cheapest(costs) == order


def test_blocks_fit_their_budget_and_never_depend_on_the_batch():
    assert block_length(8 * 128, 4) == 1024  # 8 * 128 * 4 bytes * 1024 positions = 4 MiB
    assert block_length(128, 4) == 8192
    assert block_length(128, 2) == 16384
    assert block_length(512 * 1024, 4) == 256  # a floor, so that products stay efficient
    assert maps_per_block(8192, 128, 4) == 1
    assert maps_per_block(64, 128, 4) == 128
