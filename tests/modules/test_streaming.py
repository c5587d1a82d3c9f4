"""Modules that stream: when they do, what it costs, and that nobody could tell otherwise."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import efficient_attention as ea
from efficient_attention.memory import peak_bytes

EXACT = {"rtol": 0, "atol": 1e-12}
PROJECTIONS = ["keys", "queries", "values", "reprojection"]


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def streams(function):
    """Whether the module streams in a call; and what the call returns."""
    with Operators() as seen:
        result = function()
    return any("folded" in name for name in seen.names), result


@pytest.mark.parametrize(
    ("batch", "side", "order"),
    [(1, 22, "linear"), (1, 23, "folded"), (2, 16, "linear"), (2, 17, "folded")],
)
def test_short_inputs_are_not_folded(batch, side, order):
    module = ea.EfficientAttention2d(64, 32, 64, init="official")
    x = torch.randn(batch, 64, side, side)
    assert module.planned_order(x) == order
    expected = module(x)
    module.order = "folded"
    assert module.planned_order(x) == "folded"
    torch.testing.assert_close(module(x), expected)


def official(kind=ea.EfficientAttention2d, dtype=torch.float64, **options):
    return kind(6, key_channels=4, value_channels=8, init="official", dtype=dtype, **options)


@pytest.fixture
def none_is_short(monkeypatch):
    """Small maps are folded too."""
    monkeypatch.setattr("efficient_attention.ops.planner.SHORT_POSITIONS", 0)


def feature_map(dtype=torch.float64):
    return torch.randn(2, 6, 7, 5, dtype=dtype)


@pytest.mark.usefixtures("none_is_short")
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (ea.EfficientAttention1d, (2, 6, 9)),
        (ea.EfficientAttention2d, (2, 6, 7, 5)),
        (ea.EfficientAttention3d, (2, 6, 2, 3, 4)),
        (ea.EfficientAttention, (2, 9, 6)),
        (ea.EfficientAttentionChannelsLast, (2, 4, 3, 6)),
    ],
)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_every_module_streams_in_the_folded_order(kind, shape, normalization):
    module = official(kind, num_heads=2, normalization=normalization)
    x = torch.randn(shape, dtype=torch.float64)
    assert module.planned_order(x) == "folded"
    streamed, y = streams(lambda: module(x))
    assert streamed
    module.order = "linear"
    streamed, expected = streams(lambda: module(x))
    assert not streamed
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.stride() == expected.stride()


@pytest.mark.usefixtures("none_is_short")
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("notice", ["hook", "parametrization", "subclass"])
def test_nothing_streams_that_would_notice(projection, notice):
    module, x = official(num_heads=2), feature_map()
    streamed, expected = streams(lambda: module(x))
    assert streamed
    layer, calls = getattr(module, projection), []
    if notice == "hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif notice == "parametrization":
        parametrizations.weight_norm(layer)
    else:

        class Adapted(nn.Conv2d):
            pass

        layer.__class__ = Adapted
    streamed, y = streams(lambda: module(x))
    assert not streamed
    assert notice != "hook" or calls
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.usefixtures("none_is_short")
def test_a_weight_that_is_more_than_a_tensor_does_not_stream():
    class Tagged(torch.Tensor):
        pass

    module, x = official(), feature_map()
    streamed, expected = streams(lambda: module(x))
    assert streamed
    module.keys.weight = nn.Parameter(module.keys.weight.detach().as_subclass(Tagged))
    streamed, y = streams(lambda: module(x))
    assert not streamed
    torch.testing.assert_close(torch.Tensor(y), expected, **EXACT)


@pytest.mark.usefixtures("none_is_short")
def test_autocast_does_not_stream():
    module, x = official(dtype=torch.float32), feature_map(torch.float32)
    assert streams(lambda: module(x))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not streams(lambda: module(x))[0]


@pytest.mark.usefixtures("none_is_short")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_streams(dtype):
    module = official(dtype=dtype)
    assert streams(lambda: module(feature_map(dtype)))[0]


@pytest.mark.usefixtures("none_is_short")
def test_transforms_take_the_plain_equations():
    module, x = official(num_heads=2), feature_map()
    got = torch.func.vmap(module)(torch.stack((x, x.flip(0))))
    torch.testing.assert_close(got, torch.stack((module(x), module(x.flip(0)))), **EXACT)
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(module, (x,), (tangent,))
    step = 1e-6 * tangent
    difference = (module(x + step) - module(x - step)) / 2e-6
    torch.testing.assert_close(got, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("none_is_short")
def test_a_compiled_module_streams_for_every_length_without_compiling_anew():
    module = official(num_heads=2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for side in (5, 8):
            x = torch.randn(2, 6, side, 7, dtype=torch.float64, requires_grad=True)
            results = []
            for run in (module, compiled):
                y = run(x)
                y.sin().sum().backward()
                gradients = [p.grad for p in (x, *module.parameters())]
                x.grad = None
                module.zero_grad()
                results.append((y, gradients))
            torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.usefixtures("none_is_short")
def test_an_exported_module_runs_without_this_package():
    module, x = official(num_heads=2).eval(), feature_map()
    program = torch.export.export(module, (x,))
    assert "efficient_attention" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x), **EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation_holds_its_output_and_training_one_gradient_more(memory_format):
    module = ea.EfficientAttention2d(64, 32, 64, num_heads=8, init="official")
    x = torch.randn(1, 64, 160, 160).to(memory_format=memory_format)
    few = 3 << 20

    def evaluate():
        with torch.no_grad():
            return module(x)

    assert peak_bytes(evaluate) < x.nbytes + few
    d_y = torch.randn_like(x)
    x.requires_grad_()

    def train():
        y = module(x)
        y.backward(d_y)
        return y

    assert peak_bytes(train) < 2 * x.nbytes + 2 * few


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_place_the_output_takes_the_place_of_the_input(memory_format):
    module = ea.EfficientAttention2d(64, 32, 64, num_heads=8, init="official").eval()
    x = torch.randn(1, 64, 160, 160).to(memory_format=memory_format)
    with torch.no_grad():
        expected = module(x)
        module.inplace = True
        returned = []
        assert peak_bytes(lambda: returned.append(module(x))) < 3 << 20
    assert returned[0] is x
    assert torch.equal(x, expected)
    assert "inplace=True" in repr(module)


@pytest.mark.parametrize("order", ["folded", "linear", "quadratic"])
def test_in_place_holds_in_every_order_and_where_nothing_streams(order):
    module, x = official(order=order), feature_map()
    cropped = torch.randn(2, 6, 9, 9, dtype=torch.float64)[:, :, 1:8, 2:7]
    with torch.no_grad():
        for given in (x, cropped):
            expected = module(given)
            module.inplace = True
            assert module(given) is given
            torch.testing.assert_close(given, expected, **EXACT)
            module.inplace = False


@pytest.mark.usefixtures("none_is_short")
def test_in_place_leaves_an_input_alone_that_a_backward_pass_needs():
    module, x = official(), feature_map()
    module.inplace = True
    before = x.clone()
    y = module(x)
    assert y is not x
    assert torch.equal(x, before)
    y.sum().backward()
    # What somebody else has saved for a backward pass is known to have changed.
    w = x.clone().requires_grad_()
    z = (w * x).sum()
    with torch.no_grad():
        module(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


@pytest.mark.usefixtures("none_is_short")
def test_in_place_cross_attention_writes_over_the_queries_alone():
    module = ea.EfficientAttention(6, 2, context_dim=5, residual=True, dtype=torch.float64)
    x, other = torch.randn(2, 9, 6).double(), torch.randn(2, 7, 5).double()
    with torch.no_grad():
        expected, before = module(x, other), other.clone()
        module.inplace = True
        streamed, y = streams(lambda: module(x, other))
    assert streamed
    assert y is x
    torch.testing.assert_close(x, expected, **EXACT)
    assert torch.equal(other, before)
