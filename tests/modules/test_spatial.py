"""Attention on feature maps: the authors' module, every order, every memory format, and the non-local baseline."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import efficient_attention as ea
from efficient_attention.memory import peak_bytes
from efficient_attention.ops.planner import MODULE_ORDERS
from efficient_attention.testing import assert_as_precise_as_plain, plain_attention

EFFICIENT = [ea.EfficientAttention1d, ea.EfficientAttention2d, ea.EfficientAttention3d]
NON_LOCAL = [ea.NonLocal1d, ea.NonLocal2d, ea.NonLocal3d]
EXACT = {"rtol": 0, "atol": 1e-12}


def feature_map(dimensions, batch=2, channels=6, dtype=torch.float64):
    return torch.randn(batch, channels, *(7, 5, 4)[:dimensions], dtype=dtype)


def official(**options):
    return ea.EfficientAttention2d(6, 4, 8, init="official", dtype=torch.float64, **options)


def results(module, x, slope=None, **options):
    """Output, gradient of the input, and gradients of all parameters by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x, **options)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) if slope is None else slope
    grads = torch.autograd.grad(y, (x, *module.parameters()), slope)
    return {
        "y": y,
        "x": grads[0],
        **dict(zip(dict(module.named_parameters()), grads[1:], strict=True)),
    }


def paper_module(state, x, num_heads):
    """The module of the paper for one sample, written from Sec. 3.2 with matrices [n, d], head by head."""
    n = x[0].numel()

    def project(name, features):
        return features @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    features = x.reshape(x.shape[0], n).T
    queries, keys, values = (project(name, features) for name in ("queries", "keys", "values"))
    heads = [
        torch.softmax(q, dim=1) @ (torch.softmax(k, dim=0).T @ v)
        for q, k, v in zip(
            *(y.chunk(num_heads, dim=1) for y in (queries, keys, values)), strict=True
        )
    ]
    return x + project("reprojection", torch.cat(heads, dim=1)).T.reshape(x.shape)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_a_state_dict_of_the_authors_module_gives_the_papers_output(num_heads):
    # Names and shapes of the parameters of the module that the paper's authors published.
    shapes = {"keys": (4, 6), "queries": (4, 6), "values": (8, 6), "reprojection": (6, 8)}
    state = {}
    for name, (out, in_) in shapes.items():
        state[f"{name}.weight"] = torch.randn(out, in_, 1, 1, dtype=torch.float64)
        state[f"{name}.bias"] = torch.randn(out, dtype=torch.float64)
    module = official(num_heads=num_heads)
    module.load_state_dict(state, strict=True)
    x = feature_map(2)
    expected = torch.stack([paper_module(state, sample, num_heads) for sample in x])
    torch.testing.assert_close(module(x), expected, **EXACT)


@pytest.mark.parametrize("order", MODULE_ORDERS)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_every_order_gives_the_same_values_and_gradients(order, normalization, num_heads, masked):
    module = official(num_heads=num_heads, normalization=normalization, order="quadratic")
    x = feature_map(2)
    mask = None
    if masked:
        mask = torch.rand(2, 7, 5) > 0.4
        mask[0] = False
    expected = results(module, x, key_mask=mask)
    module.order = order
    torch.testing.assert_close(results(module, x, key_mask=mask), expected, **EXACT)


@pytest.mark.parametrize("kind", EFFICIENT)
@pytest.mark.parametrize("order", ["linear", "quadratic", "folded"])
def test_memory_format_is_taken_and_kept(kind, order):
    dimensions = kind._dimensions
    module = kind(6, 4, 8, num_heads=2, init="official", order=order, dtype=torch.float64)
    x = feature_map(dimensions)
    expected = results(module, x)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    got = results(module, last)
    torch.testing.assert_close(got, expected, **EXACT)
    assert got["y"].stride() == last.stride()
    assert expected["y"].stride() == x.stride()


@pytest.mark.parametrize("kind", EFFICIENT + NON_LOCAL)
def test_zero_init_starts_as_the_identity_bit_for_bit(kind):
    x = feature_map(kind._dimensions, dtype=torch.float32)
    assert torch.equal(kind(6, 4, 8, num_heads=2)(x), x)
    assert not torch.equal(kind(6, 4, 8, num_heads=2, init="official")(x), x)


@pytest.mark.parametrize("order", MODULE_ORDERS)
def test_the_residual_is_the_input_or_nothing(order):
    module, x = official(order=order), feature_map(2)
    whole = module(x)
    module.residual = False
    torch.testing.assert_close(whole - x, module(x), **EXACT)


@pytest.mark.parametrize("kind", EFFICIENT + NON_LOCAL)
def test_dimensions_agree_on_a_flattened_map(kind):
    # The same positions, arranged in a line: attention does not see the arrangement.
    flat_kind = ea.EfficientAttention1d if kind in EFFICIENT else ea.NonLocal1d
    options = {"num_heads": 2, "init": "official", "dtype": torch.float64}
    module, flat = kind(6, 4, 8, **options), flat_kind(6, 4, 8, **options)
    flat.load_state_dict(
        {k: v.view_as(flat.state_dict()[k]) for k, v in module.state_dict().items()}
    )
    x = feature_map(kind._dimensions)
    torch.testing.assert_close(module(x).flatten(2), flat(x.flatten(2)), **EXACT)


def test_scaling_module_equals_the_non_local_block_of_the_same_state_dict():
    module = official(num_heads=2, normalization="scaling")
    block = ea.NonLocal2d(6, 4, 8, num_heads=2, normalization="scaling", dtype=torch.float64)
    block.load_state_dict(module.state_dict(), strict=True)
    x, mask = feature_map(2), torch.rand(2, 7, 5) > 0.3
    torch.testing.assert_close(
        results(module, x, key_mask=mask), results(block, x, key_mask=mask), **EXACT
    )


def test_non_local_block_is_the_embedded_gaussian():
    block = ea.NonLocal2d(6, 4, 8, num_heads=2, init="official", dtype=torch.float64)
    x = feature_map(2)
    q, k, v = (
        f(x).flatten(2).unflatten(1, (2, -1)) for f in (block.queries, block.keys, block.values)
    )
    attended = v @ torch.softmax(q.mT @ k, dim=-1).mT  # [B, h, dv / h, n]
    expected = x + block.reprojection(attended.flatten(1, 2).view(2, 8, 7, 5))
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("kind", [ea.EfficientAttention2d, ea.NonLocal2d])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_padding_and_batch_mates_change_nothing(kind, normalization):
    module = kind(
        6, 4, 8, num_heads=2, init="official", normalization=normalization, dtype=torch.float64
    )
    small, large = feature_map(2, batch=1), torch.randn(1, 6, 11, 9, dtype=torch.float64)
    batch = torch.full((2, 6, 11, 9), 1e6, dtype=torch.float64)
    batch[0, :, :7, :5], batch[1] = small[0], large[0]
    mask = torch.zeros(2, 11, 9, dtype=torch.bool)
    mask[0, :7, :5] = mask[1] = True
    got = module(batch, key_mask=mask)
    torch.testing.assert_close(got[:1, :, :7, :5], module(small), **EXACT)
    torch.testing.assert_close(got[1:], module(large), **EXACT)
    assert not torch.allclose(module(batch)[:1, :, :7, :5], module(small))


@pytest.mark.parametrize("order", ["linear", "quadratic", "folded"])
def test_key_bias_has_exactly_zero_gradient_under_softmax(order):
    grad = results(official(order=order), feature_map(2))["keys.bias"]
    assert torch.equal(grad, torch.zeros(4, dtype=torch.float64))


def test_key_bias_counts_under_scaling():
    assert results(official(normalization="scaling"), feature_map(2))["keys.bias"].abs().min() > 0


def test_auto_folds_where_the_multiply_adds_say_so():
    x = torch.empty(1, 64, 100, 100, device="meta")
    assert ea.EfficientAttention2d(64, 32, 64).planned_order(x) == "folded"
    assert ea.EfficientAttention2d(64, 128, 32, num_heads=8).planned_order(x) == "linear"
    assert (
        ea.EfficientAttention2d(64, 32, 64, num_heads=1).planned_order(x[..., :3, :3])
        == "quadratic"
    )


def test_sizes_of_other_integer_types_are_taken():
    numpy = pytest.importorskip("numpy")
    assert ea.EfficientAttention2d(6, numpy.int64(4)).key_channels == 4


def test_shapes_can_be_planned_on_the_meta_device():
    for order in MODULE_ORDERS:
        module = ea.EfficientAttention2d(6, 4, 8, order=order, device="meta")
        assert module(torch.empty(2, 6, 7, 5, device="meta")).shape == (2, 6, 7, 5)


def test_a_hook_on_the_keys_sees_what_it_saw_before():
    module, x, seen = official(), feature_map(2), []
    module.keys.register_forward_hook(lambda m, args, out: seen.append(out))
    module(x)
    torch.testing.assert_close(
        seen[0], nn.functional.conv2d(x, module.keys.weight, module.keys.bias), **EXACT
    )


@pytest.mark.parametrize("kind", EFFICIENT + NON_LOCAL)
def test_copies_are_equal(kind):
    module = kind(6, 4, 8, num_heads=2, init="official")
    x = feature_map(kind._dimensions, dtype=torch.float32)
    expected = module(x)
    again = kind(6, 4, 8, num_heads=2)
    again.load_state_dict(module.state_dict(), strict=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        assert torch.equal(other(x), expected)


def by_hand(module, x):
    """The module as a user would type it, every step in the dtype that autocast or the input gives it."""
    q, k, v = (
        f(x).flatten(2).unflatten(1, (module.num_heads, -1)).mT
        for f in (module.queries, module.keys, module.values)
    )  # [B, h, n, c / h]
    attended = plain_attention(q, k, v).mT.flatten(1, 2)
    y = module.reprojection(attended.unflatten(2, x.shape[2:]))
    return x + y if module.residual else y


@pytest.mark.parametrize("order", ["linear", "folded"])
def test_trains_under_autocast_as_precisely_as_a_plain_module(order):
    module = ea.EfficientAttention2d(
        32, 16, 32, num_heads=4, init="official", residual=False, order=order
    )
    x = torch.randn(2, 32, 20, 30)

    def outcome(function, module, x):
        y = function(module, x)
        names = [name for name, _ in module.named_parameters() if name != "keys.bias"]
        wanted = [module.get_parameter(name) for name in names]
        return dict(
            zip(
                ["y", *names],
                (y, *torch.autograd.grad(y.double().square().sum(), wanted)),
                strict=True,
            )
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = (outcome(f, module, x) for f in (type(module).__call__, by_hand))
    exact = outcome(by_hand, copy.deepcopy(module).double(), x.double())
    assert got["y"].dtype == torch.bfloat16
    for name in exact:
        assert name == "y" or got[name].dtype == torch.float32
        assert_as_precise_as_plain(got[name], plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["linear", "folded"])
def test_low_precision_module_is_as_precise_as_a_plain_one(dtype, order):
    module = ea.EfficientAttention2d(
        32, 16, 32, num_heads=4, init="official", order=order, residual=False, dtype=dtype
    )
    x = torch.randn(1, 32, 40, 50).to(dtype)
    exact = by_hand(copy.deepcopy(module).double(), x.double())
    got = module(x)
    assert got.dtype == dtype
    assert_as_precise_as_plain(got, by_hand(module, x), exact)


def test_evaluation_does_not_hold_values_or_attended_values():
    module, x = ea.EfficientAttention2d(64, 32, 256, num_heads=4), torch.randn(1, 64, 128, 128)
    with torch.no_grad():
        folded = peak_bytes(lambda: module(x))
        module.order = "linear"
        linear = peak_bytes(lambda: module(x))
    # One projection of half the channels, the folded output, the residual sum.
    assert folded <= 2.6 * x.nbytes
    assert linear >= 4.5 * x.nbytes


def test_evaluation_lets_go_of_what_is_done_with():
    module, x = ea.EfficientAttention2d(64, 32, 64, order="linear"), torch.randn(1, 64, 200, 200)
    # oneDNN copies what it convolves on some processors and not on others: that is not ours to count.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        # First queries, attended values and a block; then two tensors like the input, and never three.
        assert peak_bytes(lambda: module(x)) <= 2.1 * x.nbytes


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((6, 4, 8), {"num_heads": 3}, r"key_channels must be divisible by num_heads = 3; got 4"),
        ((6, 4, 6), {"num_heads": 4}, r"value_channels must be divisible by num_heads = 4; got 6"),
        ((6, 4, 8), {"num_heads": 0}, r"num_heads must be a positive integer; got 0"),
        ((1,), {}, r"key_channels must be a positive integer; got 0"),
        ((0,), {}, r"in_channels must be a positive integer; got 0"),
        (("6",), {}, r"in_channels must be a positive integer; got '6'"),
        ((6, True, 8), {}, r"key_channels must be a positive integer; got True"),
        ((6, 4, 8), {"num_heads": 2.0}, r"num_heads must be a positive integer; got 2\.0"),
        ((6, 4.0, 8), {}, r"key_channels must be a positive integer; got 4\.0"),
        (
            (6, 4, 8),
            {"normalization": "relu"},
            r"normalization must be one of 'softmax', 'scaling'; got 'relu'",
        ),
        ((6, 4, 8), {"init": "ones"}, r"init must be one of 'zero', 'official'; got 'ones'"),
    ],
)
@pytest.mark.parametrize("kind", [ea.EfficientAttention2d, ea.NonLocal3d])
def test_constructor_errors_name_the_argument(kind, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **options)


def test_the_baseline_has_the_same_constructor_and_one_order():
    signatures = [inspect.signature(kind) for kind in EFFICIENT + NON_LOCAL]
    assert all(signature == signatures[0] for signature in signatures)
    assert ea.NonLocal2d(6, order="quadratic").order == "quadratic"
    with pytest.raises(ValueError, match="order must be one of 'auto', 'quadratic'; got 'linear'"):
        ea.NonLocal2d(6, order="linear")


def test_unknown_order_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"order must be one of 'auto', 'linear', .*'folded'; got 'fold'"
    ):
        ea.EfficientAttention2d(6, order="fold")
    with pytest.raises(TypeError, match="heads"):
        ea.EfficientAttention2d(6, heads=2)


@pytest.mark.parametrize("kind", [ea.EfficientAttention2d, ea.NonLocal2d])
def test_input_errors_name_the_argument(kind):
    module = kind(6, 4, 8)
    with pytest.raises(
        ValueError, match=r"x must have shape \[B, C, H, W\] with C = 6; got \(2, 5, 7, 7\)"
    ):
        module(torch.randn(2, 5, 7, 7))
    with pytest.raises(
        ValueError, match=r"x must have shape \[B, C, H, W\] with C = 6; got \(6, 7, 7\)"
    ):
        module(torch.randn(6, 7, 7))
    with pytest.raises(TypeError, match=r"x must be a tensor \[B, C, H, W\]; got list"):
        module([1.0])
    with pytest.raises(
        ValueError, match=r"key_mask must have shape \[B, H, W\] = \(2, 7, 5\); got \(2, 5, 7\)"
    ):
        module(feature_map(2, dtype=torch.float32), key_mask=torch.ones(2, 5, 7).bool())


def test_repr_shows_the_options():
    module = ea.EfficientAttention2d(6, 4, 8, num_heads=2, order="folded")
    assert (
        "6, 4, 8, num_heads=2, normalization='softmax', residual=True, init='zero', order='folded'"
        in repr(module)
    )
