"""The native kernels against the oracle, for each set of instructions that this machine has; and how they are built."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import efficient_attention as package
from efficient_attention import attend, efficient_attention, summarize
from efficient_attention.memory import peak_bytes
from efficient_attention.ops import blocked, native_build, native_launch
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    attention_results,
    layouts,
    make_inputs,
    plain_attention,
    relative_error,
)

served = pytest.mark.skipif(native_build.why_not() is not None, reason=str(native_build.why_not()))

DTYPES = [torch.float32, torch.bfloat16]
NORMALIZATIONS = ["softmax", "scaling"]
# B, H, N, M, Dk, Dv: one position; ragged ends of vectors, blocks and chunks; whole ones; long sums over channels.
SIZES = [
    (1, 2, 1, 1, 1, 1),
    (2, 3, 37, 53, 8, 5),
    (1, 1, 64, 2048, 16, 48),
    (1, 2, 4300, 2101, 33, 70),
    (2, 1, 129, 128, 128, 16),
    (1, 1, 64, 70, 1024, 64),
]
NAMES = ("output", "d_query", "d_key", "d_value")


def by(backend, **options):
    return functools.partial(efficient_attention, order="linear", backend=backend, **options)


def assert_precise(got, inputs, mask=None, normalization="softmax"):
    plain = functools.partial(plain_attention, key_mask=mask, normalization=normalization)
    low, exact = (attention_results(plain, x) for x in (inputs, [x.double() for x in inputs]))
    for results in zip(got, low, exact, NAMES, strict=True):
        assert_as_precise_as_plain(*results)


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_as_precise_as_a_plain_run(
    dtype, normalization, sizes, masked, kernels, way
):
    query, key, value = make_inputs(*sizes, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(sizes[0], sizes[3]) > 0.3
        mask[:, 0] = True
    got = attention_results(
        by("native", key_mask=mask, normalization=normalization), (query, key, value)
    )
    assert_precise(got, (query, key, value), mask, normalization)


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "channel-major", "strided"])
def test_memory_layout_changes_no_bit_and_is_kept(dtype, layout, kernels, way):
    inputs = make_inputs(2, 3, 150, 90, 40, 24, dtype=dtype)
    expected = attention_results(by("native"), inputs)
    laid_out = [layouts(x)[layout] for x in inputs]
    got = attention_results(by("native"), laid_out)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if layout in ("token-major", "channel-major"):
        assert got[0].stride() == layouts(torch.empty(got[0].shape))[layout].stride()
        assert [g.stride() for g in got[1:]] == [x.stride() for x in laid_out]


@served
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channel-major"])
def test_padding_may_hold_anything(dtype, normalization, layout, kernels, way):
    query, key, value = make_inputs(keys=3000, key_channels=16, value_channels=16, dtype=dtype)
    mask = torch.rand(2, 3, 3000) > 0.5
    expected = attention_results(
        by("native", key_mask=mask, normalization=normalization), (query, key, value)
    )
    padding = ~mask.unsqueeze(-1)
    padded = [layouts(x.masked_fill(padding, torch.nan))[layout] for x in (key, value)]
    got = attention_results(
        by("native", key_mask=mask, normalization=normalization), (query, *padded)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not got[2].masked_select(padding).any()
    assert not got[3].masked_select(padding).any()


@served
@pytest.mark.parametrize("mask_shape", [(53,), (1, 53), (1, 3, 53), (2, 53), (2, 1, 53)])
def test_masks_of_every_shape_match_the_oracle(mask_shape, kernels, way):
    inputs = make_inputs(dtype=torch.float32)
    mask = torch.rand(mask_shape) > 0.4
    got = attention_results(by("native", key_mask=mask), inputs)
    expected = attention_results(by("reference", key_mask=mask), [x.double() for x in inputs])
    for result, truth in zip(got, expected, strict=True):
        assert relative_error(result, truth) < 1e-6


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 3, 4, 4), (2, 1, 0, 5, 4, 3), (1, 2, 5, 0, 4, 3)])
def test_nothing_in_gives_nothing_out(normalization, sizes, kernels, way):
    inputs = make_inputs(*sizes, dtype=torch.float32)
    got = attention_results(by("native", normalization=normalization), inputs)
    expected = attention_results(by("reference", normalization=normalization), inputs)
    torch.testing.assert_close(got, expected)
    context = summarize(*inputs[1:], normalization=normalization, backend="native")
    if sizes[3] == 0:
        assert not context.mean.any()
        assert (context.log_weight == -torch.inf).all()


@served
def test_a_channel_without_weight_is_empty_and_its_gradients_finite(kernels, way):
    query, key, value = make_inputs(keys=2100, dtype=torch.float32)
    key[:, :, :, 3] = -torch.inf
    context = summarize(key, value, backend="native")
    assert (context.log_weight[..., 3] == -torch.inf).all()
    assert not context.mean[..., 3, :].any()
    for x in attention_results(by("native"), (query, key, value)):
        assert x.isfinite().all()


@served
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_not_numbers_show(dtype, kernels, way):
    query, key, value = make_inputs(dtype=dtype)
    key[0, 0, 7] = torch.nan
    output = efficient_attention(query, key, value, backend="native")
    assert output[0, 0].isnan().all()
    assert output[1].isfinite().all()


@served
def test_the_largest_key_may_come_in_any_block(kernels):
    _, key, value = make_inputs(keys=5000, dtype=torch.float32)
    key = key + torch.linspace(0, 1000, 5000).unsqueeze(-1)
    for keys in (key, key.flip(2)):
        got, expected = (summarize(keys, value, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(got, expected)


@served
@pytest.mark.parametrize("offset", [100, 10_000])
def test_gradients_stay_precise_where_keys_are_large(offset, kernels, way):
    query, key, value = make_inputs(keys=500, dtype=torch.float32)
    inputs = (query, key + offset, value)
    assert_precise(attention_results(by("native"), inputs), inputs)


@served
def test_context_of_a_million_keys_is_precise(kernels):
    _, key, value = make_inputs(1, 1, 1, 1 << 20, 4, 4, dtype=torch.float32)
    got = summarize(key, value, backend="native").mean
    truth = summarize(key.double(), value.double(), backend="reference").mean
    assert relative_error(got, truth) < 1e-6


@served
def test_attending_in_groups_matches_the_oracle(kernels):
    query, key, value = make_inputs(key_channels=12, dtype=torch.float32)
    context = summarize(key, value)
    for x in (query, query.mT.contiguous().mT):
        results = []
        for backend in ("native", "reference"):
            leaf = x.detach().requires_grad_()
            output = attend(leaf, context, num_groups=3, backend=backend)
            results.append((output, *torch.autograd.grad(output.sin().sum(), leaf)))
        torch.testing.assert_close(*results, rtol=0, atol=2e-6)


@served
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_through_log_weight_match_the_oracle(normalization, kernels):
    _, key, value = make_inputs(dtype=torch.float32, requires_grad=True)
    mask = torch.rand(2, 53) > 0.3
    results = []
    for backend in ("native", "reference"):
        context = summarize(key, value, key_mask=mask, normalization=normalization, backend=backend)
        objective = context.mean.sin().sum() + context.log_weight.sin().sum()
        results.append(torch.autograd.grad(objective, (key, value)))
    torch.testing.assert_close(*results, rtol=0, atol=2e-6)


@served
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_batch_mates_change_no_bit(dtype, kernels):
    inputs = make_inputs(3, 2, 4500, 4500, 16, 16, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention_results(by("native"), inputs))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    alone = attention_results(by("native"), [x[1:2] for x in inputs])[0]
    torch.testing.assert_close(alone, results[0][0][1:2], rtol=0, atol=0)


@served
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_gradients_that_are_asked_for_are_there(needs, kernels):
    query, key, value = make_inputs(dtype=torch.float32)
    mean, _, shift, total = native_launch.summarize(key, value, None, "softmax")
    slope = torch.randn(2, 3, 37, 5)
    of_attend = functools.partial(native_launch.attend_backward, slope, query, mean, "softmax", 1)
    weights = (key, value, None, mean, shift, total, "softmax")
    of_summarize = functools.partial(native_launch.summarize_backward, mean, None, *weights)
    for backward in (of_attend, of_summarize):
        for got, whole, need in zip(backward(needs), backward((True, True)), needs, strict=True):
            torch.testing.assert_close(got, whole if need else whole.new_empty(0), rtol=0, atol=0)


@served
def test_offsets_beyond_32_bits_are_followed(kernels):
    torch.utils.deterministic.fill_uninitialized_memory = False
    # 4 GB of which nearly all is never touched.
    wide = torch.empty(2, 1 << 30, dtype=torch.bfloat16)
    key, value = make_inputs(1, 2, 1, 70, 16, 16, dtype=torch.bfloat16)[1:]
    far = [x.copy_(y) for x, y in zip((_far(wide, 0), _far(wide, 64)), (key, value), strict=True)]
    got, expected = (summarize(*x, backend="native") for x in (far, (key, value)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _far(wide, offset):
    """``[1, 2, 70, 16]`` whose last position of the last head is behind element 2 ** 31 - 2 ** 20."""
    return wide.as_strided((1, 2, 70, 16), (0, 1 << 30, 15_000_000, 1), offset)


@served
def test_takes_no_memory_that_torch_sees_but_for_what_it_returns(kernels):
    query, key, value = (torch.randn(1, 4, 8192, 64) for _ in range(3))
    peak = peak_bytes(lambda: efficient_attention(query, key, value, backend="native"))
    assert peak <= query.nbytes + 1_000_000


@served
def test_compiles_as_one_graph_and_gives_the_same(kernels, two_passes):
    inputs = make_inputs(dtype=torch.float32)
    compiled = torch.compile(by("native"), fullgraph=True, backend="aot_eager")
    got, expected = (attention_results(f, inputs) for f in (compiled, by("native")))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@served
def test_auto_takes_them_where_somebody_has_built_them(kernels, monkeypatch):
    inputs = make_inputs(1, 4, 20_000, 20_000, 32, 32, dtype=torch.float32)
    auto, plain = by("auto"), torch.no_grad()(by("auto"))
    before = auto(*inputs), *attention_results(auto, inputs), plain(*inputs)
    with torch.no_grad():
        mean, *_ = blocked.summarize(*inputs[1:], None, "softmax")
        expected = blocked.attend(inputs[0], mean, "softmax", 1)
    torch.testing.assert_close(before[0], expected, rtol=0, atol=0)
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    native = attention_results(by("native"), inputs)
    after = auto(*inputs), *attention_results(auto, inputs), plain(*inputs)
    torch.testing.assert_close(after, (native[0], *native, native[0]), rtol=0, atol=0)
    assert not torch.equal(after[0], before[0])


@served
def test_auto_leaves_what_is_set_aside(kernels, monkeypatch):
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    monkeypatch.setattr(native_build, "_set_aside", set())
    x = torch.randn(1, 1, 4, 4)
    assert native_launch.is_preferred(x)
    native_build.set_aside()
    assert not native_launch.is_preferred(x)
    assert native_launch.why_not(x) is None


@served
def test_results_are_written_to_memory_that_is_there(kernels):
    query, key, value = make_inputs(1, 4, 3000, 3000, 32, 32, dtype=torch.float32)
    expected = by("native")(query, key, value)
    for out in (torch.empty_like(query), torch.empty_like(query.mT).mT, query):
        returned = efficient_attention(query, key, value, backend="native", out=out)
        assert returned is out
        torch.testing.assert_close(out, expected)


@served
def test_auto_leaves_what_they_do_not_serve(kernels, monkeypatch):
    monkeypatch.setattr(native_build, "is_built", lambda: True)
    inputs = make_inputs(1, 4, 20_000, 20_000, 32, 32)
    got, expected = (by(b)(*inputs) for b in ("auto", "blocked"))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@served
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_that_they_do_not_take_is_refused_by_name(dtype):
    message = rf"backend='native': it takes float32 and bfloat16; got {dtype}; use backend='auto'"
    with pytest.raises(NotImplementedError, match=message):
        efficient_attention(*make_inputs(dtype=dtype), backend="native")


def test_another_device_is_refused_by_name():
    x = torch.empty(1, 1, 2, 2, device="meta")
    assert native_launch.why_not(x) == "it runs on CPUs; got meta"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "load", functools.cache(native_build.load.__wrapped__))
    return tmp_path / "cache"


@served
def test_without_a_compiler_the_reason_is_the_error_and_auto_works(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(empty_cache))
    reason = "there is no C compiler: none of cc, gcc, clang is on the PATH"
    with pytest.raises(NotImplementedError, match=reason):
        package.build_native()
    inputs = make_inputs(1, 4, 20_000, 20_000, 32, 32, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=f"backend='native': {reason}; use"):
        efficient_attention(*inputs, backend="native")
    assert efficient_attention(*inputs).isfinite().all()
    assert not empty_cache.exists()


@pytest.mark.parametrize(
    ("function", "answer", "reason"),
    [
        ("platform.machine", "aarch64", "they are for Linux on x86-64; this is .* on aarch64"),
        ("efficient_attention.ops.native_build._processor", "flags : fma", "tells of no avx2"),
        ("efficient_attention.ops.native_build._cache", None, "there is nowhere to keep them"),
    ],
)
def test_a_machine_that_cannot_have_them_says_why(function, answer, reason, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(native_build, "_processor", lambda: "flags : avx2 fma")
    monkeypatch.setattr(native_build, "_compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(function, lambda: answer)
    with pytest.raises(NotImplementedError, match=f"cannot be built: .*{reason}"):
        package.build_native()


@served
@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_nothing_is_compiled_for_what_they_do_not_serve(wrong, empty_cache, monkeypatch):
    monkeypatch.setattr(native_build, "_compile", lambda path: pytest.fail("it was compiled"))
    query, key, value = make_inputs(dtype=torch.float64 if wrong == "dtype" else torch.float32)
    with pytest.raises((NotImplementedError, ValueError), match=r"float64|key must have shape"):
        by("native")(query, key if wrong == "dtype" else key[:, :1], value)


@served
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(native_build, "FLAGS", ("-include", "nowhere.h", "-shared"))
    with pytest.raises(RuntimeError, match=r"do not compile: .*\n(.*\n)*.*nowhere\.h"):
        package.build_native()
    assert list((empty_cache / "efficient-attention").iterdir()) == []


@served
def test_processes_may_build_at_the_same_time_and_auto_builds_nothing(empty_cache):
    code = (
        "import torch, efficient_attention as ea\n"
        "from efficient_attention.ops import native_build\n"
        "native_build.FLAGS = ('-O1', *native_build.FLAGS[1:])\n"
        "x = torch.randn(1, 4, 20000, 32)\n"
        "blocked = ea.efficient_attention(x, x, x)\n"
        "assert not native_build.is_built()\n"
        "path = ea.build_native()\n"
        "written = path.stat().st_mtime_ns\n"
        "assert native_build.is_built() and ea.build_native() == path\n"
        "native = ea.efficient_attention(x, x, x)\n"
        "assert not torch.equal(native, blocked) and torch.allclose(native, blocked, atol=1e-5)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (built,) = (empty_cache / "efficient-attention").iterdir()
    assert built.suffix == ".so"


@served
def test_what_cannot_be_loaded_or_trusted_is_not_there_and_is_built_anew(empty_cache):
    path = native_build._path()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"half a library")
    assert native_build._existing() is None
    assert package.build_native() == path
    assert native_build._existing() is not None
    for anybodys in (path, path.parent):
        anybodys.chmod(0o777)
        native_build._opened.cache_clear()
        assert native_build._existing() is None
        anybodys.chmod(0o700)


@served
@pytest.mark.parametrize("state", ["dtype", "device"])
def test_defaults_of_pytorch_change_nothing(kernels, state):
    inputs = make_inputs(1, 2, 300, 300, 16, 16, dtype=torch.float32)
    expected = by("native")(*inputs)
    if state == "dtype":
        torch.set_default_dtype(torch.float16)
        got = by("native")(*inputs)
    else:
        with torch.device("meta"):
            got = by("native")(*inputs)
    assert torch.equal(got, expected)


@served
def test_gradients_of_a_context_are_laid_out_as_it_is(kernels):
    query, key, value = make_inputs(1, 2, 70, 70, 16, 16, dtype=torch.float32)
    memory = summarize(key, value)
    for mean in (memory.mean, memory.mean.mT.contiguous().mT):
        leaf = mean.detach().requires_grad_()
        attend(query, memory._replace(mean=leaf), backend="native").square().sum().backward()
        expected = torch.autograd.functional.vjp(
            lambda m: attend(query, memory._replace(mean=m), backend="reference").square().sum(),
            mean,
        )[1]
        torch.testing.assert_close(leaf.grad, expected)
