"""What operators hold while they run, against records of every allocation."""

import pytest
import torch
from torch import nn

from efficient_attention.memory import peak_bytes
from efficient_attention.planning.temporaries import bytes_during

aten, ours = torch.ops.aten, torch.ops.efficient_attention


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    torch.set_num_threads(request.param)


def check(operator, *args, tolerance=0.03, few=1500):
    """An operator's own bytes are those that were recorded."""
    recorded = peak_bytes(lambda: operator(*args))
    result = operator(*args)
    returned = result if isinstance(result, tuple) else (result,)
    known = sum(x.nbytes for x in returned if x is not None)
    counted = max(known, bytes_during(operator, args, result))
    assert counted == pytest.approx(recorded, rel=tolerance, abs=few)


def convolution(kind, channels, out_channels, kernel, sides, batch=1, dtype=None, **options):
    layer = kind(channels, out_channels, kernel, **options).to(dtype)
    x = torch.randn(batch, channels, *sides, dtype=dtype)
    dimensions = len(sides)
    rest = [getattr(layer, n) for n in ("stride", "padding", "dilation")]
    rest += [layer.transposed, getattr(layer, "output_padding", (0,) * dimensions), layer.groups]
    return x, layer.weight.detach(), layer.bias.detach(), *rest


CONVOLUTIONS = {
    "oneDNN": (nn.Conv2d, 32, 64, 3, (64, 64), {"padding": 1}),
    "a batch": (nn.Conv2d, 32, 64, 3, (64, 64), {"padding": 1, "batch": 3}),
    "pointwise": (nn.Conv2d, 32, 64, 1, (64, 64), {}),
    "1-D": (nn.Conv1d, 32, 64, 3, (4096,), {"padding": 1}),
    "in groups": (nn.Conv2d, 64, 64, 3, (64, 64), {"padding": 1, "groups": 64}),
    "3-D, a batch": (nn.Conv3d, 16, 32, 3, (8, 32, 32), {"padding": 1, "batch": 2}),
    "3-D, one sample": (nn.Conv3d, 16, 32, 3, (8, 16, 16), {"padding": 1}),
    "float64": (nn.Conv2d, 16, 32, 3, (32, 32), {"padding": 1, "dtype": torch.float64}),
    "float64, dilated": (
        nn.Conv2d,
        16,
        32,
        3,
        (32, 32),
        {"padding": 2, "dilation": 2, "dtype": torch.float64, "batch": 2},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_hold_what_is_counted(threads, name):
    *sizes, options = CONVOLUTIONS[name]
    check(aten.convolution.default, *convolution(*sizes, **options))


def test_strided_convolutions_hold_what_is_counted(threads):
    arguments = convolution(nn.Conv2d, 64, 64, 3, (64, 64), padding=1, stride=2)
    check(aten.convolution.default, *arguments)


def test_convolutions_take_channels_last_as_they_are(threads):
    x, *rest = convolution(nn.Conv2d, 64, 64, 3, (64, 64), padding=1)
    x = x.to(memory_format=torch.channels_last)
    y = aten.convolution.default(x, *rest)
    assert bytes_during(aten.convolution.default, (x, *rest), y) < 1.5 * y.nbytes
    check(aten.convolution.default, x, *rest)
    d_y = torch.randn_like(y)
    weight, bias, *rest = rest
    needs = [True, True, True]
    check(aten.convolution_backward.default, d_y, x, weight, [len(bias)], *rest, needs)


@pytest.mark.parametrize("name", ["oneDNN", "a batch", "in groups", "3-D, one sample", "float64"])
@pytest.mark.parametrize("first", [False, True], ids=["", "of a first layer"])
def test_backward_passes_of_convolutions_hold_what_is_counted(name, first):
    torch.set_num_threads(1)
    *sizes, options = CONVOLUTIONS[name]
    x, weight, bias, *rest = convolution(*sizes, **options)
    d_y = torch.randn_like(aten.convolution.default(x, weight, bias, *rest))
    needs = [not first, True, True]
    check(
        aten.convolution_backward.default, d_y, x, weight, [len(bias)], *rest, needs, tolerance=0.1
    )


@pytest.mark.parametrize("positions", [100, 500, 2000])
def test_fused_attention_holds_what_is_counted(threads, positions):
    query, key, value = torch.randn(3, 2, 4, positions, 16)
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    check(forward, query, key, value)
    output, sums = forward(query, key, value)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    d_output = torch.randn_like(output)
    check(backward, d_output, query, key, value, output, sums, 0.0, False)
    check(backward, d_output.contiguous(), query, key, value, output, sums, 0.0, False)


@pytest.mark.parametrize("positions", [20, 300])
def test_fast_paths_of_transformers_hold_what_is_counted(positions):
    layer = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True).eval()
    x, a = torch.randn(2, positions, 32), layer.self_attn
    attention = (a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
    with torch.no_grad():
        check(aten._native_multi_head_attention.default, x, x, x, 32, 4, *attention, None, False)
        norms = [p for norm in (layer.norm1, layer.norm2) for p in norm.parameters()]
        feed = [p for linear in (layer.linear1, layer.linear2) for p in linear.parameters()]
        arguments = (x, 32, 4, *attention, False, False, 1e-5, *norms, *feed)
        check(aten._transformer_encoder_layer_fwd.default, *arguments)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(
    ("batch", "heads", "positions", "key_channels", "value_channels"),
    [(2, 1, 4096, 16, 16), (1, 2, 3000, 16, 32), (1, 1, 60_000, 32, 32)],
)
def test_our_operators_hold_what_is_counted(
    batch, heads, positions, key_channels, value_channels, normalization
):
    shapes = [(batch, heads, channels, positions) for channels in (key_channels, value_channels)]
    query, key, value = (torch.randn(shapes[i]).mT for i in (0, 0, 1))
    # Variables of a loop keep a block until they are given the next; sums of blocks are not counted.
    options = {"tolerance": 0.13, "few": 10_000}
    check(ours.summarize.default, key, value, None, normalization, **options)
    mean, _, shift, total = ours.summarize(key, value, None, normalization)
    check(ours.attend.default, query, mean, normalization, 1, **options)
    saved = (key, value, None, mean, shift, total, normalization, [True, True])
    check(ours.summarize_backward.default, mean, None, *saved, **options)
    output = ours.attend(query, mean, normalization, 1)
    saved = (query, mean, normalization, 1, [True, True])
    check(ours.attend_backward.default, output, *saved, **options)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(
    (
        "batch",
        "channels",
        "source_channels",
        "key_channels",
        "value_channels",
        "positions",
        "heads",
    ),
    [(1, 64, None, 32, 64, 40_000, 4), (2, 64, 48, 32, 32, 9000, 1), (3, 16, None, 8, 16, 3000, 2)],
)
def test_the_streamed_module_holds_what_is_counted(
    batch,
    channels,
    source_channels,
    key_channels,
    value_channels,
    positions,
    heads,
    normalization,
    dtype,
):
    x = torch.randn(batch, channels, positions, dtype=dtype)
    source = None
    if source_channels is not None:
        source = torch.randn(batch, source_channels, positions // 2, dtype=dtype)
    attended = channels if source is None else source_channels
    shapes = [(key_channels, channels), (key_channels, attended), (value_channels, attended)]
    weights = [torch.randn(shape, dtype=dtype) for shape in (*shapes, (channels, value_channels))]
    biases = [torch.randn(len(w), dtype=dtype) for w in weights]
    module = (x, source, None, weights, biases, normalization, heads, True)
    check(ours.folded.default, *module, tolerance=0.13, few=10_000)
    _, *summary = ours.folded(*module)
    d_output = torch.randn_like(x)
    check(
        ours.folded_backward.default,
        d_output,
        *module,
        *summary,
        [True] * 3,
        # What products in bfloat16 copy depends on the number of threads.
        tolerance=0.2,
        few=10_000,
    )


def test_nothing_is_counted_on_other_devices():
    x, *rest = (
        a.to("meta") if isinstance(a, torch.Tensor) else a
        for a in convolution(nn.Conv2d, 64, 64, 3, (64, 64))
    )
    y = aten.convolution.default(x, *rest)
    assert bytes_during(aten.convolution.default, (x, *rest), y) == 0
