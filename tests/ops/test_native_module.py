"""The folded module's native kernels against the oracle, for each set of instructions that this machine has."""

import itertools

import pytest
import torch

import efficient_attention as ea
from efficient_attention.memory import peak_bytes
from efficient_attention.ops import (
    chunks,
    library,
    native_build,
    native_module_launch,
    reference,
    streamed,
)
from efficient_attention.testing import (
    MODULE_RESULTS,
    assert_module_as_precise_as_plain,
    make_module_inputs,
    module_results,
    plain_module,
    relative_error,
)

served = pytest.mark.skipif(native_build.why_not() is not None, reason=str(native_build.why_not()))

DTYPES = [torch.float32, torch.bfloat16]
NORMALIZATIONS = ["softmax", "scaling"]
# B, C, S (None: attends to itself), dk, dv, h, N, M: ragged ends of vectors, blocks and chunks; whole ones.
SIZES = [
    (2, 20, None, 36, 18, 3, 37, 37),
    (2, 33, 15, 32, 24, 2, 37, 153),
    (1, 150, 20, 20, 16, 1, 259, 600),
    (1, 32, None, 16, 20, 4, 512, 512),
]


def by_kernels(*args):
    return library.folded(*args, backend="native")


def mask_of(batch, keys):
    mask = torch.rand(batch, keys) > 0.4
    mask[:, 0] = True
    return mask


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("masked", "tokens"), [(False, False), (False, True), (True, False)])
def test_values_and_gradients_are_as_precise_as_a_plain_run(
    dtype, normalization, sizes, masked, tokens, kernels
):
    given = make_module_inputs(*sizes, dtype=dtype, tokens=tokens)
    mask = mask_of(sizes[0], sizes[-1]) if masked else None
    options = {"residual": not masked}
    assert_module_as_precise_as_plain(
        module_results(by_kernels, given, mask, normalization, **options),
        module_results(plain_module, given, mask, normalization, **options),
        module_results(plain_module, given, mask, normalization, dtype=torch.float64, **options),
    )


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [False, True])
def test_masks_hide_whatever_is_there(normalization, rows, tokens, kernels):
    inputs = make_module_inputs(*SIZES[1], tokens=tokens)
    mask = mask_of(rows, 153)
    if rows == 2:
        mask[0] = False  # nothing in the first sample
    hidden = ~mask.unsqueeze(1).expand_as(inputs.source)
    given = inputs._replace(source=inputs.source.masked_fill(hidden, torch.nan))
    got = module_results(by_kernels, given, mask, normalization)
    expected = module_results(reference.module, inputs, mask, normalization, dtype=torch.float64)
    for name, a, b in zip(MODULE_RESULTS, got, expected, strict=True):
        if normalization == "softmax" and name == "biases 1":
            assert not a.any()
            continue
        assert relative_error(a, b) < 2e-6, name
    assert not got[2].masked_select(hidden).any()


def strided(x):
    """The same ``[B, C, N]`` in a larger tensor of NaN, from an odd address on, every other channel and position."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1, 2 * x.shape[2] + 1), torch.nan)
    wide[:, 1::2, 1::2] = x
    return wide[:, 1::2, 1::2]


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[3]], ids=str)
def test_memory_layout_changes_no_bit_and_is_kept(dtype, sizes, kernels):
    inputs = make_module_inputs(*sizes, dtype=dtype)
    expected = module_results(by_kernels, inputs, None, "softmax")
    for lay_out in (lambda x: x.mT.contiguous().mT, strided):
        source = None if inputs.source is None else lay_out(inputs.source)
        got = module_results(
            by_kernels, inputs._replace(x=lay_out(inputs.x), source=source), None, "softmax"
        )
        for a, b in zip(got, expected, strict=True):
            assert (a is b) or torch.equal(a, b)
    tokens = inputs.x.mT.contiguous().mT
    (output, d_x, *_) = module_results(by_kernels, inputs._replace(x=tokens), None, "softmax")
    assert output.stride() == d_x.stride() == tokens.stride()


@served
@pytest.mark.parametrize("seed", range(20))
def test_any_shape_strides_and_offset_give_the_plain_result(seed, kernels):
    generator = torch.Generator().manual_seed(seed)

    def size(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads, own = size(1, 3), size(0, 1)
    queries = size(0, 700)
    sizes = (size(0, 3), size(1, 70), None if own else size(1, 70), heads * size(1, 12))
    sizes = (*sizes, heads * size(1, 3), heads, queries, queries if own else size(0, 700))
    inputs = make_module_inputs(*sizes, tokens=bool(size(0, 1)))
    source = None if own else strided(inputs.source)
    given = inputs._replace(x=strided(inputs.x), source=source)
    keys = queries if own else sizes[-1]
    mask = torch.rand(sizes[0], keys, generator=generator) > 0.4 if size(0, 1) else None
    for normalization in NORMALIZATIONS:
        got = module_results(by_kernels, given, mask, normalization)
        expected = module_results(
            reference.module, inputs, mask, normalization, dtype=torch.float64
        )
        for name, a, b in zip(MODULE_RESULTS, got, expected, strict=True):
            if b is not None:
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4, msg=name)


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_the_first_pass_leaves_is_what_the_streamed_module_leaves(normalization, kernels):
    x, source, *module = make_module_inputs(*SIZES[1])
    mask = mask_of(2, 153)
    mask[1] = False
    args = (x, source, mask, *module[:2], normalization, module[2], True)
    got = native_module_launch.folded(*args)
    torch.testing.assert_close(got, streamed.folded(*args), rtol=1e-5, atol=1e-5)


@served
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_gradients_that_nobody_asked_for_are_empty(needs, sizes, kernels):
    x, source, *module = make_module_inputs(*sizes)
    args = (x, source, None, *module[:2], "softmax", module[2], True)
    _, *summary = native_module_launch.folded(*args)
    d_output = torch.randn_like(x)
    every = native_module_launch.folded_backward(d_output, *args, *summary, (True, True, True))
    got = native_module_launch.folded_backward(d_output, *args, *summary, needs)
    for i, (some, full) in enumerate(zip(got, every, strict=True)):
        assert torch.equal(some, full) if needs[min(i, 2)] else some.numel() == 0


@served
def test_layers_without_biases_have_no_gradients_of_them(kernels):
    x, source, weights, _, heads = make_module_inputs(*SIZES[0])
    for normalization in NORMALIZATIONS:
        args = (x, source, None, weights, [None] * 4, normalization, heads, False)
        output, *summary = native_module_launch.folded(*args)
        expected = streamed.folded(*args)
        torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-5)
        slope = torch.randn_like(x)
        got = native_module_launch.folded_backward(slope, *args, *summary, (True,) * 3)
        expected = streamed.folded_backward(slope, *args, *expected[1:], (True,) * 3)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_over_its_input_it_is_the_same(dtype, kernels):
    for sizes, normalization, tokens in itertools.product(SIZES, NORMALIZATIONS, (False, True)):
        x, source, *module = make_module_inputs(*sizes, dtype=dtype, tokens=tokens)
        args = (source, None, *module[:2], normalization, module[2], True)
        expected, *_ = native_module_launch.folded(x, *args)
        native_module_launch.folded_(x, *args)
        assert torch.equal(x, expected)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batch_mates_change_no_bit(dtype, kernels):
    inputs = make_module_inputs(3, 32, None, 16, 16, 2, 3000, 3000, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(module_results(by_kernels, inputs, None, "softmax"))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    x, _, weights, biases, heads = inputs
    alone, together = (
        native_module_launch.folded(y, None, None, weights, biases, "softmax", heads, True)
        for y in (x[1:2], x)
    )
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[1:2])


@served
def test_sums_of_chunks_are_there_for_some_samples_at_a_time(kernels, monkeypatch):
    inputs = make_module_inputs(5, 32, None, 16, 16, 2, 1000, 1000, dtype=torch.float32)
    expected = module_results(by_kernels, inputs, None, "softmax")
    length = chunks.module_chunk_length(1000, 16, 4)
    one = chunks.sums_of_chunks(1, 1000, length, 16, 32, 1, threads=1).numbers
    monkeypatch.setattr(chunks, "_CHUNKS_OF_A_THREAD", 0)
    for maps in (1, 2, 4):
        monkeypatch.setattr(chunks, "_NUMBERS_AT_A_TIME", maps * one)
        native_module_launch._plan.cache_clear()
        sums = chunks.sums_of_chunks(5, 1000, length, 16, 32, 1, threads=1)
        assert sums.together == maps
        got = module_results(by_kernels, inputs, None, "softmax")
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    monkeypatch.undo()
    sizes = [chunks.sums_of_chunks(n, 1024, 256, 128, 256, 1, threads=2) for n in (1, 16, 1000)]
    numbers = [size.numbers for size in sizes]
    assert numbers[0] < numbers[1] == numbers[2] <= 2 << 20
    # Sixteen threads have four chunks each, of which a map has four.
    assert chunks.sums_of_chunks(1000, 1024, 256, 512, 1024, 1, threads=16).together == 16


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4, None, 4, 4, 2, 5, 5),
        (1, 4, None, 4, 4, 2, 0, 0),
        (1, 4, 3, 4, 4, 2, 5, 0),
        (1, 4, None, 4, 4, 2, 1, 1),
        (1, 1, None, 1, 1, 1, 2, 2),
    ],
    ids=str,
)
def test_nothing_and_one_position_give_what_the_oracle_gives(sizes, normalization, kernels):
    given = make_module_inputs(*sizes)
    got = module_results(by_kernels, given, None, normalization)
    expected = module_results(reference.module, given, None, normalization)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@served
def test_features_that_are_not_numbers_show(kernels):
    inputs = make_module_inputs(2, 8, None, 4, 4, 1, 90, 90)
    inputs.x[0, 3, 70] = torch.nan
    output, *_ = by_kernels(inputs.x, None, None, inputs.weights, inputs.biases, "softmax", 1, True)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


@served
def test_keys_may_be_as_large_as_they_are(kernels):
    # The largest comes last, and is a hundred times as far away as exp could follow.
    inputs = make_module_inputs(1, 8, None, 4, 4, 2, 5000, 5000)
    x = inputs.x * torch.linspace(1, 3000, 5000)
    for y in (x, x.flip(2)):
        given = inputs._replace(x=y)
        got = module_results(by_kernels, given, None, "softmax")
        expected = module_results(reference.module, given, None, "softmax", dtype=torch.float64)
        assert relative_error(got[0], expected[0]) < 1e-5
        assert all(g is None or g.isfinite().all() for g in got)


@served
@pytest.mark.parametrize(
    "strides",
    [(1, 1 << 28, 1), (1, 1, 1 << 28), (1 << 30, 20, 1)],
    ids=["channels", "positions", "samples"],
)
def test_offsets_beyond_two_billion_elements_are_right(strides, kernels):
    # Memory that is touched at a few hundred places only, and up to 10 GB apart.
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch = 3 if strides[0] > 1 else 1
    x, _, *module = make_module_inputs(batch, 16, None, 4, 8, 2, 20, 20, dtype=torch.bfloat16)
    size = sum(n * stride for n, stride in zip(x.shape, strides, strict=True))
    far = torch.empty(size, dtype=torch.bfloat16).as_strided(x.shape, strides).copy_(x)
    options = (None, None, *module[:2], "softmax", module[2], True)
    expected, *summary = native_module_launch.folded(x, *options)
    needs = (False, False, True)
    slopes = native_module_launch.folded_backward(x, x, *options, *summary, needs)
    got = native_module_launch.folded_backward(far, far, *options, *summary, needs)
    assert all(torch.equal(a, b) for a, b in zip(got, slopes, strict=True))
    native_module_launch.folded_(far, *options)
    assert torch.equal(far, expected)


@served
def test_operators_pass_opcheck(kernels):
    inputs = make_module_inputs(*SIZES[1], tokens=True)
    tests = ("test_schema", "test_faketensor")
    options = {"backend": "native"}
    x, source, weights, biases, heads = inputs
    args = (x, source, mask_of(2, 153), weights, biases, "softmax", heads, True)
    torch.library.opcheck(library.folded, args, options, test_utils=tests)
    torch.library.opcheck(library.folded_, args, options, test_utils=tests)
    _, *summary = library.folded(*args, **options)
    for needs in ([True, True, True], [False, True, False]):
        arguments = (torch.randn_like(x), *args, *summary, needs)
        torch.library.opcheck(library.folded_backward, arguments, options, test_utils=tests)


@served
@pytest.mark.parametrize("kind", [ea.EfficientAttention, ea.EfficientAttention2d])
def test_modules_take_them_where_they_are_named_or_built(kind, kernels, monkeypatch):
    calls = []
    for name in ("folded", "folded_", "folded_backward"):
        function = getattr(native_module_launch, name)
        monkeypatch.setattr(
            native_module_launch,
            name,
            lambda *args, name=name, function=function: calls.append(name) or function(*args),
        )
    module = kind(6, key_channels=4, value_channels=8, init="official")
    x = torch.randn((1, 700, 6) if kind is ea.EfficientAttention else (1, 6, 20, 35))
    expected = module(x)
    assert not calls
    module.backend = "native"
    named = module(x)
    named.sum().backward()
    with torch.no_grad():
        module.inplace = True
        module(x.clone())
    assert calls == ["folded", "folded_backward", "folded_"]
    torch.testing.assert_close(named, expected)
    module.backend, module.inplace = "auto", False
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    assert torch.equal(module(x), named)
    assert calls[3:] == ["folded"]


@served
def test_compiles_as_one_graph_and_gives_the_same(kernels):
    module = ea.EfficientAttention2d(6, 4, 8, init="official")
    module.backend = "native"
    x = torch.randn(1, 6, 20, 35)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        output = function(x)
        output.sin().sum().backward()
        results.append((output, [p.grad for p in module.parameters()]))
        module.zero_grad()
    torch.testing.assert_close(*results, rtol=0, atol=0)


@served
def test_evaluation_holds_its_output_and_training_one_gradient_more(kernels):
    module = ea.EfficientAttention2d(64, 32, 64, num_heads=8, init="official")
    module.backend = "native"
    x = torch.randn(1, 64, 160, 160)
    slope = torch.randn_like(x)

    def train():
        leaf = x.detach().requires_grad_()
        module(leaf).backward(slope)

    evaluate = torch.no_grad()(lambda: module(x))
    assert peak_bytes(evaluate) <= 1.1 * x.nbytes
    assert peak_bytes(train) <= 2.2 * x.nbytes


@served
def test_other_dtypes_are_refused_by_name(kernels):
    inputs = make_module_inputs(*SIZES[0], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"backend='native': it takes float32 and bfloat"):
        module_results(by_kernels, inputs, None, "softmax")
