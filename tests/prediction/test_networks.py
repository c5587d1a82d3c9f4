"""The network of a command: a folder, a file of weights or what is shipped; and the memory that it takes."""

import pytest
import torch

from efficient_attention import create_model
from efficient_attention.errors import InputError
from efficient_attention.memory import peak_bytes
from efficient_attention.prediction import load_network, networks
from efficient_attention.prediction.forward import (
    check_memory,
    find_device,
    forward_bytes,
    pictures_like,
)
from efficient_attention.prediction.networks import digest, shipped_network

pytest.importorskip("torchvision")
SMALL = {"max_disparity": 16, "width": 4}
CPU = torch.device("cpu")


@pytest.fixture
def plain():
    return create_model("psmnet_small", "none", **SMALL)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def test_folder_of_a_network_is_loaded(tmp_path):
    network = create_model("psmnet_small", **SMALL)
    network.save_pretrained(tmp_path / "network")
    loaded = load_network("stereo", tmp_path / "network")
    assert same(network, loaded)
    assert not loaded.training
    assert digest(loaded) == digest(network)


def test_network_in_few_bits_computes_in_float32(tmp_path, plain):
    plain.bfloat16().save_pretrained(tmp_path / "network")
    loaded = load_network("stereo", tmp_path / "network")
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}
    assert same(plain.float(), loaded)


def test_weights_of_data_parallel_training_are_loaded(tmp_path, plain):
    # As the authors of PSMNet publish theirs.
    state = {f"module.{key}": x for key, x in plain.state_dict().items()}
    torch.save({"epoch": 9, "state_dict": state, "train_loss": 0.1}, tmp_path / "a.tar")
    loaded = load_network(
        "stereo",
        model="psmnet_small",
        weights=tmp_path / "a.tar",
        options={**SMALL, "align_corners": True},
    )
    assert same(plain, loaded)
    assert loaded.align_corners
    assert digest(loaded) != digest(plain)


def test_weights_of_a_run_are_loaded_by_their_prefix(tmp_path):
    network = create_model("psmnet_small", **SMALL)
    state = {f"network.{key}": x for key, x in network.state_dict().items()}
    torch.save({"state_dict": {**state, "other.weight": torch.ones(1)}}, tmp_path / "a.ckpt")
    options = {"attention": "efficient", **SMALL}
    given = {"model": "psmnet_small", "weights": tmp_path / "a.ckpt", "prefix": "network."}
    assert same(network, load_network("stereo", **given, options=options))
    with pytest.raises(InputError, match=r"""inserted_attention.*--options '{"attention": "eff"""):
        load_network("stereo", **given, options=SMALL)


def test_digest_tells_weights_and_options_apart(plain):
    before = digest(plain)
    assert before == digest(plain)
    with torch.no_grad():
        plain.classif1[2].weight[0, 0, 0, 0, 0] += 1e-6
    assert digest(plain) != before
    assert digest(plain.bfloat16()) != before


def test_shipped_network_is_taken_if_it_is_there(tmp_path, monkeypatch, plain):
    monkeypatch.setattr(networks, "files", lambda package: tmp_path)
    assert shipped_network("stereo") is None
    with pytest.raises(InputError, match="stereo needs a network: --network FOLDER"):
        load_network("stereo")
    plain.save_pretrained(tmp_path / "weights" / "stereo")
    assert shipped_network("stereo") == tmp_path / "weights" / "stereo"
    assert same(plain, load_network("stereo"))
    with pytest.raises(InputError, match="detect needs a network"):
        load_network("detect")


def test_place_of_what_is_shipped_is_in_the_package():
    import efficient_attention

    assert (
        networks.files("efficient_attention")
        .joinpath("weights")
        .parent.samefile(efficient_attention.__path__[0])
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"network": "nothing"}, "there is no folder 'nothing'"),
        ({"network": "/no/such/folder"}, "got '/no/such/folder': .* must hold config.json"),
        (
            {"network": "a", "model": "b"},
            "one network must be named; got --network a and --model b",
        ),
        ({"model": "psmnet"}, "--model and --weights must be given together; got --model psmnet"),
        ({"weights": "w"}, "must be given together"),
        ({"network": "a", "prefix": "x."}, "--prefix and --options must come with --model"),
        ({"model": "psmnett", "weights": "w"}, "such as .*'psmnet'.*got 'psmnett'"),
        (
            {"model": "psmnet", "weights": "w", "options": {"depth": 1}},
            "must be among .*got 'depth'",
        ),
        ({"model": "psmnet", "weights": "no.pth"}, "checkpoint must be a file; got no.pth"),
    ],
)
def test_network_that_cannot_be_is_told_in_one_line(given, expected):
    with pytest.raises(InputError, match=expected) as caught:
        load_network("stereo", **given)
    assert "\n" not in str(caught.value)


def test_network_for_another_task_is_told(tmp_path, plain):
    plain.save_pretrained(tmp_path / "network")
    with pytest.raises(InputError, match=r"classify needs a ResNet .* got a PSMNet from"):
        load_network("classify", tmp_path / "network")


def test_damaged_weights_are_told(tmp_path, plain):
    plain.save_pretrained(tmp_path / "network")
    weights = tmp_path / "network" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="--network must be one that can be loaded"):
        load_network("stereo", tmp_path / "network")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_memory_is_what_a_run_takes(dtype):
    network = create_model("psmnet_small", max_disparity=32).eval()
    size = (96, 160)
    views = torch.rand(2, 1, 3, *size)
    standing = sum(x.nbytes for x in (*network.parameters(), views))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        measured = standing + peak_bytes(lambda: network(*views))
    planned = forward_bytes(network, pictures_like(size, size), dtype=dtype, device=CPU)
    # Not below what it takes by more than a tenth, nor far above it.
    assert 0.9 * measured < planned < 1.3 * measured


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    network = create_model("psmnet_small", **SMALL).eval()
    options = {"dtype": torch.float32, "device": CPU, "what": "a pair"}
    shares = []

    def way_out(share):
        shares.append(share)
        return "less"

    check_memory(network, pictures_like((64, 64), (64, 64)), **options, way_out=way_out)
    assert not shares
    monkeypatch.setattr("efficient_attention.prediction.forward.available_bytes", lambda _: 2**30)
    expected = r"a pair takes [\d.]+ GiB in float32, and cpu has 1.0 GiB left; take less"
    with pytest.raises(InputError, match=expected):
        check_memory(network, pictures_like((4096, 4096), (4096, 4096)), **options, way_out=way_out)
    assert 0 < shares[0] < 1


def test_device_that_is_not_there_is_told():
    assert find_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="--device must be one that is there; got 'gpu'"):
        find_device("gpu")
    with pytest.raises(InputError, match="one that computes; got 'meta'"):
        find_device("meta")
