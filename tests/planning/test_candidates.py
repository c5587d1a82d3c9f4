"""Which places are shown by default, and what a caller may name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_attention.planning.candidates import Survey
from efficient_attention.planning.simulation import Twin


def survey(model, example):
    return Survey(model, Twin(model, example))


def names(model, example):
    return [place.name for place in survey(model, example).default()]


def image(size=64):
    return torch.empty(1, 3, size, size, device="meta")


def block(channels, out_channels, stride=1):
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, stride, 1), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode1, self.encode2, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.decode2, self.decode1 = block(48, 16), block(24, 8)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        first = self.encode1(x)
        second = self.encode2(F.max_pool2d(first, 2))
        up = F.interpolate(self.bottom(F.max_pool2d(second, 2)), scale_factor=2)
        up = F.interpolate(self.decode2(torch.cat([up, second], 1)), scale_factor=2)
        return self.head(self.decode1(torch.cat([up, first], 1)))


def test_the_last_block_of_each_stage_stands_for_it():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert names(models.resnet50(), image()) == ["relu", "layer1", "layer2", "layer3", "layer4"]
        vgg = ["features.8", "features.15", "features.22", "features.29", "features"]
        assert names(models.vgg16(), image(224)) == vgg
        convnext = ["features.1", "features.3", "features.5", "features"]
        assert names(models.convnext_tiny(), image()) == convnext


def test_stages_of_a_u_net_are_those_of_both_sides():
    expected = ["encode1", "encode2", "bottom", "decode2", "decode1"]
    assert names(UNet(), image()) == expected


def test_a_wrapper_changes_nothing():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = UNet()

        def forward(self, x):
            return self.inner(x)

    inner = [f"inner.{name}" for name in names(UNet(), image())]
    assert names(Wrapper(), image()) == inner
    assert names(nn.Sequential(Wrapper()), image()) == [f"0.{name}" for name in inner]


class Squeeze(nn.Module):
    """A block that computes at half the size, as those of many networks compute at other channels."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return x + self.up(self.down(x))


def test_blocks_of_a_stage_are_not_looked_into():
    model = nn.Sequential(block(3, 8, 2), nn.Sequential(Squeeze(), Squeeze()), block(8, 8, 2))
    assert names(model, image()) == ["1", "2"]


def test_single_positions_single_channels_and_shared_modules_are_not_shown():
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 1, 1)),
        nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1)),
        relu,
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), relu),
        nn.AdaptiveAvgPool2d(1),
    )
    assert names(model, image()) == ["1", "3"]


def test_attention_that_is_there_and_its_host_are_no_places():
    from efficient_attention import insert

    model = nn.Sequential(block(3, 8), block(8, 8, 2))
    insert(model, "0", example=torch.empty(1, 3, 64, 64))
    assert names(model, image()) == ["1"]


def test_networks_of_this_package_name_their_places():
    models = pytest.importorskip("efficient_attention.models")
    with torch.device("meta"):
        network = models.create_model("psmnet_small", "none")
        pair = torch.empty(2, 1, 3, 64, 128)
    found = survey(network, tuple(pair))
    shown = [place.name for place in found.default()]
    assert shown == [network.places[name].module for name in ("features", "volume")] + [
        f"dres{i}.conv4" for i in (2, 3, 4)
    ]
    assert [place.name for place in found.chosen(["volume"])] == [network.places["volume"].module]


def test_places_tell_positions_channels_and_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = block(3, 8)

        def forward(self, x):
            return self.shared(x), self.shared(x[:, :, ::2])

    (place,) = survey(Twice(), image()).chosen("shared")
    assert (place.dimensions, place.channels, place.positions) == (2, 8, 64 * 64)
    assert place.shapes == ((1, 8, 64, 64), (1, 8, 32, 64))
    assert place.shape == (1, 8, 64, 64)


def test_tokens_and_features_with_channels_last_are_places():
    tokens = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
    (place,) = survey(tokens, torch.empty(2, 50, 8)).chosen("1")
    assert (place.dimensions, place.channels, place.positions) == ("tokens", 16, 50)
    (place,) = survey(tokens, torch.empty(2, 5, 7, 8)).chosen("1")
    assert (place.dimensions, place.channels, place.positions) == ("channels_last", 16, 35)


def test_patterns_and_predicates_pass_over_what_is_no_place():
    found = survey(UNet(), image())
    assert [place.name for place in found.chosen("decode*.0")] == ["decode2.0", "decode1.0"]
    chosen = found.chosen(lambda name, module: name.startswith("bottom"))
    assert [place.name for place in chosen] == ["bottom.0", "bottom.1", "bottom"]
    assert [place.name for place in found.chosen(["head", "bottom"])] == ["bottom", "head"]


class Unclear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3))
        self.dictionary, self.flat, self.idle = Dictionary(), nn.Flatten(), block(3, 8)

    def forward(self, x):
        return self.flat(self.dictionary(self.first(x))["out"])


class Dictionary(nn.Module):
    def forward(self, x):
        return {"out": x}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("dictionary", "must return a tensor.*; got dict"),
        ("flat", "must return"),
        ("idle", "it is not called"),
        ("nothing", "must match modules"),
    ],
)
def test_what_is_named_and_no_place_is_an_error_with_the_reason(place, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        survey(Unclear(), image()).chosen(place)
    assert place in str(caught.value)


def test_what_comes_after_an_early_end_is_told():
    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = block(3, 8), block(8, 8)

        def forward(self, x):
            x = self.first(x)
            return self.last(x[x > 0].view(1, 8, 8, 8))

    found = survey(Ending(), image())
    assert [place.name for place in found.default()] == ["first"]
    reason = "'last' .* not called before the model, where aten.nonzero.default needs values"
    with pytest.raises(ValueError, match=reason):
        found.chosen("last")
