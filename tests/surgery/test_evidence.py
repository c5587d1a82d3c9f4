"""The axis of channels: told by the layers of a place, else by those before and around it, never guessed."""

from functools import partial

import pytest
import torch
from torch import nn

from efficient_attention.surgery import insert
from efficient_attention.surgery.evidence import channel_axis


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Residual(nn.Module):
    """A block of a transformer over grids [B, H, W, C], or of a convolutional network, with a drop path."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.drop_path = layer, nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.layer(x))


class Parallel(nn.Module):
    """Concatenates branches, the last of which has as many channels as the map is wide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1)


class Gate(nn.Module):
    """Channel attention by linear layers, as narrow as the map is wide."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.Linear(hidden, channels))

    def forward(self, x):
        return x * self.layers(x.mean((2, 3)))[..., None, None]


def classifier(*modules, width=7):
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


CONVOLUTION = nn.Conv2d(3, 7, 1)


@pytest.mark.parametrize(
    ("model", "place", "shape", "dimensions", "channels"),
    [
        # What has no layers is as what comes before it,
        (classifier(CONVOLUTION, nn.ReLU()), "1", (1, 3, 8, 9), 2, 7),
        (classifier(CONVOLUTION, nn.ReLU(), nn.MaxPool2d(2)), "2", (1, 3, 8, 9), 2, 7),
        (classifier(CONVOLUTION, nn.ReLU(), nn.Identity()), "2", (1, 3, 7, 7), 2, 7),
        (nn.Sequential(nn.Conv1d(3, 7, 1), nn.ReLU()), "1", (1, 3, 9), 1, 7),
        (nn.Sequential(nn.Linear(3, 7), nn.GELU()), "1", (1, 9, 3), "tokens", 7),
        (nn.Sequential(nn.Linear(3, 7), nn.GELU()), "1", (1, 9, 8, 3), "channels_last", 7),
        (Residual(nn.Linear(6, 6)), "drop_path", (1, 9, 8, 6), "channels_last", 6),
        (Residual(nn.Conv2d(6, 6, 1)), "drop_path", (1, 6, 8, 9), 2, 6),
        # or around it,
        (nn.Sequential(nn.Identity(), nn.Conv2d(6, 7, 1)), "0", (1, 6, 8, 9), 2, 6),
        (nn.Sequential(nn.Identity(), nn.Linear(6, 7)), "0", (1, 9, 8, 6), "channels_last", 6),
        (
            nn.Sequential(nn.Sequential(nn.Identity()), nn.Conv2d(6, 7, 1)),
            "0.0",
            (1, 6, 8, 9),
            2,
            6,
        ),
        # or as the only kind of layers that there is.
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.ReLU()), "2", (1, 3, 4, 5), 2, 2),
        (nn.Sequential(Parallel()), "0", (1, 3, 6, 7), 2, 13),
        # A hidden layer may be as narrow as the map.
        (classifier(CONVOLUTION, Gate(7, 4), nn.ReLU()), "2", (1, 3, 4, 4), 2, 7),
    ],
)
def test_the_axis_of_channels_is_what_nearby_layers_show(model, place, shape, dimensions, channels):
    report = insert(model, place, example=torch.randn(shape))
    assert report.changes[0][2:4] == (dimensions, channels)


@pytest.mark.parametrize(
    ("model", "place", "shape"),
    [
        # Nothing shows it,
        (nn.Sequential(nn.MaxPool2d(2)), "0", (1, 6, 8, 9)),
        (nn.Sequential(nn.Identity(), nn.ReLU()), "1", (1, 8, 9, 6)),
        (nn.Sequential(nn.LayerNorm([6, 8, 9])), "0", (1, 6, 8, 9)),
        # or both axes may be it,
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "1", (1, 6, 6, 6)),
        (Residual(nn.Sequential(nn.Conv2d(6, 6, 1), nn.LayerNorm(6))), "drop_path", (1, 6, 6, 6)),
        # or the last layer has as many channels as the map is wide.
        (nn.Sequential(Parallel()), "0", (1, 3, 6, 8)),
    ],
)
def test_what_nothing_shows_is_asked_for(model, place, shape):
    message = r"layers in it and around it do not show .*Give dimensions= \(or in_channels="
    with pytest.raises(ValueError, match=message):
        insert(model, place, example=torch.randn(shape))
    insert(model, place, example=torch.randn(shape), dimensions=2)


@pytest.mark.parametrize(("channels", "dimensions"), [(6, 2), (9, "channels_last")])
def test_where_nothing_shows_it_the_number_of_channels_does(channels, dimensions):
    x = torch.randn(1, 6, 8, 9)
    report = insert(nn.Sequential(nn.MaxPool2d(1)), "0", example=x, in_channels=channels)
    assert report.changes[0][2:4] == (dimensions, channels)


def test_timms_swin_has_channels_last_in_its_drop_paths_too():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **sizes)
    places = ["layers.0.blocks.0.drop_path1", "layers.1.blocks.1.mlp.act", "layers.0"]
    report = insert(model, places, example=torch.randn(1, 3, 64, 64))
    found = [change[2:4] for change in report.changes]
    assert found == [("channels_last", 24), ("tokens", 192), ("channels_last", 24)]


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "googlenet"])
def test_layers_of_convolutional_networks_have_their_channels_second(name):
    models = pytest.importorskip("torchvision").models
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    kinds = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.BatchNorm2d, nn.AvgPool2d)
    shapes = {}
    with torch.device("meta"):
        model = getattr(models, name)(weights=None, **options).eval()
        for place, module in model.named_modules():
            if isinstance(module, kinds):
                note = partial(lambda place, m, i, out: shapes.update({place: out.shape}), place)
                module.register_forward_hook(note)
        model(torch.randn(1, 3, 96, 80))
    axes = {place: channel_axis(model, place, None, shape) for place, shape in shapes.items()}
    assert {
        place for place, shape in shapes.items() if len(shape) == 4 and axes[place] != 1
    } == set()
