"""The disparity of a pair is the network's, and scaling it is exact where it can be."""

import pytest
import torch
from torch import nn

from efficient_attention import create_model
from efficient_attention.prediction import predict_disparity
from efficient_attention.prediction.disparities import scaled_size
from efficient_attention.training.colours import normalized

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("psmnet_small", max_disparity=16, width=4).eval()


class Plane(nn.Module):
    """Sees a slanted plane in whatever views: the disparity a + b x + c y at x and y of the whole view."""

    def __init__(self, height, width, a, b, c):
        super().__init__()
        self.plane = (height, width, a, b, c)
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = None

    def forward(self, left, right):
        self.seen = left, right
        height, width, a, b, c = self.plane
        h, w = left.shape[-2:]
        # Where the centres of the small pixels are in the whole view; a disparity shrinks as the width does.
        y = (torch.arange(h) + 0.5) * (height / h) - 0.5
        x = (torch.arange(w) + 0.5) * (width / w) - 0.5
        return ((a + b * x + c * y[:, None]) * (w / width))[None]


def test_disparity_is_what_the_network_computes(network):
    left, right = torch.rand(2, 3, 33, 50)
    with torch.no_grad():
        expected = network(normalized(left[None]), normalized(right[None]))[0]
    disparity = predict_disparity(network, left, right)
    assert torch.equal(disparity, expected)
    assert (disparity.dtype, disparity.shape) == (torch.float32, (33, 50))
    # What is returned is a tensor as any other.
    disparity.requires_grad_().sum().backward()


def test_bytes_are_colours(network):
    left, right = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    expected = predict_disparity(network, left / 255, right / 255)
    assert torch.equal(predict_disparity(network, left, right), expected)


def test_bfloat16_is_another_precision_and_close(network):
    left, right = torch.rand(2, 3, 32, 48)
    exact = predict_disparity(network, left, right)
    close = predict_disparity(network, left, right, dtype=torch.bfloat16)
    assert 0 < (close - exact).abs().mean() < 0.5


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.37])
def test_scaling_leaves_a_plane_as_it_is(scale):
    height, width = 40, 90
    network = Plane(height, width, 30.0, 0.11, -0.07).eval()
    disparity = predict_disparity(network, *torch.rand(2, 3, height, width), scale=scale)
    assert tuple(network.seen[0].shape[2:]) == scaled_size((height, width), scale)
    plane = 30.0 + 0.11 * torch.arange(width) - 0.07 * torch.arange(height)[:, None]
    # Outside the outer centres of small pixels there is nothing to go by.
    edge = 0 if scale == 1 else round(0.5 / scale + 1)
    inside = slice(edge, height - edge), slice(edge, width - edge)
    # Six operations in float32 on numbers below 64.
    torch.testing.assert_close(disparity[inside], plane[inside], rtol=0, atol=64 * 6 * 2**-24)


def test_shrunken_views_are_means_of_all_that_they_cover():
    network = Plane(16, 16, 1.0, 0.0, 0.0).eval()
    # Between the middle rows of every four alone, all would be black.
    rows = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(4)[:, None].expand(3, 16, 16)
    predict_disparity(network, rows, rows, scale=0.25)
    middle = network.seen[0][0, :, 1:-1, 1:-1]
    torch.testing.assert_close(middle, normalized(torch.full((3, 2, 2), 0.5)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scale": 0.0}, r"scale must be in \(0, 1\]; got 0.0"),
        ({"scale": 2.0}, r"scale must be in \(0, 1\]; got 2.0"),
        (
            {"dtype": torch.float16},
            "dtype must be torch.float32 or torch.bfloat16; got torch.float16",
        ),
        ({"right": torch.rand(3, 32, 49)}, r"one shape \[3, H, W\]; got right \(3, 32, 49\)"),
        ({"left": torch.rand(32, 48)}, r"got left \(32, 48\)"),
    ],
)
def test_what_cannot_be_is_told(network, change, expected):
    given = {"left": torch.rand(3, 32, 48), "right": torch.rand(3, 32, 48), **change}
    with pytest.raises(ValueError, match=expected):
        predict_disparity(network, given.pop("left"), given.pop("right"), **given)


def test_network_that_trains_or_predicts_nan_is_told():
    views = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="evaluation mode"):
        predict_disparity(Plane(8, 8, 1.0, 0.0, 0.0), *views)
    with pytest.raises(ValueError, match="finite disparities"):
        predict_disparity(Plane(8, 8, torch.nan, 0.0, 0.0).eval(), *views)
