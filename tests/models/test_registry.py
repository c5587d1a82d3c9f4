"""Networks by name: the table, and what is said about names, places and options that do not exist."""

import importlib

import pytest
import torch

from efficient_attention import NonLocal2d, create_model, list_models
from efficient_attention.modules import EfficientAttention2d


def test_models_are_listed_by_pattern():
    assert list_models("resnet*") == ["resnet50", "resnet101", "resnet_small"]
    assert len(list_models()) == len(set(list_models())) > 8
    assert list_models("vgg*") == []


def inserted(model):
    return {
        name.removesuffix(".inserted_attention"): module
        for name, module in model.named_modules()
        if name.endswith(".inserted_attention")
    }


def test_attention_goes_to_the_places_of_the_paper_by_default():
    modules = inserted(create_model("resnet50"))
    assert {name: module.in_channels for name, module in modules.items()} == {
        "layer2": 512,
        "layer3": 1024,
    }
    assert {type(module) for module in modules.values()} == {EfficientAttention2d}


@pytest.mark.parametrize("at", ["res5", ["res5"], {"res5": {}}])
def test_places_can_be_named_in_every_way(at):
    assert list(inserted(create_model("resnet_small", at=at))) == ["layer4"]


def test_options_of_a_place_go_before_those_of_all():
    modules = inserted(
        create_model(
            "resnet_small",
            "non_local",
            at={"res3": {"num_heads": 4}, "res4": {}},
            attention_options={"num_heads": 2, "normalization": "scaling"},
        )
    )
    assert [m.num_heads for m in modules.values()] == [4, 2]
    assert {m.normalization for m in modules.values()} == {"scaling"}
    assert {type(m) for m in modules.values()} == {NonLocal2d}


def test_the_configuration_builds_the_network_again():
    model = create_model("resnet_small", at=["res2"], num_classes=3, norm="group")
    assert model.configuration == {
        "name": "resnet_small",
        "attention": "efficient",
        "at": {"res2": {}},
        "num_classes": 3,
        "norm": "group",
    }
    twin = create_model(**model.configuration)
    assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet"},
            r"name must be one of list_models\(\), such as \['resnet.*got 'resnet'",
        ),
        (
            {"name": "resnet_small", "attention": "softmax"},
            "attention must be one of .*got 'softmax'",
        ),
        ({"name": "resnet_small", "at": ["res3", "res9"]}, r"at must be among .*got \['res9'\]"),
        (
            {"name": "resnet_small", "classes": 3},
            "options of 'resnet_small' must be among .*'classes'",
        ),
        ({"name": "resnet_small", "body": "resnet50"}, "must be among .*got 'body'"),
        (
            {"name": "resnet_small", "at": {"res3": {"heads": 2}}},
            "options of 'layer2' .*got 'heads'",
        ),
    ],
)
def test_what_does_not_exist_is_an_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch):
    def fail(name, package):
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ImportError, match=r"needs torchvision: pip install 'efficient-attention\[models\]'"
    ):
        create_model("resnet50")


def test_torchvisions_weights_load_into_the_plain_resnet():
    from torchvision.models import resnet50

    plain = resnet50(num_classes=4).eval()
    model = create_model("resnet50", "none", num_classes=4).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
