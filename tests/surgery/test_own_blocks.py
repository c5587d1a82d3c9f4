"""Replacement of this library's own non-local blocks, whose layers somebody may have changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficient_attention as ea
from efficient_attention.surgery import replace

SHAPE = (2, 6, 7, 5)


def block(**options):
    options = {"normalization": "scaling", "init": "official", **options}
    return ea.NonLocal2d(6, 4, 8, dtype=torch.float64, **options)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def hook(module):
    module.keys.register_forward_hook(lambda layer, inputs, output: 3 * output)


def standardize(module):
    module.keys = Standardized(6, 4, 1).double()


def widen(module):
    module.values = nn.Conv2d(6, 8, 3, padding=1).double()


def wrap(module):
    module.keys = nn.Sequential(module.keys, nn.Tanh())


def parametrize(module):
    nn.utils.parametrizations.weight_norm(module.keys)


@pytest.mark.parametrize("change", [hook, standardize, widen, wrap, parametrize])
def test_layers_are_moved_with_all_that_they_do(change):
    old = block()
    change(old)
    model = nn.Sequential(old)
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected, keys = model(x), list(model.state_dict())
    (report,) = replace(model, "0").changes
    assert report.outputs == "exact"
    assert isinstance(model[0], ea.EfficientAttention2d)
    assert model[0].keys is old.keys
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def enlarge(module):
    module.register_buffer("extra", torch.ones(1))


def add(module):
    module.extra = nn.Parameter(torch.ones(1))


def subsample(module):
    module.queries = nn.Conv2d(6, 4, 1, stride=2).double()


def cut(module):
    del module.values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (enlarge, r"it has \['extra'\] beside \['keys'"),
        (add, r"it has \['extra'\] beside \['keys'"),
        (subsample, r"its \['keys', .*\] do not make a non-local block of 6 channels"),
        (cut, r"its .* do not make a non-local block"),
    ],
)
def test_what_would_be_lost_or_cannot_run_is_refused(change, message):
    model = nn.Sequential(block())
    change(model[0])
    old = model[0]
    with pytest.raises(ValueError, match=f"got '0' by '0', but {message}"):
        replace(model, "0")
    assert model[0] is old


@pytest.mark.parametrize("has", ["scaling", "softmax"])
@pytest.mark.parametrize("gets", ["scaling", "softmax"])
def test_only_scaling_for_scaling_is_exact(has, gets):
    model = nn.Sequential(block(normalization=has))
    (change,) = replace(model, "0", normalization=gets).changes
    assert change.outputs == ("exact" if has == gets == "scaling" else "approximate")


@pytest.mark.parametrize("training", [True, False])
def test_a_block_stays_in_its_own_mode(training):
    model = nn.Sequential(block()).train(training)
    replace(model, "0")
    assert model[0].training == model[0].keys.training == training


def test_multihead_attention_with_more_state_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    nn.utils.parametrizations.weight_norm(model[0].out_proj)
    with pytest.raises(ValueError, match=r"it has \['out_proj.parametrizations.weight.original0"):
        replace(model, "0")
