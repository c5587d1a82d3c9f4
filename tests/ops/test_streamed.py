"""The streamed module against the plain equations: values, every gradient, layouts, masks, precision, memory."""

import itertools

import pytest
import torch

from efficient_attention.memory import peak_bytes
from efficient_attention.ops import library, reference, streamed
from efficient_attention.testing import assert_as_precise_as_plain, relative_error

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# B, C, S (None: attends to itself), dk, dv, h, N, M
SIZES = [
    (1, 8, None, 4, 12, 1, 37, 37),
    (2, 8, 6, 4, 12, 2, 37, 53),
    (3, 5, None, 6, 3, 3, 16, 16),
    (2, 3, 1, 1, 1, 1, 1, 129),
    (1, 4, 4, 2, 2, 2, 65, 1),
]


def inputs(batch, c, s, dk, dv, heads, queries, keys, *, bias=True, masked=False, tokens=False):
    """``x, source, key_mask, weights, biases, num_heads``, in float64."""

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    def features(channels, positions):
        if tokens:
            return draw(batch, positions, channels).mT
        return draw(batch, channels, positions)

    x = features(c, queries)
    source = None if s is None else features(s, keys)
    attended = c if s is None else s
    weights = [draw(dk, c), draw(dk, attended), draw(dv, attended), draw(c, dv)]
    biases = [draw(len(w)) if bias else None for w in weights]
    mask = None
    if masked:
        mask = torch.rand(batch, keys) > 0.4
        mask[0] = False
    return x, source, mask, weights, biases, heads


def run(function, given, normalization, residual=True, dtype=torch.float64):
    """The output, and the gradients of all that has one, of one of both functions."""
    x, source, mask, weights, biases, heads = given

    def leaf(t):
        return None if t is None else t.detach().to(dtype).requires_grad_()

    x, source = leaf(x), leaf(source)
    weights, biases = [leaf(w) for w in weights], [leaf(b) for b in biases]
    output = function(x, source, mask, weights, biases, normalization, heads, residual)
    output = output[0] if isinstance(output, tuple) else output
    slope = torch.randn(output.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    leaves = [t for t in (x, source, *weights, *biases) if t is not None]
    return output, torch.autograd.grad(output, leaves, slope.to(output.dtype))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(
    ("bias", "masked", "tokens"), list(itertools.product([True, False], repeat=3))
)
def test_values_and_gradients_are_those_of_the_plain_equations(
    sizes, normalization, bias, masked, tokens, short_blocks
):
    given = inputs(*sizes, bias=bias, masked=masked, tokens=tokens)
    for residual in (True, False):
        got, expected = (
            run(f, given, normalization, residual) for f in (library.folded, reference.module)
        )
        torch.testing.assert_close(got, expected, **EXACT)


def test_the_key_bias_gets_a_gradient_of_exactly_zero_under_softmax():
    given = inputs(*SIZES[0])
    x, source, mask, weights, biases, heads = given
    biases = [b.requires_grad_() for b in biases]
    for differentiable in (False, True):
        output, *_ = library.folded(x, source, mask, weights, biases, "softmax", heads, True)
        (d_bias,) = torch.autograd.grad(output.sin().sum(), biases[1], create_graph=differentiable)
        assert torch.equal(d_bias, torch.zeros_like(d_bias))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_gradients_of_first_and_second_order_are_right(normalization, short_blocks):
    x, source, mask, weights, biases, heads = inputs(2, 3, 2, 2, 4, 2, 3, 17, masked=True)
    # Under softmax the key bias has no effect, and finite differences find rounding.
    constant = biases[1] if normalization == "softmax" else None
    variables = [t for t in (x, source, *weights, *biases) if t is not constant]

    def function(*variables):
        given = iter(variables)
        x, source, *parameters = (
            t if t is constant else next(given) for t in (0, 1, *weights, *biases)
        )
        weights_, biases_ = parameters[:4], parameters[4:]
        return library.folded(x, source, mask, weights_, biases_, normalization, heads, True)[0]

    variables = [t.requires_grad_() for t in variables]
    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_gradients_that_nobody_asked_for_are_empty(needs, short_blocks):
    x, source, mask, weights, biases, heads = inputs(*SIZES[1])
    module = (x, source, mask, weights, biases, "softmax", heads, True)
    _, *summary = streamed.folded(*module)
    d_output = torch.randn_like(x)
    every = streamed.folded_backward(d_output, *module, *summary, [True] * 3)
    got = streamed.folded_backward(d_output, *module, *summary, needs)
    for i, (some, full) in enumerate(zip(got, every, strict=True)):
        expected = full if needs[min(i, 2)] else torch.empty(0, dtype=torch.float64)
        torch.testing.assert_close(some, expected, **EXACT)


def strided(x):
    """The same ``[B, C, N]`` in a larger tensor of NaN, from an odd address on, every other channel and position."""
    wide = torch.full(
        (x.shape[0], 2 * x.shape[1] + 1, 2 * x.shape[2] + 1), torch.nan, dtype=x.dtype
    )
    wide[:, 1::2, 1::2] = x
    return wide[:, 1::2, 1::2]


@pytest.mark.parametrize("seed", range(25))
def test_any_shape_strides_and_offset_give_the_plain_result(seed, short_blocks):
    generator = torch.Generator().manual_seed(seed)

    def size(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads, own = size(1, 3), size(0, 1)
    queries = size(0, 300)
    sizes = (size(0, 3), size(1, 9), None if own else size(1, 9), heads * size(1, 3))
    sizes = (*sizes, heads * size(1, 3), heads, queries, queries if own else size(0, 300))
    x, source, mask, weights, biases, heads = inputs(*sizes, tokens=bool(size(0, 1)))
    given = (strided(x), None if source is None else strided(source), mask, weights, biases, heads)
    for normalization in ("softmax", "scaling"):
        expected = reference.module(x, source, mask, weights, biases, normalization, heads, True)
        got, *summary = streamed.folded(*given[:5], normalization, heads, True)
        torch.testing.assert_close(got, expected, **EXACT)
        d_x, *_ = streamed.folded_backward(
            torch.ones(()).double().expand(got.shape),
            *given[:5],
            normalization,
            heads,
            True,
            *summary,
            [True] * 3,
        )
        leaf = x.detach().requires_grad_()
        plain = reference.module(leaf, source, mask, weights, biases, normalization, heads, True)
        torch.testing.assert_close(d_x, torch.autograd.grad(plain.sum(), leaf)[0], **EXACT)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(("masked", "tokens"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("residual", [True, False])
def test_low_precision_is_right_for_every_shape(
    dtype, sizes, normalization, masked, tokens, residual, short_blocks
):
    given = inputs(*sizes, masked=masked, tokens=tokens)
    x, source, mask, weights, biases, heads = given
    weights = [(w / w.shape[1] ** 0.5).to(dtype).double() for w in weights]
    rounded = (x.to(dtype).double(), source if source is None else source.to(dtype).double())
    given = (*rounded, mask, weights, [b.to(dtype).double() for b in biases], heads)
    truth = run(reference.module, given, normalization, residual)
    got = run(library.folded, given, normalization, residual, dtype)
    for a, exact in zip((got[0], *got[1]), (truth[0], *truth[1]), strict=True):
        # The bias of keys has no gradient under softmax; that of queries is a sum in which most cancels.
        if exact.norm() > 1e-9 * truth[0].norm():
            assert relative_error(a, exact) < 16 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("bfloat16_products", "short_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_written_over_its_input_it_is_the_same(dtype):
    for sizes, normalization in itertools.product(SIZES[:2], ("softmax", "scaling")):
        x, source, mask, weights, biases, heads = inputs(*sizes)
        x, source = (t if t is None else t.to(dtype) for t in (x, source))
        weights, biases = ([t.to(dtype) for t in ts] for ts in (weights, biases))
        options = (source, mask, weights, biases, normalization, heads, True)
        expected, *_ = streamed.folded(x, *options)
        streamed.folded_(x, *options)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_what_padding_holds_changes_no_bit(normalization, short_blocks):
    x, source, mask, weights, biases, heads = inputs(*SIZES[1], masked=True)
    options = (mask, weights, biases, normalization, heads, True)
    expected = streamed.folded(x, source, *options)
    source = source.masked_fill(~mask.unsqueeze(1), torch.nan)
    assert all(
        torch.equal(a, b)
        for a, b in zip(streamed.folded(x, source, *options), expected, strict=True)
    )


def test_batch_mates_change_no_bit():
    x, _, _, weights, biases, heads = inputs(3, 64, None, 32, 64, 4, 20_000, 20_000)
    options = (None, None, weights, biases, "softmax", heads, True)
    together, *_ = streamed.folded(x, *options)
    for i in range(3):
        assert torch.equal(streamed.folded(x[i : i + 1], *options)[0], together[i : i + 1])


def plain(x, source, mask, weights, biases, normalization, heads, residual):
    """The module as a user would type it, every step in the inputs' dtype."""
    query, key, value = (
        (w @ x + b.unsqueeze(-1)).unflatten(1, (heads, -1))
        for w, b in zip(weights[:3], biases[:3], strict=True)
    )
    if normalization == "softmax":
        query, key = query.softmax(2), key.softmax(-1)
    else:
        key = key / key.shape[-1]
    attended = ((key @ value.mT).mT @ query).flatten(1, 2)
    return x + weights[3] @ attended + biases[3].unsqueeze(-1)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("heads", [1, 8])
def test_low_precision_errs_no_more_than_twice_as_much_as_plain(dtype, normalization, heads):
    x, source, mask, weights, biases, _ = inputs(1, 64, None, 32, 64, heads, 3000, 3000)
    # Layers as they are initialized, and inputs that the dtype can hold, so that the truth starts from the same.
    weights = [(w / w.shape[1] ** 0.5).to(dtype).double() for w in weights]
    biases = [(b / 8).to(dtype).double() for b in biases]
    given = (x.to(dtype).double(), source, mask, weights, biases, heads)
    truth = run(plain, given, normalization)
    results = [run(f, given, normalization, dtype=dtype) for f in (library.folded, plain)]
    for got, low, exact in zip(*((y, *g) for y, g in (*results, truth)), strict=True):
        if normalization == "softmax" and exact.norm() < 1e-9 * truth[0].norm():
            assert not got.any(), "the key bias"
            continue
        assert_as_precise_as_plain(got, low, exact)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_bytes_do_not_grow_with_the_positions(dtype, tokens):
    held = []
    # Several blocks of sums, which are longer where caches are larger.
    for positions in (1 << 16, 1 << 17):
        given = inputs(1, 64, None, 32, 64, 8, positions, positions, tokens=tokens)
        x, _, _, weights, biases, heads = given
        x = x.to(dtype)
        assert all(len(tile.blocks) >= 4 for tile in streamed._walk(x, 32, torch.float32))
        weights, biases = ([t.to(dtype) for t in ts] for ts in (weights, biases))
        module = (x, None, None, weights, biases, "softmax", heads, True)
        forward = peak_bytes(lambda module=module: streamed.folded(*module)) - x.nbytes
        _, *summary = streamed.folded(*module)
        d_output = torch.randn_like(x)
        backward = (
            peak_bytes(
                lambda module=module, summary=summary, d_output=d_output: streamed.folded_backward(
                    d_output, *module, *summary, [True] * 3
                )
            )
            - x.nbytes
        )
        held.append((forward, backward))
    for less, more in zip(*held, strict=True):
        # Of the sums over blocks one more is incomplete at a time.
        assert more <= less + 2 * 64 * 32 * 4 + 1000
        assert more < 8 << 20
