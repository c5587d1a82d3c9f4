"""The blocked path against the oracle: values, every gradient, every layout, odd sizes, many blocks."""

import pytest
import torch

from efficient_attention import attend, efficient_attention, summarize
from efficient_attention.memory import peak_bytes
from efficient_attention.ops import blocked, blocks, precision
from efficient_attention.ops.blocks import fold
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    make_inputs,
    plain_attention,
    relative_error,
)

SIZES = [(2, 3, 37, 53, 8, 5), (3, 1, 16, 16, 1, 1), (1, 2, 1, 129, 3, 70), (2, 1, 65, 1, 17, 4)]


def layouts(x):
    """The same ``[B, H, N, D]`` tensor: contiguous, token-major, channel-major, strided."""
    yield "contiguous", x.contiguous()
    yield "token-major", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "channel-major", x.mT.contiguous().mT
    wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    yield "strided", wide[..., 1::2]


def gradients(output, inputs):
    slope = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return torch.autograd.grad(output, inputs, slope.to(output.dtype))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_match_the_oracle_in_many_blocks(
    normalization, sizes, masked, short_blocks
):
    inputs = make_inputs(*sizes, requires_grad=True)
    mask = torch.rand(sizes[0], 1, sizes[3]) > 0.3 if masked else None
    results = {}
    for backend in ("blocked", "reference"):
        output = efficient_attention(
            *inputs, key_mask=mask, normalization=normalization, order="linear", backend=backend
        )
        results[backend] = (output, *gradients(output, inputs))
    torch.testing.assert_close(results["blocked"], results["reference"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mask_shape", [(53,), (1, 53), (1, 3, 53), (5, 53), (5, 1, 53), (5, 3, 53)]
)
@pytest.mark.parametrize(("maps", "tiles"), [(1, 15), (2, 10), (3, 5), (7, 3), (15, 1)])
def test_masks_follow_the_samples_and_heads_of_a_tile(mask_shape, maps, tiles, monkeypatch):
    monkeypatch.setattr(blocks, "block_length", lambda *_: 16)
    monkeypatch.setattr(blocks, "maps_per_block", lambda *_: maps)
    walked = blocked._walk(torch.empty(5, 3, 53, 8), 5)
    assert len(walked) == tiles
    assert all(len(tile.blocks) == 4 for tile in walked)
    covered = torch.zeros(5, 3)
    for tile in walked:
        covered[tile.rows, tile.heads] += 1
    assert (covered == 1).all()
    inputs = make_inputs(batch=5, requires_grad=True)
    mask = torch.rand(mask_shape) > 0.4
    results = {}
    for backend in ("blocked", "reference"):
        output = efficient_attention(*inputs, key_mask=mask, order="linear", backend=backend)
        results[backend] = (output, *gradients(output, inputs))
    torch.testing.assert_close(results["blocked"], results["reference"], rtol=0, atol=1e-12)


def test_the_largest_key_may_come_in_any_block(short_blocks):
    _, key, value = make_inputs(dtype=torch.float32)
    key = key + torch.linspace(0, 1000, 53).unsqueeze(-1)  # exp(1000) is beyond float64
    for keys in (key, key.flip(2)):
        got, expected = (summarize(keys, value, backend=b) for b in ("blocked", "reference"))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("offset", [0, 100, 10_000])
def test_gradients_stay_precise_where_keys_are_large(offset):
    # Weights must not be recovered from log_weight: at 10,000 its last digit is worth 0.1%.
    query, key, value = make_inputs(keys=500, dtype=torch.float32)
    low = [query, key + offset, value]
    exact = [x.double() for x in low]
    all_results = []
    for function, tensors in (
        (efficient_attention, low),
        (plain_attention, low),
        (plain_attention, exact),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        all_results.append(gradients(function(*leaves), leaves))
    names = ("d_query", "d_key", "d_value")
    for name, got, plain, truth in zip(names, *all_results, strict=True):
        assert_as_precise_as_plain(got, plain, truth, name)


def test_sums_over_blocks_are_a_balanced_tree():
    blocks = [slice(i, i + 1) for i in range(5)]
    order = fold(lambda a, b: f"({a}{b})", lambda n: str(n.start), blocks)
    assert order == "((01)(2(34)))"


@pytest.mark.parametrize("layout", ["contiguous", "token-major", "channel-major", "strided"])
def test_memory_layout_changes_nothing_and_is_kept(layout, short_blocks):
    inputs = make_inputs(requires_grad=True)
    expected = efficient_attention(*inputs, backend="reference", order="linear")
    expected_grads = gradients(expected, inputs)
    laid_out = [dict(layouts(x.detach()))[layout].requires_grad_() for x in inputs]
    got = efficient_attention(*laid_out, backend="blocked")
    got_grads = gradients(got, laid_out)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_grads, expected_grads, rtol=0, atol=1e-12)
    if layout in ("token-major", "channel-major"):
        like = dict(layouts(torch.empty(got.shape)))[layout]
        assert got.stride() == like.stride()
        assert [g.stride() for g in got_grads] == [x.stride() for x in laid_out]


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_gradients_through_log_weight_match_the_oracle(normalization, short_blocks):
    _, key, value = make_inputs(requires_grad=True)
    mask = torch.rand(2, 53) > 0.3
    results = []
    for backend in ("blocked", "reference"):
        context = summarize(key, value, key_mask=mask, normalization=normalization, backend=backend)
        objective = context.mean.sin().sum() + context.log_weight.sin().sum()
        results.append(torch.autograd.grad(objective, (key, value)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_attending_in_groups_matches_the_oracle(short_blocks):
    query, key, value = make_inputs(key_channels=12, requires_grad=True)
    context = summarize(key, value)
    results = []
    for backend in ("blocked", "reference"):
        for q in (query, query.mT.contiguous().mT):
            output = attend(q, context, num_groups=3, backend=backend)
            grads = torch.autograd.grad(output.sin().sum(), (query, key, value), retain_graph=True)
            results.append((output, *grads))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["token-major", "channel-major"])
def test_every_dtype_and_layout_is_as_precise_as_a_plain_run(dtype, layout, short_blocks):
    inputs = make_inputs(queries=200, keys=300, key_channels=16, value_channels=24, dtype=dtype)
    leaves = [dict(layouts(x))[layout].requires_grad_() for x in inputs]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs = [
        efficient_attention(*leaves, backend="blocked"),
        plain_attention(*plain),
        plain_attention(*exact),
    ]
    all_results = [
        (out, *gradients(out, tensors))
        for out, tensors in zip(outputs, (leaves, plain, exact), strict=True)
    ]
    for name, got, low, truth in zip(
        ("output", "d_query", "d_key", "d_value"), *all_results, strict=True
    ):
        assert_as_precise_as_plain(got, low, truth, name)


@pytest.mark.parametrize(
    ("dtype", "multiplied", "error"),
    # bfloat16 that is multiplied as it is: weights are rounded once, and so is the sum of each block.
    [(torch.float16, True, 1e-6), (torch.bfloat16, True, 2**-8), (torch.bfloat16, False, 1e-6)],
)
def test_contexts_of_half_precision_are_float32(dtype, multiplied, error, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: multiplied)
    _, key, value = make_inputs(dtype=dtype, keys=500)
    context = summarize(key, value)
    truth = summarize(key.double(), value.double(), backend="reference")
    assert context.mean.dtype == context.log_weight.dtype == torch.float32
    assert relative_error(context.mean, truth.mean) < error
    assert relative_error(context.log_weight, truth.log_weight) < 1e-6


def test_allocates_the_output_and_little_else():
    query, key, value = (torch.randn(1, 8, 65_536, 64) for _ in range(3))
    peak = peak_bytes(lambda: efficient_attention(query, key, value))
    assert peak <= query.nbytes + 8_000_000
    # The plain equations hold both softmaxes: if this fell too, the measurement would be at fault.
    assert peak_bytes(lambda: plain_attention(query, key, value)) >= 2 * query.nbytes


def test_training_allocates_the_output_the_gradients_and_little_else():
    inputs = [torch.randn(1, 8, 65_536, 64, requires_grad=True) for _ in range(3)]
    slope = torch.randn_like(inputs[0])

    def train():
        output = efficient_attention(*inputs)
        return output, torch.autograd.grad(output, inputs, slope)

    assert peak_bytes(train) <= 4 * slope.nbytes + 8_000_000


def test_a_long_batch_of_short_sequences_is_bounded_too():
    query, key, value = (torch.randn(4096, 4, 49, 32) for _ in range(3))
    peak = peak_bytes(lambda: efficient_attention(query, key, value, order="linear"))
    context = 4096 * 4 * 32 * 33 * 4
    assert peak <= query.nbytes + context + 16_000_000
