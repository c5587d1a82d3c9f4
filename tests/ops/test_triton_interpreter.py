"""The Triton kernels against the oracle: compiled on a GPU where there is one, else in Triton's interpreter.

The interpreter takes milliseconds for every operation of every program, so that everything here is small. It rounds
what the kernels round, and shows nothing of races, of memory that is shared, or of what a compiler makes of them.
"""

import pytest
import torch

from efficient_attention import attend, efficient_attention, summarize
from efficient_attention.ops import backends, library
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    make_inputs,
    plain_attention,
    relative_error,
)

pytest.importorskip("triton", reason="triton is not installed")

from efficient_attention.ops import triton_blocks, triton_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NORMALIZATIONS = ["softmax", "scaling"]
# B, H, N, M, Dk, Dv: one position; channels that fill no block; values of several tiles; keys of several.
SIZES = [(1, 2, 1, 1, 1, 1), (2, 1, 37, 53, 8, 5), (1, 1, 19, 21, 33, 140), (1, 1, 24, 20, 200, 16)]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 32 positions, so that small inputs take several, of which the last is not full."""
    monkeypatch.setattr(triton_launch, "chunk_length", lambda *_: 32)


def inputs_of(*sizes, dtype=torch.float32):
    return [x.to(DEVICE).requires_grad_() for x in make_inputs(*sizes, dtype=dtype)]


def mask_of(batch, keys):
    mask = torch.rand(batch, keys) > 0.3
    mask[:, 0] = True
    return mask.to(DEVICE)


def layouts(x):
    """The same ``[B, H, N, D]`` tensor: contiguous, token-major, channel-major, strided."""
    x = x.detach()
    wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[..., 1::2] = x
    return {
        "contiguous": x.contiguous(),
        "token-major": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channel-major": x.mT.contiguous().mT,
        "strided": wide[..., 1::2],
    }


def with_gradients(function, inputs):
    """The output of a function, and the gradients of the inputs for a slope that is the same for every dtype."""
    output = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output, *torch.autograd.grad(output, inputs, slope.to(output))


def by(backend, **options):
    return lambda q, k, v: efficient_attention(q, k, v, order="linear", backend=backend, **options)


def assert_precise(got, plain, exact, *, channels=1):
    for name, *results in zip(("output", "query", "key", "value"), got, plain, exact, strict=True):
        # A program adds products over key channels one after another, where a library of products adds parts. Each
        # rounding of such a sum is off by 0.2 eps of it (root of the mean square), and the sum so far grows like the
        # root of its length D: together 0.14 eps sqrt(D), and twice that is allowed.
        in_order = 0.28 * torch.finfo(torch.float32).eps * channels**0.5
        if got[0].dtype != torch.float32 or relative_error(results[0], results[2]) > in_order:
            assert_as_precise_as_plain(*results, name)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "masked"), [*((sizes, False) for sizes in SIZES), (SIZES[1], True)], ids=str
)
def test_values_and_gradients_are_as_precise_as_a_plain_run(
    normalization, dtype, sizes, masked, short_chunks
):
    inputs = inputs_of(*sizes, dtype=dtype)
    options = {"normalization": normalization}
    options["key_mask"] = mask_of(sizes[0], sizes[3]) if masked else None
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_precise(
        with_gradients(by("triton", **options), inputs),
        with_gradients(lambda *x: plain_attention(*x, **options), inputs),
        with_gradients(lambda *x: plain_attention(*x, **options), exact),
        channels=sizes[4],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["token-major", "channel-major", "strided"])
def test_memory_layout_changes_no_bit_and_is_kept(dtype, layout, short_chunks):
    inputs = inputs_of(1, 2, 37, 40, 12, 7, dtype=dtype)
    expected = with_gradients(by("triton"), inputs)
    laid_out = [layouts(x)[layout].requires_grad_() for x in inputs]
    got = with_gradients(by("triton"), laid_out)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if layout != "strided":
        like = [layouts(expected[0])[layout], *laid_out]
        assert [x.stride() for x in got] == [x.stride() for x in like]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(37,), (2, 37), (2, 1, 37), (1, 2, 37), (2, 2, 37)], ids=str)
def test_masks_follow_batch_and_heads_and_hide_whatever_is_there(
    normalization, shape, short_chunks
):
    inputs = inputs_of(2, 2, 3, 37, 4, 4)
    mask = (torch.rand(shape) > 0.4).to(DEVICE)
    options = {"key_mask": mask, "normalization": normalization}
    hidden = ~library_mask(mask, (2, 2, 37)).unsqueeze(-1)
    padded = [inputs[0], *(x.detach().masked_fill(hidden, torch.nan) for x in inputs[1:])]
    padded = [x.requires_grad_() for x in padded]
    got = with_gradients(by("triton", **options), padded)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(by("reference", **options), exact)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6
    assert all(not x.masked_select(hidden).any() for x in got[2:])


def library_mask(mask, shape):
    mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
    return mask.expand(shape)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_through_log_weight_match_the_oracle(normalization, short_chunks):
    _, key, value = inputs_of(1, 2, 1, 53, 8, 5)
    mask = mask_of(1, 53)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (key, value)]
        context = summarize(*leaves, key_mask=mask, normalization=normalization, backend=backend)
        objective = context.mean.sin().sum() + context.log_weight.sin().sum()
        results.append((*context, *torch.autograd.grad(objective, leaves)))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (12, 4), (9, 9), (128, 8)])
def test_attending_in_groups_matches_the_oracle(channels, groups, short_chunks):
    query, key, value = inputs_of(1, 1, 37, 20, channels, 6)
    context = summarize(key, value, backend="reference")
    wide = context._replace(mean=context.mean.double())
    results = []
    for backend, x, memory in (("triton", query, context), ("reference", query.double(), wide)):
        output = attend(x, memory, num_groups=groups, backend=backend)
        grads = torch.autograd.grad(output.sin().sum(), (query, value), retain_graph=True)
        results.append((output, *grads))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 100, 10_000])
def test_large_keys_lose_no_precision(dtype, offset, short_chunks):
    query, key, value = inputs_of(1, 1, 8, 150, 4, 4, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in (query, key + offset, value)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_precise(
        with_gradients(by("triton"), inputs),
        with_gradients(plain_attention, inputs),
        with_gradients(plain_attention, exact),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_light_keys_outweigh_a_heavy_one(dtype):
    # Weights of exp(-14), which float16 hardly knows, on 2,000 keys: together a fifth of a percent of the mean.
    key = torch.zeros(1, 1, 2001, 1, dtype=dtype, device=DEVICE)
    key[:, :, 0] = 14
    value = torch.ones_like(key)
    value[:, :, 0] = 0
    got = summarize(key, value, backend="triton").mean
    truth = summarize(key.double(), value.double(), backend="reference").mean
    assert relative_error(got, truth) < {torch.float32: 1e-6, torch.float16: 2**-11}.get(
        dtype, 2**-8
    )


def test_the_largest_key_may_come_in_any_chunk_and_block(short_chunks):
    # The last chunk has two blocks, the second of which has the largest key. exp(1000) is beyond float64.
    _, key, value = inputs_of(1, 1, 1, 120, 4, 4)
    key = key.detach() + torch.linspace(0, 1000, 120, device=DEVICE).unsqueeze(-1)
    for keys in (key, key.flip(2)):
        got, expected = (summarize(keys, value, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(tuple(got), tuple(expected))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "sizes", [(2, 1, 3, 0, 4, 4), (2, 1, 0, 3, 4, 4), (0, 1, 3, 3, 4, 4), (1, 0, 3, 3, 4, 4)]
)
def test_empty_inputs_give_empty_outputs_or_zeros(normalization, sizes):
    inputs = inputs_of(*sizes)
    output, *grads = with_gradients(by("triton", normalization=normalization), inputs)
    assert output.shape == (*sizes[:3], sizes[5])
    assert all(not x.any() for x in (output, *grads))  # zero, and not NaN
    context = summarize(*inputs[1:], normalization=normalization, backend="triton")
    if not sizes[3]:
        assert not context.mean.any()
        assert (context.log_weight == -torch.inf).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_channels_without_weight_are_empty(normalization, short_chunks):
    query, key, value = inputs_of(2, 1, 3, 70, 4, 4)
    mask = torch.ones(2, 70, dtype=torch.bool, device=DEVICE)
    mask[0] = False  # nothing in the first sample
    if normalization == "softmax":
        key = key.detach().clone()
        key[1, :, :, 2] = -torch.inf  # a channel of the second
        key[1, :, :40, 3] = -torch.inf  # a chunk of another
    inputs = [query, key.detach().requires_grad_(), value]
    options = {"key_mask": mask, "normalization": normalization}
    expected = with_gradients(by("reference", **options), inputs)
    got = with_gradients(by("triton", **options), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not got[0][0].any()
    contexts = [summarize(*inputs[1:], **options, backend=b) for b in ("triton", "reference")]
    torch.testing.assert_close(*map(tuple, contexts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_channels", [5, 140])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_gradients_that_were_asked_for_are_computed(value_channels, needs, short_chunks):
    query, key, value = (x.detach() for x in inputs_of(1, 1, 37, 40, 8, value_channels))
    mean, _, shift, total = triton_launch.summarize(key, value, None, "softmax")
    slope, d_mean = torch.randn_like(value[:, :, :37]), torch.randn_like(mean)
    calls = (
        lambda n: triton_launch.attend_backward(slope, query, mean, "softmax", 1, n),
        lambda n: triton_launch.summarize_backward(
            d_mean, None, key, value, None, mean, shift, total, "softmax", n
        ),
    )
    for call in calls:
        both, some = call((True, True)), call(needs)
        for needed, a, b in zip(needs, some, both, strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_mates_and_repetition_change_no_bit(dtype):
    inputs = inputs_of(2, 2, 20, 300, 4, 4, dtype=dtype)

    def step(leaves):
        output = by("triton")(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    together, again = step(inputs), step(inputs)
    alone = step([x[:1].detach().requires_grad_() for x in inputs])
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:1], c)


@pytest.mark.parametrize("strides", [(1 << 27, 1), (1, 1 << 28)], ids=["positions", "channels"])
def test_offsets_beyond_two_billion_elements_are_right(strides):
    # Memory that is touched at 20 x 16 places only, and 5 or 9 GB apart.
    torch.utils.deterministic.fill_uninitialized_memory = False
    key, value = (x.detach() for x in inputs_of(1, 1, 1, 20, 16, 16, dtype=torch.float16)[1:])
    far = torch.empty(20 * strides[0] + 16 * strides[1], dtype=torch.float16, device=DEVICE)
    far = far.as_strided((1, 1, 20, 16), (1, 1, *strides))
    torch.utils.deterministic.fill_uninitialized_memory = True
    for near in (key, value):
        far.copy_(near)
        x, y = (far, value) if near is key else (key, far)
        got, expected = (summarize(*z, backend="triton").mean for z in ((x, y), (key, value)))
        assert torch.equal(got, expected)
    context = summarize(key, value, backend="triton")
    got, expected = (attend(x, context, backend="triton") for x in (far.copy_(key), key))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("query", "groups", "reason"),
    [
        (
            torch.empty(1, 1, 2, 4, dtype=torch.float64),
            1,
            "float16, bfloat16 or float32; got torch.float64",
        ),
        (torch.empty(1, 1, 2, 300), 1, "up to 256 key channels.*got Dk = 300, num_groups = 1"),
        (torch.empty(1, 1, 2, 153), 9, "got Dk = 153, num_groups = 9"),
        (torch.empty(1, 1, 2, 0), 1, "needs channels; got Dk = 0, Dv = 4"),
    ],
    ids=["dtype", "channels", "groups", "none"],
)
def test_a_named_backend_says_why_it_cannot_serve_and_auto_goes_another_way(query, groups, reason):
    query = query.zero_().to(DEVICE)
    context = summarize(query, query.new_ones(1, 1, 2, 4), backend="blocked")
    with pytest.raises(
        NotImplementedError, match=f"backend='triton': .*{reason}; use backend='auto'"
    ):
        attend(query, context, num_groups=groups, backend="triton")
    # What the dispatcher calls for tensors on a GPU.
    got = backends.implementation("triton", "attend")(query, context.mean, "scaling", groups)
    assert torch.equal(got, attend(query, context, normalization="scaling", backend="blocked"))


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_blocks, "INTERPRETED", False)
    backends._why_not_on.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match="it runs on CUDA devices; got cpu"):
            efficient_attention(*make_inputs(dtype=torch.float32), backend="triton")
    finally:
        backends._why_not_on.cache_clear()


def test_kernels_serve_what_they_can_where_auto_is_triton_unless_another_is_named():
    _, key, value = (x.detach() for x in inputs_of(1, 1, 1, 300, 8, 8))
    run = backends.implementation("triton", "summarize")
    by_kernels = summarize(key, value, backend="triton").mean
    by_blocks = summarize(key, value, backend="blocked").mean
    assert not torch.equal(by_kernels, by_blocks)
    assert torch.equal(run(key, value, None, "softmax")[0], by_kernels)
    assert torch.equal(run(key, value, None, "softmax", backend="blocked")[0], by_blocks)


def test_the_quadratic_order_is_not_the_kernels():
    with pytest.raises(NotImplementedError, match="backend='triton' computes order='linear' only"):
        efficient_attention(*inputs_of(), order="quadratic", backend="triton")


def test_operators_pass_opcheck(short_chunks):
    query, key, value = (x.detach() for x in inputs_of(1, 2, 37, 40, 8, 5))
    tests = ("test_schema", "test_faketensor")
    mean, log_weight, shift, total = library.summarize(key, value, None, "softmax")
    slope = torch.randn(1, 37, 2, 5, device=DEVICE).transpose(1, 2)
    options = {"backend": "triton"}
    for q, m in ((query, mean), (layouts(query)["channel-major"], mean.mT.contiguous().mT)):
        torch.library.opcheck(library.attend, (q, m, "softmax", 1), options, test_utils=tests)
        for needs in ([True, True], [False, True]):
            args = (slope, q, m, "softmax", 1, needs)
            torch.library.opcheck(library.attend_backward, args, options, test_utils=tests)
    for k in (key, layouts(key)["token-major"]):
        args = (k, value, None, "softmax")
        torch.library.opcheck(library.summarize, args, options, test_utils=tests)
        args = (mean, log_weight, k, value, None, mean, shift, total, "softmax", [True, True])
        torch.library.opcheck(library.summarize_backward, args, options, test_utils=tests)


def test_compiles_whole_and_once_for_all_lengths():
    compiled = torch.compile(by("triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (17, 40):
        inputs = inputs_of(1, 2, length, length + 1, 8, 5)
        got, expected = (with_gradients(f, inputs) for f in (compiled, by("triton")))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_calls_can_be_captured_in_a_graph():
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = inputs_of(2, 2, 3000, 3000, 64, 64, dtype=torch.bfloat16)
    slope = torch.randn_like(inputs[0])

    def step():
        output = by("triton")(*inputs)
        return output, *torch.autograd.grad(output, inputs, slope)

    expected = step()  # compiles, which must not happen during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU's time")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 64, 128, 256])
def test_long_sequences_of_many_channels_are_as_precise_as_a_plain_run(dtype, channels):
    inputs = inputs_of(1, 2, 20_000, 30_001, channels, channels, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_precise(
        with_gradients(by("triton"), inputs),
        with_gradients(plain_attention, inputs),
        with_gradients(plain_attention, exact),
        channels=channels,
    )
