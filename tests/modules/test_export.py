"""Compiled and exported modules: dynamic sizes, programs that run without this package, ONNX that runs anywhere."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import efficient_attention as ea
from efficient_attention.testing import assert_as_precise_as_plain, plain_attention

EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = [(9, 13), (16, 16), (2, 3), (40, 21), (7, 100)]


def model(**options):
    return ea.EfficientAttention2d(6, 4, 8, num_heads=2, init="official", **options).eval()


def by_hand(module, x):
    """The module of :func:`model` as a user would type it, in the dtype of the input."""
    q, k, v = (
        f(x).flatten(2).unflatten(1, (2, -1)).mT
        for f in (module.queries, module.keys, module.values)
    )  # [B, h, n, c / h]
    attended = plain_attention(q, k, v, normalization=module.normalization)
    return x + module.reprojection(attended.mT.flatten(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("order", ["auto", "linear"])
def test_module_compiles_whole_and_once_for_ten_sizes(order):
    compiles = CompileCounterWithBackend("aot_eager")
    module = model(order=order, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiles)
    for height, width in SIZES * 2:
        x = torch.randn(3, 6, height + len(SIZES), width, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), module(x), **EXACT)
    assert compiles.frame_count == 1


@pytest.mark.parametrize("order", ["auto", "folded"])
def test_exported_module_serves_every_size(order, tmp_path):
    module = model(order=order)
    dynamic = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(module, (torch.randn(2, 6, 9, 13),), dynamic_shapes=(dynamic,))
    for height, width in SIZES:
        x = torch.randn(2, 6, height, width)
        torch.testing.assert_close(program.module()(x), module(x))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("efficient_attention" in name for name in operators)


def test_exported_program_runs_where_the_package_is_not_installed(tmp_path):
    module, x = model(), torch.randn(2, 6, 9, 13)
    dynamic = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, module(x).detach()), tmp_path / "example.pt")
    code = (
        "import sys, torch; sys.modules['efficient_attention'] = None\n"
        "x, y = torch.load('example.pt')\n"
        "torch.testing.assert_close(torch.export.load('program.pt2').module()(x), y)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_tokens_with_a_mask_export():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ea.EfficientAttention(6, 2)

        def forward(self, x, mask):
            return self.attention(x, key_mask=mask)

    module = Masked().eval()
    length = torch.export.Dim("length", min=2)
    example = (torch.randn(2, 9, 6), torch.rand(2, 9) > 0.3)
    program = torch.export.export(module, example, dynamic_shapes=({1: length}, {1: length}))
    x, mask = torch.randn(2, 31, 6), torch.rand(2, 31) > 0.5
    mask[1] = False
    torch.testing.assert_close(program.module()(x, mask), module(x, mask))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["linear", "folded"])
def test_onnx_model_gives_the_same_numbers_at_every_size(normalization, order, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = model(normalization=normalization, order=order)
    path = tmp_path / "attention.onnx"
    dynamic = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    torch.onnx.export(
        module,
        (torch.randn(2, 6, 9, 13),),
        path,
        dynamo=True,
        dynamic_shapes=(dynamic,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [node.name for node in session.get_inputs()]
    for height, width in SIZES:
        x = torch.randn(2, 6, height, width)
        (got,) = session.run(None, {name: x.numpy()})
        plain, exact = by_hand(module, x), by_hand(copy.deepcopy(module).double(), x.double())
        assert_as_precise_as_plain(torch.from_numpy(got), plain, exact)


class Host(nn.Module):
    """A network of somebody else, with every kind of module inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.map = ea.EfficientAttention2d(8, init="official")
        self.baseline = ea.NonLocal2d(8, init="official")
        self.tokens = ea.EfficientAttention(8, 2)
        self.multihead = ea.MultiheadEfficientAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.baseline(self.map(self.stem(x)))
        tokens = x.flatten(2).transpose(1, 2)
        across, _ = self.multihead(tokens, tokens, tokens, need_weights=False)
        return self.tokens(across, context=tokens)


def test_symbolic_traces_hold_a_module_as_one_operation():
    host = Host().eval()
    traced = torch.fx.symbolic_trace(torch.fx.symbolic_trace(host))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["stem", "map", "baseline", "multihead", "tokens"]
    for size in (9, 40):
        x = torch.randn(2, 3, size, size)
        assert torch.equal(traced(x), host(x))


def test_features_are_extracted_from_a_host():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    host, x = Host().eval(), torch.randn(2, 3, 9, 9)
    features = extraction.create_feature_extractor(host, ["map", "tokens"])(x)
    assert torch.equal(features["map"], host.map(host.stem(x)))
    assert torch.equal(features["tokens"], host(x))


@pytest.mark.parametrize("kind", [ea.EfficientAttention2d, ea.NonLocal2d, ea.EfficientAttention])
def test_a_symbolic_trace_of_nothing_else_is_refused(kind):
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} is one operation to torch.fx"):
        torch.fx.symbolic_trace(kind(8))


# The tracer warns of every check of a shape.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["auto", "linear", "folded", "quadratic"])
def test_a_jit_trace_serves_every_size_and_trains(normalization, order):
    module = model(normalization=normalization, order=order, dtype=torch.float64)
    traced = torch.jit.trace(module, torch.randn(2, 6, 9, 13, dtype=torch.float64))
    for height, width in SIZES:
        x = torch.randn(3, 6, height, width, dtype=torch.float64)
        got, expected = traced(x), module(x)
        torch.testing.assert_close(got, expected, **EXACT)
        parameters = tuple(module.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got.sin().sum(), parameters),
            torch.autograd.grad(expected.sin().sum(), parameters),
            **EXACT,
        )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jit_trace_of_multihead_attention_serves_every_length():
    module = ea.MultiheadEfficientAttention(8, 2, batch_first=True, add_zero_attn=True).double()
    traced = torch.jit.trace(module, (torch.randn(2, 9, 8).double(),) * 3)
    x = torch.randn(3, 40, 8, dtype=torch.float64)
    torch.testing.assert_close(traced(x, x, x), module(x, x, x), **EXACT)


def test_module_runs_in_deterministic_mode_bit_for_bit():
    module, x = model(), torch.randn(2, 6, 30, 30, requires_grad=True)
    runs = []
    for _ in range(2):
        y = module(x)
        runs.append((y, *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
