"""The operators under PyTorch's machinery: differentiation of every kind, transforms, compiler, autocast, counters."""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import efficient_attention as efficient_attention_package
from efficient_attention import attend, efficient_attention, summarize
from efficient_attention.memory import peak_bytes
from efficient_attention.ops import library
from efficient_attention.testing import make_inputs

SMALL = (2, 2, 3, 4, 2, 3)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_gradients_of_first_and_second_order_are_right(normalization, masked, order):
    inputs = make_inputs(*SMALL, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(2, 4) > 0.4
        mask[0] = False

    def function(q, k, v):
        return efficient_attention(q, k, v, key_mask=mask, normalization=normalization, order=order)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_gradients_of_contexts_are_right(normalization):
    _, key, value = make_inputs(*SMALL, requires_grad=True)

    def function(k, v):
        return tuple(summarize(k, v, normalization=normalization))

    assert torch.autograd.gradcheck(function, (key, value))
    assert torch.autograd.gradgradcheck(function, (key, value))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("part", ["mean", "log_weight"])
def test_gradients_that_will_be_differentiated_are_the_same(part, normalization):
    # They are computed in another way, which second derivatives alone do not compare with the first.
    _, key, value = make_inputs(requires_grad=True)
    mask = torch.rand(2, 53) > 0.3
    context = summarize(key, value, key_mask=mask, normalization=normalization)
    objective = getattr(context, part).sin().sum()
    options = {"retain_graph": True, "materialize_grads": True}
    expected = torch.autograd.grad(objective, (key, value), **options)
    got = torch.autograd.grad(objective, (key, value), create_graph=True, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_forward_mode_is_right():
    inputs = make_inputs(*SMALL, requires_grad=True)

    def function(q, k, v):
        return efficient_attention(q, k, v, order="linear")

    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
    )


def test_jvp_equals_the_product_with_the_jacobian():
    inputs, tangents = make_inputs(*SMALL), make_inputs(*SMALL, seed=1)

    def function(q, k, v):
        return efficient_attention(q, k, v, order="linear")

    _, got = torch.func.jvp(function, inputs, tangents)
    jacobians = torch.autograd.functional.jacobian(function, inputs)
    expected = sum(
        torch.tensordot(j, t, dims=t.dim()) for j, t in zip(jacobians, tangents, strict=True)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_inside_a_compiled_program_are_right(transform):
    inputs, tangents = make_inputs(*SMALL), make_inputs(*SMALL, seed=1)

    def function(q, k, v):
        return efficient_attention(q, k, v, order="linear")

    def transformed(inputs, tangents):
        if transform == "jvp":
            return torch.func.jvp(function, inputs, tangents)[1]
        if transform == "grad":
            return torch.func.grad(lambda *x: function(*x).square().sum())(*inputs)
        return torch.func.vmap(function)(*(x.unsqueeze(0) for x in inputs))

    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(inputs, tangents), transformed(inputs, tangents), rtol=0, atol=1e-12
    )


def test_the_operators_themselves_carry_tangents():
    _, key, value = make_inputs(*SMALL)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, torch.ones_like(key))
        mean = library.summarize(dual, value, None, "scaling")[0]
        # Every key grows by one: the mean by the mean of the values.
        tangent = torch.autograd.forward_ad.unpack_dual(mean).tangent
    expected = value.mean(2, keepdim=True).expand_as(tangent)
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-12)


def test_vmap_equals_a_loop():
    stacks = [
        torch.stack(x) for x in zip(*(make_inputs(*SMALL, seed=s) for s in range(3)), strict=True)
    ]
    got = torch.func.vmap(lambda q, k, v: efficient_attention(q, k, v, order="linear"))(*stacks)
    expected = torch.stack(
        [efficient_attention(*x, order="linear") for x in zip(*stacks, strict=True)]
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_per_sample_gradients_equal_a_loop():
    stacks = [
        torch.stack(x) for x in zip(*(make_inputs(*SMALL, seed=s) for s in range(3)), strict=True)
    ]

    def objective(q, k, v):
        return efficient_attention(q, k, v, order="linear").square().sum()

    got = torch.func.vmap(torch.func.grad(objective))(*stacks)
    for i, sample in enumerate(zip(*stacks, strict=True)):
        leaf = sample[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(objective(leaf, *sample[1:]), leaf)
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(normalization, masked):
    query, key, value = make_inputs(requires_grad=True)
    mask = torch.rand(2, 1, 53) > 0.3 if masked else None
    torch.library.opcheck(library.summarize, (key, value, mask, normalization))
    mean = torch.randn(2, 3, 8, 5, dtype=torch.float64, requires_grad=True)
    for q in (
        query,
        query.detach().mT.contiguous().mT,
        query.detach().transpose(1, 2).contiguous().transpose(1, 2),
    ):
        torch.library.opcheck(library.attend, (q, mean, normalization, 2))
    q, k, v = (x.detach() for x in (query, key, value))
    log_weight = torch.randn(2, 3, 8, dtype=torch.float64)
    mean = mean.detach()
    total = torch.rand_like(log_weight)
    d_output = torch.randn(2, 3, 37, 5, dtype=torch.float64)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(
            library.summarize_backward,
            (mean, log_weight, k, v, mask, mean, log_weight, total, normalization, needs),
        )
        torch.library.opcheck(library.attend_backward, (d_output, q, mean, normalization, 1, needs))


def test_compiles_whole_and_once_for_ten_lengths():
    compiles = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=compiles)
    def function(q, k, v, mask):
        return efficient_attention(q, k, v, key_mask=mask)

    # The first length must not equal another size by chance: the compiler would take the two for one.
    for length in (17, 2, 3, 60, 64, 100, 128, 333, 1000, 1025):
        inputs = make_inputs(queries=length, keys=length + 1, requires_grad=True)
        mask = torch.rand(2, length + 1) > 0.3
        got, expected = function(*inputs, mask), efficient_attention(*inputs, key_mask=mask)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        got_grads = torch.autograd.grad(got.square().sum(), inputs)
        expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
        torch.testing.assert_close(got_grads, expected_grads, rtol=0, atol=1e-12)
    assert compiles.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")
# Cached programs call the operators as they once were.
@torch.compiler.config.patch(force_disable_caches=True)
def test_compiles_with_inductor():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(dtype=torch.float32, requires_grad=True)
    function = torch.compile(lambda q, k, v: efficient_attention(q, k, v).relu(), fullgraph=True)
    got, expected = function(*inputs), efficient_attention(*inputs).relu()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_pytorchs_attention(dtype):
    query, key, value = make_inputs(dtype=torch.float32)
    low = tuple(x.to(dtype) for x in (query, key, value))
    # Named: small problems are otherwise computed in other operators where no autocast is on.
    expected = efficient_attention(*low, backend="blocked")
    with torch.autocast("cpu", dtype=dtype):
        got = efficient_attention(query, *low[1:], backend="blocked")
        assert torch.nn.functional.scaled_dot_product_attention(*low).dtype == dtype
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_autocast_around_backward_does_not_touch_the_gradients():
    inputs = make_inputs(dtype=torch.float32, requires_grad=True)
    # Named: plain operators do in an autocast region what PyTorch's do.
    options = {"order": "linear", "backend": "blocked"}
    expected = torch.autograd.grad(efficient_attention(*inputs, **options).sin().sum(), inputs)
    objective = efficient_attention(*inputs, **options).sin().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(objective, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_float64_is_left_alone_by_autocast():
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert efficient_attention(*inputs).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    inputs = make_inputs(requires_grad=True)
    expected = torch.autograd.grad(efficient_attention(*inputs).square().sum(), inputs)
    objective = checkpoint(
        lambda *x: efficient_attention(*x).square().sum(), *inputs, use_reentrant=reentrant
    )
    objective.backward()
    for x, grad in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=0, atol=1e-12)


def test_runs_on_fake_tensors_without_computing():
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(1, 8, 1 << 40, 64)
        assert efficient_attention(query, query, query).shape == (1, 8, 1 << 40, 64)


def test_flop_counter_counts_multiply_adds_twice():
    query, key, value = make_inputs(2, 3, 37, 53, 8, 5, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output = efficient_attention(query, key, value, order="linear")
    # 2 flops * B 2 * H 3 * (N 37 + M 53) * Dk 8 * Dv 5.
    assert forward.get_total_flops() == 2 * 2 * 3 * (37 + 53) * 8 * 5 == 43_200
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * 43_200


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3))[1:])
def test_only_gradients_that_were_asked_for_are_computed(asked, normalization, short_blocks):
    inputs = make_inputs(2, 3, 37, 53, 8, 5)
    leaves = [x.clone().requires_grad_(needs) for x, needs in zip(inputs, asked, strict=True)]
    variables = [x for x in leaves if x.requires_grad]
    expected_leaves = [x.clone().requires_grad_() for x in inputs]
    options = {"normalization": normalization, "order": "linear"}
    expected = torch.autograd.grad(
        efficient_attention(*expected_leaves, **options, backend="reference").sin().sum(),
        expected_leaves,
    )
    expected = [x for x, needs in zip(expected, asked, strict=True) if needs]

    objective = efficient_attention(*leaves, **options).sin().sum()
    with FlopCounterMode(display=False) as counter:
        got = torch.autograd.grad(objective, variables, retain_graph=True)
    torch.testing.assert_close(list(got), expected, rtol=0, atol=1e-12)
    # One product each for the query, the context and whichever of key and value; 2 * B 2 * H 3 * Dk 8 * Dv 5 flops.
    query, key, value = asked
    positions = 37 * query + 37 * (key or value) + 53 * key + 53 * value
    assert counter.get_total_flops() == 480 * positions
    # The other way to the same gradients, when they will be differentiated themselves.
    got = torch.autograd.grad(objective, variables, create_graph=True)
    torch.testing.assert_close(list(got), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", range(3))
def test_gradients_that_nobody_asked_for_take_no_memory(asked):
    inputs = [torch.randn(1, 8, 16_384, 64) for _ in range(3)]
    inputs[asked].requires_grad_()
    output = efficient_attention(*inputs)
    slope = torch.randn_like(output)
    peak = peak_bytes(lambda: torch.autograd.grad(output, inputs[asked], slope))
    assert peak <= slope.nbytes + 8_000_000


@pytest.mark.parametrize(
    "imports",
    [
        "import torch.utils.flop_counter, efficient_attention",
        # Looked for before it is loaded, as lazy importers do; and loaded again.
        "import efficient_attention, importlib.util\n"
        "assert importlib.util.find_spec('torch.utils.flop_counter').loader\n"
        "import torch.utils.flop_counter\n"
        "importlib.reload(torch.utils.flop_counter)",
    ],
    ids=["counter first", "package first"],
)
def test_formulas_are_there_however_the_counter_is_imported(imports):
    code = f"""
import torch
{imports}
q = torch.randn(1, 1, 10, 2)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    efficient_attention.efficient_attention(q, q, q, order="linear")
assert counter.get_total_flops() == 160, counter.get_total_flops()
"""
    path = {"PYTHONPATH": efficient_attention_package.__path__[0] + "/.."}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


def test_a_named_backend_does_not_fall_back_silently():
    query, key, value = make_inputs(*SMALL)

    def function(q):
        return efficient_attention(q, key, value, backend="blocked")

    with pytest.raises(
        NotImplementedError, match=r"backend='blocked': .*torch\.func.*use backend='auto'"
    ):
        torch.func.vmap(function)(torch.stack((query, query)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        with pytest.raises(
            NotImplementedError, match="backend='blocked': it has no forward-mode derivative"
        ):
            function(dual)


def test_cross_attention_to_a_fixed_context_needs_no_gradient_of_it():
    query, key, value = make_inputs()
    memory = summarize(key, value)
    leaf = query.clone().requires_grad_()
    attend(leaf, memory).sum().backward()
    assert leaf.grad is not None
    assert memory.mean.grad is None
