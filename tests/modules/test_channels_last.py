"""Features with channels last: the same map as with channels second, and as on tokens."""

import pytest
import torch

import efficient_attention as ea
from efficient_attention import EfficientAttentionChannelsLast
from efficient_attention.modules.projected import MODULE_ORDERS


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("order", MODULE_ORDERS)
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_it_is_the_module_on_feature_maps_with_its_axes_moved(spatial, order, normalization):
    options = {"num_heads": 2, "normalization": normalization, "init": "official", "order": order}
    last = EfficientAttentionChannelsLast(8, 4, 6, **options).double()
    kind = (ea.EfficientAttention1d, ea.EfficientAttention2d, ea.EfficientAttention3d)
    second = kind[len(spatial) - 1](8, 4, 6, **options).double()
    state = last.state_dict()
    ones = (1,) * len(spatial)
    second.load_state_dict({k: v.reshape(second.state_dict()[k].shape) for k, v in state.items()})
    assert state["keys.weight"].shape + ones == second.keys.weight.shape
    x = torch.randn(2, *spatial, 8, dtype=torch.float64)
    mask = torch.rand(2, *spatial) > 0.4
    for key_mask in (None, mask):
        expected = second(x.movedim(-1, 1), key_mask=key_mask).movedim(1, -1)
        got = last(x, key_mask=key_mask)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_zero_initialization_is_the_identity():
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(EfficientAttentionChannelsLast(8)(x), x)


def test_a_mask_for_the_whole_network_hides_padding():
    module = EfficientAttentionChannelsLast(8, init="official").double()
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    inside = torch.ones(2, 16, 12, dtype=torch.bool)
    inside[1, 8:] = False
    with ea.masked(module, inside):
        y = module(x)
        torch.testing.assert_close(module(x[:, 0]), module(x[:, 0], key_mask=inside[:, 0, :6]))
    torch.testing.assert_close(y[1, :4], module(x[1:, :4])[0], rtol=1e-12, atol=1e-12)


def test_the_order_is_planned_for_all_positions():
    module = EfficientAttentionChannelsLast(8, init="official")
    assert module.planned_order(torch.randn(1, 2, 2, 8)) == "quadratic"
    assert module.planned_order(torch.randn(1, 2, 50, 8)) == module.planned_order(
        torch.randn(1, 100, 8)
    )


def test_contexts_of_tiles_merge():
    module = EfficientAttentionChannelsLast(8, init="official").double()
    x = torch.randn(1, 6, 10, 8, dtype=torch.float64)
    tiles = x.split(4, dim=2)
    whole = torch.cat(list(ea.attend_tiles(module, tiles)), 2)
    torch.testing.assert_close(whole, module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (
            torch.randn(2, 8, 5, 6),
            None,
            ValueError,
            r"\[B, ..., C\] with C = 8; got \(2, 8, 5, 6\)",
        ),
        (torch.randn(2, 8), None, ValueError, r"x must have shape \[B, ..., C\]"),
        (None, None, TypeError, r"x must be a tensor \[B, ..., C\]; got NoneType"),
        (torch.randn(2, 5, 6, 8), torch.ones(2, 5) > 0, ValueError, r"key_mask must have shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, mask, error, message):
    with pytest.raises(error, match=message):
        EfficientAttentionChannelsLast(8)(x, key_mask=mask)
