"""What must hold of the map whatever computes it."""

import pytest
import torch

from efficient_attention import attend, dot_product_attention, efficient_attention, summarize
from efficient_attention.ops import reference
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    make_inputs,
    plain_attention,
)

NORMALIZATIONS = ["softmax", "scaling"]
WAYS = [("linear", "reference"), ("linear", "blocked"), ("quadratic", "auto"), ("auto", "auto")]
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("order", "backend"), WAYS)
@pytest.mark.parametrize("sizes", [(2, 3, 37, 53, 8, 5), (1, 1, 1, 1, 1, 1), (2, 2, 5, 300, 4, 16)])
def test_every_order_gives_the_explicit_product(normalization, order, backend, sizes):
    query, key, value = make_inputs(*sizes)
    if normalization == "softmax":
        weights = query.softmax(-1) @ key.softmax(-2).mT
    else:
        weights = query @ key.mT / key.shape[-2]
    got = efficient_attention(
        query, key, value, normalization=normalization, order=order, backend=backend
    )
    torch.testing.assert_close(got, weights @ value, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_scaling_efficient_attention_equals_scaling_dot_product_attention(masked):
    query, key, value = make_inputs()
    mask = torch.rand(2, 53) > 0.3 if masked else None
    got = efficient_attention(
        query, key, value, key_mask=mask, normalization="scaling", order="linear"
    )
    expected = dot_product_attention(query, key, value, key_mask=mask, normalization="scaling")
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_multihead_equals_head_by_head(normalization):
    query, key, value = make_inputs()
    together = efficient_attention(query, key, value, normalization=normalization)
    apart = [
        efficient_attention(q, k, v, normalization=normalization)
        for q, k, v in zip(query.split(1, 1), key.split(1, 1), value.split(1, 1), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(apart, 1), **EXACT)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuting_queries_permutes_outputs_and_permuting_keys_changes_nothing(normalization):
    query, key, value = make_inputs()
    rows, columns = torch.randperm(37), torch.randperm(53)
    expected = efficient_attention(query, key, value, normalization=normalization)[:, :, rows]
    got = efficient_attention(
        query[:, :, rows], key[:, :, columns], value[:, :, columns], normalization=normalization
    )
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("order", "backend"), WAYS)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padding_changes_nothing_whatever_it_holds(normalization, order, backend, garbage):
    query, key, value = make_inputs()
    options = {"normalization": normalization, "order": order, "backend": backend}
    expected = efficient_attention(query, key, value, **options)
    padding = torch.full((2, 3, 11, 8), garbage).double()
    padded_key = torch.cat((key, padding), 2)
    padded_value = torch.cat((value, padding[..., :5]), 2)
    mask = torch.arange(64).expand(2, 64) < 53
    got = efficient_attention(query, padded_key, padded_value, key_mask=mask, **options)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_content_of_padding_changes_no_bit(dtype, short_blocks):
    query, key, value = make_inputs(keys=64, dtype=dtype)
    mask = torch.arange(64).expand(2, 64) < 53
    first = efficient_attention(query, key, value, key_mask=mask, order="linear")
    key[:, :, 53:], value[:, :, 53:] = float("nan"), float("inf")
    second = efficient_attention(query, key, value, key_mask=mask, order="linear")
    assert torch.equal(first, second)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_mates_change_nothing_but_rounding(dtype, threads):
    torch.set_num_threads(threads)
    query, key, value = make_inputs(batch=5, queries=700, keys=1500, dtype=dtype)
    mask = torch.rand(5, 1500) > 0.3
    together = efficient_attention(query, key, value, key_mask=mask, order="linear")
    for i in range(5):
        one = slice(i, i + 1)
        alone = efficient_attention(
            query[one], key[one], value[one], key_mask=mask[one], order="linear"
        )
        # How threads share a product of many matrices, and so how it rounds, is the library's own choice.
        rtol = 0 if threads == 1 else max(5e-7, torch.finfo(dtype).eps)
        torch.testing.assert_close(together[one], alone, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("order", "backend"), WAYS)
@pytest.mark.parametrize("empty_by", ["mask", "length"])
def test_attending_to_nothing_gives_zero_and_finite_gradients(
    normalization, order, backend, empty_by
):
    keys = 53 if empty_by == "mask" else 0
    query, key, value = make_inputs(keys=keys, requires_grad=True)
    mask = torch.zeros(2, keys, dtype=torch.bool) if empty_by == "mask" else None
    output = efficient_attention(
        query, key, value, key_mask=mask, normalization=normalization, order=order, backend=backend
    )
    assert torch.equal(output, torch.zeros_like(output))
    for grad in torch.autograd.grad(output.square().sum() + output.sum(), (query, key, value)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("keys", [0, 53])
def test_a_context_of_no_keys_is_the_empty_one(normalization, backend, keys):
    _, key, value = make_inputs(keys=keys)
    mask = torch.zeros(2, keys, dtype=torch.bool) if keys else None
    options = {"normalization": normalization, "backend": backend}
    mean, log_weight = summarize(key, value, key_mask=mask, **options)
    assert torch.equal(mean, torch.zeros(2, 3, 8, 5, dtype=torch.float64))
    assert torch.equal(log_weight, torch.full((2, 3, 8), -torch.inf, dtype=torch.float64))


@pytest.mark.parametrize(("order", "backend"), WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_channel_without_weight_gives_zero_and_finite_gradients(order, backend, masked):
    query, key, value = make_inputs()
    key[:, :, :, 3] = -torch.inf
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.rand(2, 53) > 0.3 if masked else None
    output = efficient_attention(*leaves, key_mask=mask, order=order, backend=backend)
    # Every other channel is as it was, and this one adds nothing.
    weights = query.softmax(-1)[..., [0, 1, 2, 4, 5, 6, 7]]
    others = key[..., [0, 1, 2, 4, 5, 6, 7]]
    if masked:
        others = others.masked_fill(~mask[:, None, :, None], -torch.inf)
    expected = weights @ (others.softmax(-2).mT @ value)
    torch.testing.assert_close(output, expected, **EXACT)
    got, gradients = (torch.autograd.grad(x.sin().sum(), leaves) for x in (output, expected))
    torch.testing.assert_close(got, gradients, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_channel_without_weight_is_empty_and_merges_as_such(backend, masked, short_blocks):
    _, key, value = make_inputs()
    key[:, :, :20, 3] = -torch.inf
    mask = torch.rand(2, 53) > 0.3 if masked else torch.ones(2, 53, dtype=torch.bool)
    whole = summarize(key, value, key_mask=mask, backend=backend)
    left, right = (
        summarize(key[:, :, n], value[:, :, n], key_mask=mask[:, n], backend=backend)
        for n in (slice(20), slice(20, None))
    )
    assert not left.mean[..., 3, :].any()
    assert (left.log_weight[..., 3] == -torch.inf).all()
    torch.testing.assert_close(left.merge(right), whole, **EXACT)


@pytest.mark.parametrize(("order", "backend"), WAYS)
def test_keys_that_are_not_numbers_show(order, backend):
    query, key, value = make_inputs()
    for bad in (torch.nan, torch.inf):
        key[..., 3] = -torch.inf
        key[:, :, 7, 3] = bad
        assert efficient_attention(query, key, value, order=order, backend=backend).isnan().all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_one_sample_without_keys_does_not_disturb_the_other(normalization):
    query, key, value = make_inputs(requires_grad=True)
    mask = torch.ones(2, 53, dtype=torch.bool)
    mask[0] = False
    output = efficient_attention(
        query, key, value, key_mask=mask, normalization=normalization, order="linear"
    )
    alone = efficient_attention(
        query[1:], key[1:], value[1:], normalization=normalization, order="linear"
    )
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    torch.testing.assert_close(output[1:], alone, **EXACT)
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (query, key, value)))


def test_masks_of_every_shape_mean_the_same():
    query, key, value = make_inputs(batch=1)
    mask = torch.rand(53) > 0.4
    expected = efficient_attention(query, key[:, :, mask], value[:, :, mask])
    for shape in ((53,), (1, 53), (1, 1, 53), (1, 3, 53)):
        got = efficient_attention(query, key, value, key_mask=mask.expand(shape), order="linear")
        torch.testing.assert_close(got, expected, **EXACT)


def test_masks_may_differ_by_head():
    query, key, value = make_inputs()
    mask = torch.rand(2, 3, 53) > 0.4
    got = efficient_attention(query, key, value, key_mask=mask, order="linear")
    for head in range(3):
        one = slice(head, head + 1)
        alone = efficient_attention(
            query[:, one], key[:, one], value[:, one], key_mask=mask[:, head], order="linear"
        )
        torch.testing.assert_close(got[:, one], alone, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_dtype_is_as_precise_as_a_plain_run(dtype, normalization, order, masked):
    inputs = make_inputs(
        queries=300, keys=400, key_channels=16, value_channels=16, dtype=dtype, requires_grad=True
    )
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    mask = torch.rand(2, 400) > 0.3 if masked else None
    slope = torch.randn(2, 3, 300, 16).to(dtype)

    def results(function, tensors):
        output = function(*tensors)
        return (output, *torch.autograd.grad(output, tensors, slope.to(output.dtype)))

    def ours(*tensors):
        return efficient_attention(
            *tensors, key_mask=mask, normalization=normalization, order=order
        )

    def plain(*tensors):
        return plain_attention(*tensors, mask, normalization)

    for name, got, low, truth in zip(
        ("output", "d_query", "d_key", "d_value"),
        results(ours, inputs),
        results(plain, inputs),
        results(plain, exact),
        strict=True,
    ):
        assert got.dtype == dtype
        assert_as_precise_as_plain(got, low, truth, name)


def test_float16_counts_beyond_its_range():
    # 100,000 keys of equal weight: a normaliser in float16 would overflow at 65,504.
    key = torch.zeros(1, 1, 100_000, 4, dtype=torch.float16)
    value = torch.full((1, 1, 100_000, 4), 3.0, dtype=torch.float16)
    query = torch.randn(1, 1, 9, 4).half()
    for normalization, expected in (("softmax", 3.0), ("scaling", 0.0)):
        got = efficient_attention(query, key, value, normalization=normalization, order="linear")
        assert torch.equal(got, torch.full_like(got, expected))
    ones = torch.ones_like(key)
    got = efficient_attention(
        torch.ones_like(query), ones, value, normalization="scaling", order="linear"
    )
    assert torch.equal(got, torch.full_like(got, 12.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("order", "backend"), WAYS)
def test_large_logits_select_instead_of_overflowing(dtype, order, backend):
    query = torch.full((1, 1, 2, 2), -1e4, dtype=dtype)
    query[0, 0, 0, 0] = query[0, 0, 1, 1] = 1e4
    key = torch.full((1, 1, 3, 2), -1e4, dtype=dtype)
    key[0, 0, 1, 0] = key[0, 0, 2, 1] = 1e4
    value = torch.tensor([1.0, 2.0, 3.0], dtype=dtype).view(1, 1, 3, 1)
    got = efficient_attention(query, key, value, order=order, backend=backend)
    assert got.flatten().tolist() == [2.0, 3.0]


def test_context_of_a_million_float32_keys_is_precise():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 1 << 20, 64, generator=generator)
    value = torch.randn(1, 1, 1 << 20, 64, generator=generator)
    truth = key.double().softmax(-2).mT @ value.double()
    mean = summarize(key, value).mean
    assert ((mean.double() - truth).norm() / truth.norm()).item() <= 1e-6


def test_results_do_not_depend_on_threads_or_block_length(monkeypatch):
    query, key, value = make_inputs(keys=3000, queries=3000, dtype=torch.float32)
    results = []
    for threads, shortest in ((1, 256), (2, 256), (2, 100)):
        torch.set_num_threads(threads)
        monkeypatch.setattr("efficient_attention.ops.planner.BLOCK_BYTES", 1)
        monkeypatch.setattr("efficient_attention.ops.planner.SHORTEST_BLOCK", shortest)
        results.append(efficient_attention(query, key, value, order="linear"))
    truth = efficient_attention(
        *(x.double() for x in (query, key, value)), backend="reference", order="linear"
    )
    plain = plain_attention(query, key, value)
    for result in results:
        assert_as_precise_as_plain(result, plain, truth)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (4, 12), (12, 4)])
def test_dot_product_softmax_equals_the_explicit_map(masked, channels):
    query, key, value = make_inputs(key_channels=channels[0], value_channels=channels[1])
    mask = None
    scores = 0.5 * query @ key.mT
    if masked:
        mask = torch.rand(2, 53) > 0.5
        mask[0] = False
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    expected = (scores.softmax(-1) @ value).nan_to_num(0)
    got = dot_product_attention(query, key, value, key_mask=mask, scale=0.5)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize(("normalization", "scale"), [("softmax", 0.3), ("scaling", 1.0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (4, 12), (12, 4)])
def test_the_fast_baseline_equals_the_plain_one(normalization, scale, masked, channels):
    inputs = make_inputs(key_channels=channels[0], value_channels=channels[1], requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(2, 3, 53) > 0.5
        mask[0, 1] = False
    plain = reference.dot_product_attention(*inputs, mask, normalization, scale)
    fast = dot_product_attention(*inputs, key_mask=mask, normalization=normalization, scale=scale)
    torch.testing.assert_close(fast, plain, **EXACT)
    got, expected = (torch.autograd.grad(y.sin().sum(), inputs) for y in (fast, plain))
    torch.testing.assert_close(got, expected, **EXACT)


def test_dot_product_attention_takes_strided_inputs_without_an_explicit_map():
    # Fused kernels fall back to an N x M map, silently, where a last stride is not one.
    from efficient_attention.memory import peak_bytes

    x = torch.randn(1, 16, 4096)
    q = k = v = x.unflatten(1, (1, 16)).mT
    assert peak_bytes(lambda: dot_product_attention(q, k, v)) < 4096 * 4096


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(batch, queries):
    query, key, value = make_inputs(batch=batch, queries=queries, requires_grad=True)
    output = efficient_attention(query, key, value)
    assert output.shape == (batch, 3, queries, 5)
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_kept_context_serves_any_queries():
    query, key, value = make_inputs()
    memory = summarize(key, value)
    whole = efficient_attention(query, key, value, order="linear")
    parts = [attend(q, memory) for q in query.split(10, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, **EXACT)
