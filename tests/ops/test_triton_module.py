"""The folded module's Triton kernels against the oracle: compiled on a GPU where there is one, else interpreted.

What the interpreter shows and what not: ``test_triton_interpreter.py``.
"""

import functools
import itertools

import pytest
import torch

import efficient_attention as ea
from efficient_attention.ops import library, reference, streamed, tuning
from efficient_attention.testing import (
    MODULE_RESULTS,
    assert_module_as_precise_as_plain,
    make_module_inputs,
    module_results,
    plain_module,
    relative_error,
)

pytest.importorskip("triton", reason="triton is not installed")

from efficient_attention.ops import triton_module_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NORMALIZATIONS = ["softmax", "scaling"]
# B, C, S (None: attends to itself), dk, dv, h, N, M: heads and channels that fill no tile; channels of X, and of keys,
# in several. Not fewer: a few numbers of a plain run may be right by chance.
SIZES = [
    (2, 20, None, 36, 18, 3, 37, 37),
    (2, 17, 15, 16, 24, 2, 37, 53),
    (1, 150, 20, 20, 16, 1, 19, 21),
    (1, 20, None, 140, 20, 4, 24, 24),
]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 32 positions, so that small inputs take several, of which the last is not full."""
    monkeypatch.setattr(triton_module_launch, "module_chunk_length", lambda *_: 32)


inputs_of = functools.partial(make_module_inputs, device=DEVICE)


def mask_of(batch, keys):
    mask = torch.rand(batch, keys) > 0.4
    mask[:, 0] = True
    return mask.to(DEVICE)


def by_kernels(*args):
    return library.folded(*args, backend="triton")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_as_precise_as_a_plain_run(normalization, dtype, sizes):
    given = inputs_of(*sizes, dtype=dtype)
    assert_module_as_precise_as_plain(
        module_results(by_kernels, given, None, normalization),
        module_results(plain_module, given, None, normalization),
        module_results(plain_module, given, None, normalization, dtype=torch.float64),
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_positions_count_for_nothing(normalization, dtype):
    given, mask = inputs_of(*SIZES[0], dtype=dtype), mask_of(2, 37)
    assert_module_as_precise_as_plain(
        module_results(by_kernels, given, mask, normalization, residual=False),
        module_results(plain_module, given, mask, normalization, residual=False),
        module_results(
            plain_module, given, mask, normalization, residual=False, dtype=torch.float64
        ),
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_masks_hide_whatever_is_there(normalization, rows):
    inputs = inputs_of(*SIZES[1])
    mask = mask_of(rows, 53)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_changes_no_bit_and_is_kept(dtype):
    inputs = inputs_of(*SIZES[1], dtype=dtype)
    x, source, *module = inputs
    expected = module_results(by_kernels, inputs, None, "softmax")

    def strided(y):
        wide = y.new_full((y.shape[0], 2 * y.shape[1] + 1, 2 * y.shape[2] + 1), torch.nan)
        wide[:, 1::2, 1::2] = y
        return wide[:, 1::2, 1::2]

    for lay_out in (lambda y: y.mT.contiguous().mT, strided):
        summary = triton_module_launch.folded(
            lay_out(x), lay_out(source), None, *module[:2], "softmax", module[2], True
        )
        assert torch.equal(summary[0], expected[0])
    tokens = inputs._replace(x=x.mT.contiguous().mT)
    got = module_results(by_kernels, tokens, None, "softmax")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].stride() == got[1].stride() == x.mT.contiguous().mT.stride()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_the_first_pass_leaves_is_what_the_streamed_module_leaves(normalization):
    x, source, *module = inputs_of(*SIZES[1])
    mask = mask_of(2, 53)
    mask[1] = False
    args = (x, source, mask, *module[:2], normalization, module[2], True)
    got = triton_module_launch.folded(*args)
    torch.testing.assert_close(got, streamed.folded(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[1:7:2], ids=str)
def test_gradients_that_nobody_asked_for_are_empty(needs):
    x, source, *module = inputs_of(*SIZES[1])
    args = (x, source, None, *module[:2], "softmax", module[2], True)
    _, *summary = triton_module_launch.folded(*args)
    d_output = torch.randn_like(x)
    every = triton_module_launch.folded_backward(d_output, *args, *summary, (True, True, True))
    got = triton_module_launch.folded_backward(d_output, *args, *summary, needs)
    for i, (some, full) in enumerate(zip(got, every, strict=True)):
        assert torch.equal(some, full) if needs[min(i, 2)] else some.numel() == 0


def test_layers_without_biases_have_no_gradients_of_them():
    x, source, weights, _, heads = inputs_of(*SIZES[0])
    for normalization in NORMALIZATIONS:
        args = (x, source, None, weights, [None] * 4, normalization, heads, False)
        output, *summary = triton_module_launch.folded(*args)
        expected = streamed.folded(*args)
        torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-5)
        slope = torch.randn_like(x)
        got = triton_module_launch.folded_backward(slope, *args, *summary, (True,) * 3)
        expected = streamed.folded_backward(slope, *args, *expected[1:], (True,) * 3)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_written_over_its_input_it_is_the_same():
    for sizes in SIZES[:2]:
        x, source, *module = inputs_of(*sizes)
        args = (source, None, *module[:2], "softmax", module[2], True)
        expected, *_ = triton_module_launch.folded(x, *args)
        triton_module_launch.folded_(x, *args)
        assert torch.equal(x, expected)


def test_timing_tiles_never_repeats_what_is_written_over_its_input(tmp_path, monkeypatch):
    x, source, *module = inputs_of(*SIZES[1])
    args = (source, None, *module[:2], "softmax", module[2], True)
    expected, *_ = triton_module_launch.folded(x, *args)
    monkeypatch.setattr(tuning, "candidates", lambda tile: [tile, tile._replace(stages=1)])
    tuning.autotune(folder=tmp_path)
    try:
        triton_module_launch.folded_(x, *args)
    finally:
        tuning.autotune(False)
    assert torch.equal(x, expected)
    # Those of the first pass were timed.
    assert [p.suffix for p in tmp_path.iterdir()] == [".json", ".json"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repetition_changes_no_bit_and_batch_mates_none_of_a_sum(dtype):
    x, _, *module = inputs_of(*SIZES[0], dtype=dtype)
    options = (None, None, *module[:2], "softmax", module[2], True)
    together, again, alone = (triton_module_launch.folded(y, *options) for y in (x, x, x[:1]))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    # Not the output: a library of products may round those of a context differently in another batch.
    assert all(torch.equal(a[:1], b) for a, b in zip(together[1:], alone[1:], strict=True))


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
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_and_one_position_give_what_the_oracle_gives(sizes, normalization):
    given = inputs_of(*sizes)
    got = module_results(by_kernels, given, None, normalization)
    expected = module_results(reference.module, given, None, normalization)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "strides",
    [(1, 1 << 28, 1), (1, 1, 1 << 28), (1 << 30, 20, 1)],
    ids=["channels", "positions", "samples"],
)
def test_offsets_beyond_two_billion_elements_are_right(strides):
    # Memory that is touched at a few hundred places only, and up to 10 GB apart.
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch = 3 if strides[0] > 1 else 1
    x, _, *module = inputs_of(batch, 16, None, 4, 8, 2, 20, 20, dtype=torch.float16)
    size = sum(n * stride for n, stride in zip(x.shape, strides, strict=True))
    far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    far = far.as_strided(x.shape, strides).copy_(x)
    options = (None, None, *module[:2], "softmax", module[2], True)
    (expected, *_), (_, *summary) = (triton_module_launch.folded(y, *options) for y in (x, x))
    slopes = triton_module_launch.folded_backward(x, x, *options, *summary, (False, False, True))
    triton_module_launch.folded_(far, *options)
    assert torch.equal(far, expected)
    far.copy_(x)
    got = triton_module_launch.folded_backward(far, far, *options, *summary, (False, False, True))
    assert all(torch.equal(a, b) for a, b in zip(got, slopes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((1, 4, None, 300, 4, 1, 5, 5), torch.float32, "up to 256 key channels.*got Dk = 300"),
        ((1, 4, None, 4, 4, 1, 5, 5), torch.float64, "float16, bfloat16 or float32"),
    ],
    ids=["channels", "dtype"],
)
def test_a_named_backend_says_why_it_cannot_serve(sizes, dtype, reason):
    x, _, *module = inputs_of(*sizes, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"backend='triton': .*{reason}.*'auto'"):
        by_kernels(x, None, None, *module[:2], "softmax", module[2], True)


def test_operators_pass_opcheck():
    x, source, weights, biases, heads = inputs_of(*SIZES[1], tokens=True)
    mask = mask_of(2, 53)
    tests = ("test_schema", "test_faketensor")
    options = {"backend": "triton"}
    args = (x, source, mask, weights, biases, "softmax", heads, True)
    torch.library.opcheck(library.folded, args, options, test_utils=tests)
    torch.library.opcheck(library.folded_, args, options, test_utils=tests)
    _, *summary = library.folded(*args, **options)
    for needs in ([True, True, True], [False, True, False]):
        arguments = (torch.randn_like(x), *args, *summary, needs)
        torch.library.opcheck(library.folded_backward, arguments, options, test_utils=tests)


@pytest.mark.parametrize("kind", [ea.EfficientAttention, ea.EfficientAttention2d])
def test_modules_take_the_kernels_where_they_are_named(kind, monkeypatch):
    calls = []
    for name in ("folded", "folded_", "folded_backward"):
        function = getattr(triton_module_launch, name)
        monkeypatch.setattr(
            triton_module_launch,
            name,
            lambda *args, name=name, function=function: calls.append(name) or function(*args),
        )
    module = kind(6, key_channels=4, value_channels=8, init="official", device=DEVICE)
    x = torch.randn((2, 9, 6) if kind is ea.EfficientAttention else (2, 6, 3, 3), device=DEVICE)
    results = []
    for backend in ("auto", "triton"):
        module.backend = backend
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.sin().sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert calls == ["folded", "folded_backward"]
    module.inplace = True
    with torch.no_grad():
        y = x.clone()
        assert module(y) is y
    assert calls[2:] == ["folded_"]
    torch.testing.assert_close(y, results[0][0])
    assert "backend='triton'" in repr(module)


def test_a_module_whose_layers_are_watched_runs_the_operators_kernels():
    sizes = {"key_channels": 4, "value_channels": 8}
    module = ea.EfficientAttention(6, **sizes, init="official", device=DEVICE)
    x, seen = torch.randn(2, 9, 6, device=DEVICE), []
    expected = module(x)
    module.queries.register_forward_hook(lambda *_: seen.append(1))
    module.backend = "triton"
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert seen
    module.double()
    with pytest.raises(NotImplementedError, match=r"backend='triton': it computes in float16"):
        module(x.double())


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_calls_can_be_captured_in_a_graph():
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, _, weights, biases, heads = inputs_of(
        2, 256, None, 128, 256, 8, 3000, 3000, dtype=torch.bfloat16
    )
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    slope = torch.randn_like(x)

    def step():
        output, *_ = by_kernels(x, None, None, weights, biases, "softmax", heads, True)
        return output, *torch.autograd.grad(output, leaves, slope)

    expected = step()  # compiles, which must not happen during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU's time")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "dk", "heads"), [(256, 128, 8), (256, 128, 1), (512, 256, 4)])
def test_large_maps_are_as_precise_as_a_plain_run(dtype, c, dk, heads):
    given = inputs_of(1, c, None, dk, c, heads, 30_001, 30_001, dtype=dtype)
    assert_module_as_precise_as_plain(
        module_results(by_kernels, given, None, "softmax"),
        module_results(plain_module, given, None, "softmax"),
        module_results(plain_module, given, None, "softmax", dtype=torch.float64),
    )
