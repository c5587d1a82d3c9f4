"""Short inputs by the native kernels, each head at once; test_native.py has them in the linear order."""

import functools
import itertools
import random

import pytest
import torch

from efficient_attention import EfficientAttention2d, efficient_attention
from efficient_attention.ops import native_build, planner
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    attention_results,
    layouts,
    make_inputs,
    plain_attention,
)

served = pytest.mark.skipif(native_build.why_not() is not None, reason=str(native_build.why_not()))

DTYPES = [torch.float32, torch.bfloat16]
NORMALIZATIONS = ["softmax", "scaling"]
ORDERS = ["auto", "linear"]
# B, H, N, M, Dk, Dv for which the quadratic order is the cheaper one, also of the gradients.
SHORT = [
    (1, 2, 1, 5, 64, 64),  # few queries, whose channels are in vectors
    (2, 3, 16, 20, 64, 48),
    (2, 2, 3, 37, 33, 20),  # few again
    (1, 2, 8, 600, 80, 144),  # and more than one chunk of keys
    (1, 2, 100, 7, 33, 20),
    (1, 1, 64, 64, 128, 128),
    (1, 2, 64, 64, 64, 64),  # as many multiply-adds in both orders
    (1, 1, 700, 40, 256, 192),  # more than one chunk of queries
    (1, 2, 9, 600, 64, 48),  # and of keys
]
NAMES = ("output", "d_query", "d_key", "d_value")


def by(backend, order="linear", **options):
    return functools.partial(efficient_attention, order=order, backend=backend, **options)


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "channel-major", "strided"])
@pytest.mark.parametrize("sizes", SHORT)
@pytest.mark.parametrize("masked", [False, True])
def test_the_quadratic_order_is_as_precise_as_a_plain_run(
    dtype, normalization, layout, sizes, masked, kernels
):
    assert planner.quadratic_is_cheaper(*sizes[2:], or_equal=True)
    assert planner.quadratic_gradients_are_cheaper(*sizes[2:])
    inputs = make_inputs(*sizes, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(sizes[0], sizes[3]) > 0.3
        mask[:, 0] = True
    options = {"key_mask": mask, "normalization": normalization}
    laid_out = [layouts(x)[layout] for x in inputs]
    got, linear = (attention_results(by("native", o, **options), laid_out) for o in ORDERS)
    plain = functools.partial(plain_attention, **options)
    low, exact = (attention_results(plain, x) for x in (inputs, [x.double() for x in inputs]))
    for result, other, *known in zip(got, linear, low, exact, NAMES, strict=True):
        if dtype == torch.float32:  # it is another order
            assert not torch.equal(result, other)
        assert_as_precise_as_plain(result, *known)


@served
@pytest.mark.parametrize("queries", [3, 16])
def test_a_query_whose_keys_are_all_masked_gets_nothing_in_the_quadratic_order(queries, kernels):
    query, key, value = make_inputs(2, 3, queries, 20, 64, 48, dtype=torch.float32)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    key[1], value[1] = torch.nan, torch.nan
    inputs = query, key, value
    for result in attention_results(by("native", "auto", key_mask=mask), inputs):
        assert not result[1].any()
        assert result[0].all()


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("queries", [1, 9])
def test_chunks_of_which_all_keys_are_masked_count_for_nothing(
    queries, order, normalization, kernels
):
    query, key, value = make_inputs(1, 2, queries, 600, 64, 48, dtype=torch.float32)
    first = 300
    mask = torch.arange(600).expand(1, 1, -1) >= first
    key[:, :, :first], value[:, :, :first] = torch.nan, torch.nan
    run = by("native", order, key_mask=mask, normalization=normalization)
    got = attention_results(run, (query, key, value))
    rest = query, key[:, :, first:], value[:, :, first:]
    expected = attention_results(by("reference", normalization=normalization), rest)
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-4, atol=1e-5)
    for gradient, of_rest in zip(got[2:], expected[2:], strict=True):
        assert not gradient[:, :, :first].any()
        torch.testing.assert_close(gradient[:, :, first:], of_rest, rtol=1e-4, atol=1e-5)


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 9])
def test_keys_that_grow_by_more_than_exponentials_hold_are_right_in_the_quadratic_order(
    queries, dtype, kernels
):
    query, key, value = make_inputs(1, 2, queries, 600, 64, 48, dtype=dtype)
    key = (key + torch.linspace(-200, 200, 600).unsqueeze(-1)).to(dtype)
    inputs = query, key, value
    got = attention_results(by("native", "auto"), inputs)
    low, exact = (
        attention_results(plain_attention, x) for x in (inputs, [x.double() for x in inputs])
    )
    for results in zip(got, low, exact, NAMES, strict=True):
        assert_as_precise_as_plain(*results)


@served
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", ["token-major", "channel-major", "strided", "expanded"])
def test_slopes_of_any_layout_give_the_same_gradients(layout, order, kernels):
    inputs = make_inputs(*SHORT[1], dtype=torch.float32, requires_grad=True)
    output = by("native", order)(*inputs)
    slope = torch.randn_like(output)
    other = layouts(slope)[layout] if layout != "expanded" else slope[:, :1].expand_as(slope)
    dense = other.clone(memory_format=torch.contiguous_format)
    assert dense.stride() != other.stride()
    results = [torch.autograd.grad(output, inputs, x, retain_graph=True) for x in (other, dense)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@served
@pytest.mark.parametrize("order", ORDERS)
def test_inputs_may_be_saved_elsewhere_for_the_backward_pass(order, kernels):
    """Such as by ``torch.autograd.graph.save_on_cpu``: copies have strides of their own."""
    inputs = [
        layouts(x)["strided"].requires_grad_() for x in make_inputs(*SHORT[1], dtype=torch.float32)
    ]
    mask = torch.rand(2, 20) > 0.3
    results = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = by("native", order, key_mask=mask)(*inputs)
        results.append(torch.autograd.grad(output.sin().sum(), inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@served
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("queries", [2, 16])
def test_only_gradients_of_short_inputs_that_are_asked_for_are_there(
    queries, order, needs, kernels
):
    inputs = make_inputs(2, 3, queries, 20, 64, 48, dtype=torch.float32)
    whole = attention_results(by("native", order), inputs)[1:]
    leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
    output = by("native", order)(*leaves)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).float())
    for leaf, gradient, need in zip(leaves, whole, needs, strict=True):
        assert (leaf.grad is None) != need
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


@served
@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives_and_many_gradients_at_a_time_of_short_inputs_are_right(order, kernels):
    inputs = make_inputs(1, 2, 7, 9, 4, 3, dtype=torch.float32, requires_grad=True)
    mask = torch.rand(1, 9) > 0.3
    results = []
    for backend in ("native", "reference"):
        run = by(backend, order, key_mask=mask)
        output = run(*inputs)
        first = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        output = run(*inputs)
        slopes = torch.eye(3).reshape(3, 1, 1, 1, 3).expand(3, *output.shape)
        many = torch.autograd.grad(output, inputs, slopes, is_grads_batched=True)
        results.append((*first, *second, *many))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@served
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_as_precise_inside_autocast_as_outside(order, kernels, way):
    inputs = make_inputs(*SHORT[1], dtype=torch.float32, requires_grad=True)
    outputs = [by("native", order)(*inputs) for _ in range(2)]
    expected = torch.autograd.grad(outputs[0].sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(outputs[1].sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@served
@pytest.mark.parametrize("masked", [False, True])
def test_auto_takes_them_for_short_inputs_too(masked, kernels, monkeypatch):
    inputs = make_inputs(dtype=torch.float32)
    mask = torch.rand(2, 53) > 0.4 if masked else None
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    options = {"key_mask": mask}
    got, expected = (attention_results(by(b, **options), inputs) for b in ("auto", "native"))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    efficient_attention(*inputs, **options)
    with torch.profiler.profile() as profile:
        efficient_attention(*inputs, **options)
    # Memory for the output, and its NaN: nothing of PyTorch computes, nor looks at sizes a second time.
    names = {"aten::new_empty_strided", "aten::empty_strided", "aten::fill_"}
    assert {e.name for e in profile.events()} <= names


@served
def test_gradients_that_nobody_watched_are_asked_about_once(kernels, monkeypatch):
    inputs = make_inputs(*SHORT[1], dtype=torch.float32, requires_grad=True)

    def gradients():
        return torch.autograd.grad(by("native")(*inputs).sum(), inputs)

    gradients()
    expected = gradients()
    monkeypatch.setattr("efficient_attention.ops.short.nobody_watches", None)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    output = by("native")(*inputs).sum()
    with torch.autocast("cpu"), pytest.raises(TypeError, match="not callable"):
        torch.autograd.grad(output, inputs)


@served
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_size_and_layout_are_right(dtype, kernels, way):
    generator = random.Random(0)
    for _ in range(60):
        batch, heads = generator.choice([(1, 1), (1, 2), (2, 1), (2, 3)])
        lengths = [generator.choice([0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 257, 300]) for _ in "NM"]
        channels = [generator.choice([1, 2, 7, 16, 31, 33, 64, 100]) for _ in "KV"]
        inputs = make_inputs(batch, heads, *lengths, *channels, dtype=dtype)
        broadcast = generator.choice([(batch,), (1,), (batch, heads), (1, heads), (batch, 1)])
        mask = generator.choice([None, torch.rand(*broadcast, lengths[1]) > 0.5])
        order = generator.choice(ORDERS)
        laid_out = [layouts(x)[generator.choice(list(layouts(x)))] for x in inputs]
        got = attention_results(by("native", order, key_mask=mask), laid_out)
        exact = attention_results(by("reference", key_mask=mask), [x.double() for x in inputs])
        # The gradient of a single key is zero, and what is left of it rounding of those of the others.
        largest = max([1.0, *(x.abs().max().item() for x in exact[1:] if x.numel())])
        for result, truth in zip(got, exact, strict=True):
            error = (result.double() - truth).abs() / largest
            assert (error < (2e-6 if dtype == torch.float32 else 2e-2)).all(), error.max()


@served
def test_inputs_and_slopes_without_strides_of_their_own_are_right(kernels, way):
    query, key, value = make_inputs(2, 3, 70, 90, 16, 24, dtype=torch.float32)
    inputs = (query, key[:, :1].expand_as(key), value[:1].expand_as(value))
    results = []
    for backend in ("native", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        by(backend)(*leaves).sum().backward()
        results.append([x.grad for x in leaves])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@served
@pytest.mark.parametrize("channels", [(16, 0), (0, 16)])
def test_no_channels_give_no_gradients(channels, kernels, way):
    inputs = make_inputs(1, 2, 300, 310, *channels, dtype=torch.float32)
    results = [attention_results(by(b), inputs) for b in ("native", "reference")]
    torch.testing.assert_close(*results)


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(150, 150, 24, 40), (1100, 600, 24, 40), (700, 40, 256, 192), (40, 700, 256, 192)],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 3])
def test_more_threads_than_heads_change_no_bit(heads, sizes, dtype, kernels):
    inputs = make_inputs(1, heads, *sizes, dtype=dtype)
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(attention_results(by("native", "auto"), inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("place", ["query", "key", "value", "elsewhere"])
def test_short_results_are_written_to_memory_that_is_there(normalization, place, kernels):
    inputs = dict(
        zip(
            ("query", "key", "value"),
            make_inputs(1, 4, 50, 50, 16, 16, dtype=torch.float32),
            strict=True,
        )
    )
    run = by("native", normalization=normalization)
    expected = run(**inputs)
    out = inputs.get(place, torch.empty(1, 4, 50, 16))
    assert run(**inputs, out=out) is out
    torch.testing.assert_close(out, expected)


@served
def test_a_short_module_goes_to_them(kernels, monkeypatch):
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    module = EfficientAttention2d(64)
    x = torch.randn(1, 64, 4, 4)
    assert module.planned_order(x) == "quadratic"
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    assert not {"aten::bmm", "aten::_softmax"} & {e.name for e in profile.events()}
