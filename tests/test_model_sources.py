"""Models and inputs by the names of a command line, without memory; and `plan` on them."""

import json

import pytest
import torch
from torch import nn

from efficient_attention.cli import main
from efficient_attention.errors import InputError
from efficient_attention.model_sources import find_model, make_inputs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet_small", "ResNet"),
        ("timm:resnet10t", "ResNet"),
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:maskrcnn_resnet50_fpn", "MaskRCNN"),
        ("torchvision.models:resnet.resnet18", "ResNet"),
    ],
)
def test_models_of_all_sources_are_found_and_have_no_memory(name, kind):
    model = find_model(name)
    assert type(model).__name__ == kind
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "got 'resnet51': LookupError: 'resnet51' is not among mask_rcnn"),
        ("timm:resnet51", "got 'timm:resnet51': RuntimeError"),
        ("absent_package:build", "ModuleNotFoundError: No module named 'absent_package'"),
        ("torch:ones", "got 'torch:ones': TypeError"),
        ("builtins:list", "MODEL must make an nn.Module; 'builtins:list' makes a list"),
    ],
)
def test_what_is_no_model_is_an_error_that_names_it(name, message):
    with pytest.raises(InputError, match=message):
        find_model(name)


def test_inputs_have_shapes_and_dtypes_and_detectors_get_pictures():
    image, tokens = make_inputs(nn.Identity(), ["2x3x8x9", "1x77:int64"])
    assert (image.shape, image.dtype, image.device.type) == ((2, 3, 8, 9), torch.float32, "meta")
    assert (tokens.shape, tokens.dtype) == ((1, 77), torch.int64)
    (pictures,) = make_inputs(find_model("mask_rcnn_small"), ["2x3x8x9"])
    assert [picture.shape for picture in pictures] == [(3, 8, 9)] * 2


@pytest.mark.parametrize("shape", ["3x", "x3", "3,4", "1x3:float99", "", "1x3:nn"])
def test_what_is_no_shape_is_an_error(shape):
    with pytest.raises(InputError, match="--input must be a shape such as"):
        make_inputs(nn.Identity(), [shape])


def test_the_command_prints_the_plan(capsys):
    arguments = ["plan", "resnet_small", "--input", "1x3x64x64", "--places", "layer1"]
    assert main([*arguments, "--budget", "1 GiB"]) == 0
    printed = capsys.readouterr().out
    assert "layer1: 1 x 64 x 16 x 16, 256 positions of 64 channels" in printed
    assert "fits 1.00 GiB" in printed
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["places"][0]["positions"] == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "1x4x64x64"}, "model must run on input"),
        ({"--budget": "much"}, "budget must be a positive size"),
        ({"--places": "layer9"}, "'layer9'"),
        ({"--input": "wide"}, "--input must be a shape"),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be(change, message, capsys):
    options = {"--input": "1x3x64x64", "--places": "layer1", **change}
    assert main(["plan", "resnet_small", *(x for pair in options.items() for x in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
