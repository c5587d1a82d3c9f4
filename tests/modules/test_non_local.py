"""Non-local blocks over somebody else's layers."""

import pytest
import torch
from torch import nn

import efficient_attention as ea
from efficient_attention.modules import EfficientNonLocal
from efficient_attention.testing import assert_as_precise_as_plain

ROLES = {"query": "theta", "key": "phi", "value": "g", "output": ["z", "norm"]}


def layers():
    return {
        "g": nn.Sequential(nn.Conv2d(6, 5, 1), nn.MaxPool2d(2)),
        "norm": nn.BatchNorm2d(6),
        "phi": nn.Sequential(nn.Conv2d(6, 4, 1), nn.MaxPool2d(2)),
        "theta": nn.Conv2d(6, 4, 1),
        "z": nn.Conv2d(5, 6, 1),
    }


def plain(block, x):
    q, k, v = (part(x).flatten(2).mT for part in (block.theta, block.phi, block.g))
    if block.normalization == "softmax":
        y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    else:
        y = (q @ k.mT / k.shape[1]) @ v
    return x + block.norm(block.z(y.mT.unflatten(2, x.shape[2:])))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["auto", "linear", "quadratic"])
def test_output_and_gradients_are_those_of_the_equations(normalization, order):
    block = EfficientNonLocal(layers(), **ROLES, normalization=normalization, order=order)
    block.double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for compute in (block, lambda x: plain(block, x)):
        y = compute(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *block.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_precise_as_the_plain_equations(dtype):
    block = EfficientNonLocal(layers(), **ROLES, normalization="scaling").double().eval()
    x = torch.randn(2, 6, 24, 24, dtype=torch.float64)
    truth = plain(block, x)
    block.to(dtype)
    assert_as_precise_as_plain(block(x.to(dtype)), plain(block, x.to(dtype)), truth, str(dtype))


def test_a_mask_for_the_whole_network_hides_padding_behind_its_pooling():
    block = EfficientNonLocal(layers(), **ROLES, normalization="softmax").double().eval()
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    inside = torch.ones(2, 16, 12, dtype=torch.bool)
    inside[1, 8:] = False
    expected = block(x[1:, :, :4])[0]
    with ea.masked(nn.Sequential(block), inside):
        torch.testing.assert_close(block(x)[1, :, :4], expected, rtol=1e-12, atol=1e-12)
    with ea.masked(nn.Sequential(block, ea.EfficientAttention1d(6)), inside[:, 0]):
        torch.testing.assert_close(block(x), plain(block, x), rtol=1e-12, atol=1e-12)


def test_layers_keep_their_names_and_their_order():
    given = layers()
    block = EfficientNonLocal(given, **ROLES, normalization="scaling")
    assert list(block.state_dict()) == list(nn.ModuleDict(given).state_dict())


def test_freezing_counts_the_positions_attended_to():
    block = EfficientNonLocal(layers(), **ROLES, normalization="scaling")
    # Keys of 4 channels and values of 5: 9 x 1 x (4 + 5) < (9 + 1) x 4 x 5, but 16 x 4 x (4 + 5) > (16 + 4) x 4 x 5.
    for size, order in ((3, "quadratic"), (4, "linear")):
        block.order = "auto"
        assert ea.freeze(nn.Sequential(block), torch.randn(1, 6, size, size)) == {"0": order}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "q"}, r"must be among \['g', 'norm', 'phi', 'theta', 'z'\]; got 'q'"),
        ({"output": ["z", "W"]}, "got 'W'"),
        ({"normalization": "none"}, "normalization must be one of"),
        ({"order": "folded"}, "order must be one of"),
    ],
)
def test_the_constructor_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientNonLocal(layers(), **{**ROLES, "normalization": "scaling", **options})


@pytest.mark.parametrize("x", [torch.randn(2, 6), None])
def test_inputs_are_feature_maps(x):
    block = EfficientNonLocal(layers(), **ROLES, normalization="scaling")
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, ...\] of 1 to 3 dimensions"):
        block(x)


def test_the_map_that_is_never_built_is_not_returned():
    block = EfficientNonLocal(layers(), **ROLES, normalization="scaling").eval()
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(block(x, return_nl_map=False), block(x))
    with pytest.raises(NotImplementedError, match=r"return_nl_map must be False: .*never built"):
        block(x, return_nl_map=True)
