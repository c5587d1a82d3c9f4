"""The demonstration of depth: what it says of a network and a scene is what they are."""

from itertools import pairwise

import pytest
import torch

from efficient_attention import create_model
from efficient_attention.data.generated_stereo import GeneratedStereo
from efficient_attention.demo import depth
from efficient_attention.errors import InputError
from efficient_attention.models.network import Network
from efficient_attention.prediction import predict_disparity

Image = pytest.importorskip("PIL.Image")

# Of the network that ships with the package, in pixels, over all known ones of the real scene.
SHIPPED_ERROR = 2.01


@pytest.fixture
def scene(monkeypatch):
    """A generated pair in the place of the photographs, a fifteenth of which is not known."""
    sample = GeneratedStereo((64, 128), max_disparity=32, seed=5)[0]
    disparity = sample["disparity"].clone()
    disparity[:, ::15] = torch.nan
    pair = depth.Pair(sample["left"], sample["right"], disparity)
    monkeypatch.setattr(depth, "bundled_pair", lambda: pair)
    return pair


@pytest.fixture
def network(tmp_path):
    """A network without training, whose attention sees the same in every position: keys are zero."""
    network = create_model(
        "psmnet_small",
        at={"volume": {"key_channels": 6, "num_heads": 2}},
        max_disparity=32,
        width=4,
    )
    torch.nn.init.zeros_(network.get_submodule("volume.inserted_attention").keys.weight)
    network.save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def test_the_error_is_that_of_the_known_pixels(scene, network, tmp_path):
    lines = []
    path = depth.run(output=tmp_path / "new", network=network, report=lines.append)
    disparity = predict_disparity(Network.from_pretrained(network), scene.left, scene.right)
    error = (disparity - scene.disparity).abs()[scene.disparity.isfinite()]
    report = "\n".join(lines)
    assert f"end-point error {error.mean():.2f} px" in report
    assert f"{100 * (error > 3).double().mean():.1f}% off by more than 3 px" in report
    assert path == tmp_path / "new" / "depth.png"
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_what_is_said_of_attention_follows_from_its_volume(scene, network, tmp_path):
    lines = []
    depth.run(output=tmp_path, network=network, report=lines.append)
    # 32 / 4 disparities, 64 / 4 rows, 128 / 4 columns, and 4 bytes for each pair of them.
    assert any("4,096 positions attend to all" in line for line in lines)
    loaded = Network.from_pretrained(network)
    attention = loaded.get_submodule("volume.inserted_attention")
    attended = depth._attended(loaded, attention, scene)
    assert attended.maps.shape == (6, 16, 32)
    assert attended.maps.flatten() == pytest.approx([1 / (16 * 32)] * (6 * 16 * 32))
    assert attended.shares.view(2, 3).sum(1) == pytest.approx([1, 1])


def test_a_network_without_attention_on_its_volume_is_refused(scene, tmp_path):
    plain = create_model("psmnet_small", "none", max_disparity=32, width=4)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=r"network must have attention on its volume; .*plain"):
        depth.run(output=tmp_path, network=tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def test_the_shipped_network_sees_a_real_scene():
    pair = depth.bundled_pair()
    network = depth.load_network("stereo")
    disparity = predict_disparity(network, pair.left, pair.right)
    known = pair.disparity.isfinite()
    assert known.double().mean() > 0.9
    error = (disparity - pair.disparity).abs()[known]
    # Rounding differs from machine to machine.
    assert error.mean() == pytest.approx(SHIPPED_ERROR, abs=0.05)
    # From the wall to the wheel: what is nearer has a larger disparity.
    ranked = disparity[known][pair.disparity[known].argsort()].chunk(5)
    assert all(near.mean() > far.mean() for far, near in pairwise(ranked))
