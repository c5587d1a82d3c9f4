"""Projections folded into a context: exactly, in the precision of contexts, and never where somebody would notice."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import efficient_attention as ea
from efficient_attention.modules.folding import fold_output, fold_values, obstacle

EXACT = {"rtol": 0, "atol": 1e-12}


def feature_map():
    return torch.randn(2, 6, 7, 5, dtype=torch.float64)


def official(**options):
    return ea.EfficientAttention2d(6, 4, 8, init="official", dtype=torch.float64, **options)


def test_autocast_does_not_choose_the_precision_of_contexts():
    pooled = ea.Context(torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    context = ea.Context(torch.randn(2, 2, 2, 4), torch.randn(2, 2, 2))
    column_sums = torch.rand(2, 1, 4)
    values, output = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def fold():
        return (
            fold_values(pooled, column_sums, values.weight, values.bias, num_heads=2),
            fold_output(context, output.weight, output.bias),
        )

    expected = fold()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fold()
    for each, alike in zip(got, expected, strict=True):
        assert each.mean.dtype == torch.float32
        assert torch.equal(each.mean, alike.mean)


@pytest.mark.parametrize("projection", ["values", "reprojection"])
@pytest.mark.parametrize(
    "notice",
    [
        "hook",
        "pre-hook",
        "backward hook",
        "backward pre-hook",
        "parametrization",
        "subclass",
        "forward of its own",
    ],
)
def test_nothing_is_folded_that_would_notice(projection, notice):
    module, x = official(num_heads=2, order="linear"), feature_map().requires_grad_()
    expected = module(x)
    layer, calls = getattr(module, projection), []
    if notice == "hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif notice == "pre-hook":
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    elif notice == "backward hook":
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    elif notice == "backward pre-hook":
        layer.register_full_backward_pre_hook(lambda *_: calls.append(1))
    elif notice == "forward of its own":
        plain = layer.forward
        layer.forward = lambda x: (calls.append(1), plain(x))[1]
    elif notice == "parametrization":
        parametrizations.weight_norm(layer)
        calls.append(1)
    else:

        class Adapted(nn.Conv2d):
            def forward(self, x):
                calls.append(1)
                return super().forward(x)

        layer.__class__ = Adapted
    module.order = "auto"
    got = module(x)
    torch.autograd.grad(got.sum(), x)
    assert calls
    torch.testing.assert_close(got, expected, **EXACT)
    one_sided = {"values": "folded_output", "reprojection": "folded_values"}[projection]
    assert module.planned_order(x) in (one_sided, "linear")
    module.order = "folded"
    with pytest.raises(
        NotImplementedError,
        match=f"order='folded': {projection} cannot be folded into the context: it ",
    ):
        module(x)


@pytest.mark.parametrize(
    "change", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "groups": 2}]
)
def test_a_layer_that_is_not_pointwise_is_not_folded(change):
    module, x = official(), feature_map()
    module.values = nn.Conv2d(6, 8, dtype=torch.float64, **change)
    module.order = "linear"
    expected = module(x)
    module.order = "auto"
    torch.testing.assert_close(module(x), expected, **EXACT)


@pytest.mark.parametrize(
    ("change", "attended"),
    [
        ({"stride": 2}, lambda x: x[..., ::2, ::2]),
        ({"padding": (0, 1)}, lambda x: nn.functional.pad(x, (1, 1))),
    ],
)
@pytest.mark.parametrize("order", ["auto", "linear"])
def test_layers_that_leave_out_or_add_positions_are_called(change, attended, order):
    module, x = official(order=order), feature_map()
    expected = module.attend(x, module.summarize(attended(x)))
    for name, channels in (("keys", 4), ("values", 8)):
        layer = nn.Conv2d(6, channels, kernel_size=1, dtype=torch.float64, **change)
        layer.load_state_dict(getattr(module, name).state_dict())
        setattr(module, name, layer)
        assert obstacle(layer, nn.Conv2d) == "its convolution is not pointwise"
    torch.testing.assert_close(module(x), expected, **EXACT)


def test_layers_may_be_wrapped():
    module, x = official(order="linear"), feature_map()
    expected = module(x)
    module.order = "auto"
    for name in ("keys", "queries", "values", "reprojection"):
        setattr(module, name, nn.Sequential(getattr(module, name)))
    torch.testing.assert_close(module(x), expected, **EXACT)
