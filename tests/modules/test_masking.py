"""One mask for a whole network: every attention takes it at its own resolution, and gives it back."""

import copy

import pytest
import torch
from torch import nn

from efficient_attention import (
    EfficientAttention2d,
    EfficientAttention3d,
    NonLocal2d,
    insert,
    masked,
)
from efficient_attention.modules.features import coarsen


def network(kind=EfficientAttention2d):
    """Attention at strides 1, 2 and 4, between layers that see one pixel at a time."""
    return nn.Sequential(
        kind(4, init="official"),
        nn.MaxPool2d(2, ceil_mode=True),
        kind(4, init="official"),
        nn.MaxPool2d(2, ceil_mode=True),
        kind(4, init="official"),
    ).double()


@pytest.mark.parametrize("kind", [EfficientAttention2d, NonLocal2d])
@pytest.mark.parametrize("extent", [(8, 12), (8, 8), (4, 4)])
def test_padding_of_a_picture_changes_nothing_at_any_resolution(kind, extent):
    model = network(kind)
    picture = torch.randn(1, 4, *extent, dtype=torch.float64)
    batch = torch.randn(2, 4, 16, 12, dtype=torch.float64)
    batch[:1, :, : extent[0], : extent[1]] = picture
    inside = torch.ones(2, 16, 12, dtype=torch.bool)
    inside[0, extent[0] :] = inside[0, :, extent[1] :] = False
    with masked(model, inside):
        y = model(batch)
    alone = model(picture)
    torch.testing.assert_close(
        y[:1, :, : alone.shape[2], : alone.shape[3]], alone, rtol=1e-12, atol=1e-12
    )
    assert (model(batch)[:1, :, : alone.shape[2], : alone.shape[3]] - alone).abs().max() > 1e-3


def test_the_mask_ends_with_the_context_even_after_an_error():
    model = network()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    before = model(x)
    nothing = torch.zeros(1, 8, 8).bool()
    with masked(model, nothing):
        assert not torch.equal(model(x), before)
    with pytest.raises(ValueError, match="must have shape"), masked(model, nothing):
        model(x[:, :2])
    assert torch.equal(model(x), before)


def test_contexts_nest_and_the_inner_mask_counts():
    model = EfficientAttention2d(4, init="official").double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    one, other = torch.rand(2, 1, 4, 4) > 0.5
    with masked(model, one):
        with masked(model, other):
            assert torch.equal(model(x), model(x, key_mask=other))
        assert torch.equal(model(x), model(x, key_mask=one))


def test_a_mask_given_to_the_module_goes_first():
    model = EfficientAttention2d(4, init="official").double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    mask = torch.rand(1, 4, 4) > 0.5
    expected = model(x, key_mask=mask)
    with masked(model, ~mask):
        assert torch.equal(model(x, key_mask=mask), expected)


def test_the_mask_reaches_attention_that_surgery_put_in():
    host = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    insert(host, "0", in_channels=4, dimensions=2, init="official")
    x, mask = torch.randn(1, 3, 6, 6), torch.rand(1, 6, 6) > 0.5
    other = torch.where(mask.unsqueeze(1), x, torch.randn(1, 3, 6, 6))
    with masked(host, mask):
        a, b = host(x), host(other)
    inside = mask.unsqueeze(1).expand_as(a)
    torch.testing.assert_close(a[inside], b[inside])


def test_a_compiled_network_sees_every_mask():
    model = network()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for mask in (torch.rand(2, 8, 8) > 0.5, torch.rand(2, 8, 8) > 0.5, None):
        with masked(model, mask):
            expected = model(x)
        with masked(compiled, mask):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("extent", "size", "valid", "expected"),
    [
        (800, 100, 793, 100),  # stride 8; the last position holds one pixel
        (800, 100, 792, 99),
        (800, 13, 320, 5),  # stride 64, which does not divide 800: not 800 / 13
        (800, 13, 321, 6),
        (27, 9, 7, 3),  # stride 3
        (5, 4, 3, 3),  # no stride: windows [0, 2) [1, 3) [2, 4) [3, 5)
        (2, 4, 1, 2),  # enlarged
    ],
)
def test_a_coarse_position_is_true_if_one_of_its_pixels_is(extent, size, valid, expected):
    mask = torch.arange(extent).unsqueeze(0) < valid
    assert coarsen(mask, (size,)).tolist() == [[i < expected for i in range(size)]]
    plane = coarsen(mask.unsqueeze(1).expand(1, 7, extent), (7, size))
    assert plane.sum().item() == 7 * expected


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(1, 4, 4), TypeError, "key_mask must be a bool tensor .*got torch.float32"),
        ([True], TypeError, "got list"),
        (
            torch.ones(1, 4).bool(),
            ValueError,
            "must have the dimensions of attention.*on .B, C, ....* of 1",
        ),
    ],
)
def test_what_is_no_mask_of_the_network_is_an_error(mask, error, message):
    with pytest.raises(error, match=message), masked(network(), mask):
        pass


def test_attention_of_other_dimensions_is_left_alone():
    model = nn.ModuleList([EfficientAttention2d(4), EfficientAttention3d(4)])
    with masked(model, torch.ones(1, 4, 4).bool()):
        assert model[1].shared_mask is None
        assert model[0].shared_mask is not None
