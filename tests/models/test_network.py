"""Networks on disk: a folder has all of a network or none of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

from efficient_attention import create_model, remove
from efficient_attention.models import Network
from efficient_attention.models.resnet import ResNet


def network(**options):
    return create_model("resnet_small", num_classes=3, **options).eval()


def test_every_class_loads_its_own_and_names_another(tmp_path):
    network().save_pretrained(tmp_path)
    assert type(ResNet.from_pretrained(tmp_path)) is ResNet

    class Other(Network):
        pass

    with pytest.raises(TypeError, match="must hold a Other; got a ResNet: use Network"):
        Other.from_pretrained(tmp_path)


def test_the_configuration_is_written_for_people_and_programs(tmp_path):
    network(at=["res3"], attention_options={"num_heads": 2}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "name": "resnet_small",
        "attention": "efficient",
        "at": {"res3": {"num_heads": 2}},
        "num_classes": 3,
    }
    assert "1812.01243" in (tmp_path / "README.md").read_text()


def test_a_failure_while_saving_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    first = network()
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Network, "_save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        network().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_again_replaces_the_weights_and_keeps_what_a_person_wrote(tmp_path):
    network().save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("written with care")
    second = network()
    second.save_pretrained(tmp_path)
    found = Network.from_pretrained(tmp_path)
    assert all(torch.equal(found.state_dict()[k], v) for k, v in second.state_dict().items())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "written with care"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_an_error(missing, tmp_path):
    network().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing.replace(".", r"\.")):
        Network.from_pretrained(tmp_path)


def test_a_network_from_elsewhere_cannot_be_saved(tmp_path):
    from torchvision.models.resnet import BasicBlock

    with pytest.raises(ValueError, match=r"ResNet must come from create_model\(\)"):
        ResNet(BasicBlock, [1, 1, 1, 1]).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_memory_formats_survive_no_trip_but_values_do(tmp_path):
    model = network().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(Network.from_pretrained(tmp_path)(x), model(x))


def test_what_is_uploaded_is_a_whole_network(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, *, folder_path, **options):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **o: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = network()
    model.push_to_hub("somebody/network")
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    found = Network.from_pretrained(tmp_path)
    assert all(torch.equal(found.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_repository_is_downloaded_file_by_file(tmp_path, monkeypatch):
    network().save_pretrained(tmp_path)
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options["revision"]))
        return str(tmp_path / name)

    monkeypatch.setattr("efficient_attention.models.network.hf_hub_download", download)
    Network.from_pretrained("somebody/network", revision="v2")
    assert asked == [
        ("somebody/network", "config.json", "v2"),
        ("somebody/network", "model.safetensors", "v2"),
    ]


@pytest.mark.parametrize("path", ["/absent/folder", "./absent", "~/absent", "a/b/c"])
def test_what_is_no_repository_is_looked_for_on_disk(path):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json and model\.safetensors"):
        Network.from_pretrained(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json must be JSON"),
        ("[]", r"must hold the arguments of create_model\(\); got \[\]"),
        ("{}", "must hold the arguments"),
        ('{"name": "resnet_small", "wide": 2}', "must be among .*got 'wide'"),
    ],
)
def test_a_configuration_that_is_none_is_an_error(text, message, tmp_path):
    network().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Network.from_pretrained(tmp_path)


def test_a_network_that_was_changed_since_cannot_be_saved(tmp_path):
    model = network()
    remove(model)
    with pytest.raises(
        ValueError, match=r"16 keys of its state_dict have changed: layer2\.inserted"
    ):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_comes_back_in_its_dtype(dtype, tmp_path):
    model = network().to(dtype)
    model.save_pretrained(tmp_path)
    found = Network.from_pretrained(tmp_path)
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert all(torch.equal(found.state_dict()[k], v) for k, v in model.state_dict().items())


def test_how_padding_is_treated_is_part_of_the_network(tmp_path):
    model = create_model("mask_rcnn_small", num_classes=2)
    model.padding = "visible"
    model.save_pretrained(tmp_path)
    assert Network.from_pretrained(tmp_path).padding == "visible"
