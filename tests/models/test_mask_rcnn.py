"""Mask R-CNN: torchvision's to the bit, attention where the paper has it, and pictures that do not see their mates."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.detection import (
    MaskRCNN,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from efficient_attention import create_model, insert, load_checkpoint
from efficient_attention.models.padding import inside

SIZE = {"min_size": 64, "max_size": 96}
SEVEN = ("res3", "res4", "fpn1", "fpn2", "fpn3", "fpn4", "fpn5")


def pictures(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def awake(model):
    """Weights for the reprojections, so that attention shows in the detections."""
    for name, parameter in model.named_parameters():
        if "inserted_attention.reprojection" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def small(**options):
    options = {"num_classes": 4, "box_score_thresh": 0.0, "box_detections_per_img": 20, **options}
    return create_model("mask_rcnn_small", **SIZE, **options).eval()


def targets(images):
    return [
        {
            "boxes": torch.tensor([[2.0, 3.0, 30.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


def assert_close(found, expected):
    """In float64: the same detections in the same order, and rounding."""
    assert torch.equal(found["labels"], expected["labels"])
    for key in ("boxes", "scores", "masks"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-9)


def torchvision_network(name):
    options = {"num_classes": 5, "box_score_thresh": 0.0, "box_detections_per_img": 5, **SIZE}
    if name == "mask_rcnn_resnet50_fpn_v2":
        return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **options)
    if name == "mask_rcnn_resnet50_fpn":
        return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options)
    body = name.removeprefix("mask_rcnn_").removesuffix("_fpn")
    backbone = resnet_fpn_backbone(
        backbone_name=body, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return MaskRCNN(backbone, **options)


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn_resnet50_fpn",
        "mask_rcnn_resnet50_fpn_v2",
        "mask_rcnn_resnet101_fpn",
        "mask_rcnn_resnext101_32x8d_fpn",
    ],
)
@torch.no_grad()
def test_with_new_attention_the_outputs_are_those_of_torchvision_bit_for_bit(name):
    plain = torchvision_network(name).eval()
    # Running statistics other than 0 and 1.
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    model = create_model(
        name, num_classes=5, box_score_thresh=0.0, box_detections_per_img=5, **SIZE
    ).eval()
    new = load_checkpoint(model, plain.state_dict(), allow_missing=["*inserted_attention*"])
    # Seven modules of four projections with weight and bias.
    assert len(new) == 7 * 4 * 2
    assert {key.rpartition(".inserted_attention")[0] for key in new} == {
        model.places[place].module for place in SEVEN
    }
    (image,) = pictures((70, 90))
    assert same(model([image])[0], plain([image])[0])
    mates = pictures((60, 60), (60, 90))
    model.padding = "masked"
    assert all(map(same, model(mates), plain(mates)))


@torch.no_grad()
def test_surgery_on_torchvisions_own_network_leaves_its_outputs_bit_identical():
    plain = torchvision_network("mask_rcnn_resnet50_fpn").eval()
    model = copy.deepcopy(plain)
    report = insert(
        model,
        ["backbone.body.layer2", "backbone.body.layer3", "backbone.fpn.layer_blocks.[0-3]"],
        example=[torch.rand(3, 64, 64)],
        value_channels=64,
        key_channels=64,
    )
    assert [change.channels for change in report.changes] == [512, 1024, 256, 256, 256, 256]
    mates = pictures((60, 60), (60, 90))
    assert all(map(same, model(mates), plain(mates)))


@torch.no_grad()
def test_a_picture_is_detected_alike_alone_and_among_larger_mates():
    model = awake(small()).double()
    image, *mates = (x.double() for x in pictures((50, 40), (60, 90), (64, 64)))
    (alone,) = model([image])
    for batch, position in (([image, *mates], 0), ([*mates, image], 2)):
        assert_close(model(batch)[position], alone)
    assert len(alone["boxes"]) == 20


@pytest.mark.parametrize("padding", ["masked", "visible"])
@torch.no_grad()
def test_without_independence_batch_mates_change_the_detections(padding):
    model = awake(small(padding=padding)).double()
    image, mate = (x.double() for x in pictures((50, 40), (60, 90)))
    (alone,), (found, _) = model([image]), model([image, mate])
    assert (found["scores"] - alone["scores"]).abs().max() > 1e-6


@torch.no_grad()
def test_in_torchvisions_own_network_batch_mates_change_the_detections():
    plain = torchvision_network("mask_rcnn_resnet50_fpn").double().eval()
    image, mate = (x.double() for x in pictures((50, 40), (60, 90)))
    (alone,), (found, _) = plain([image]), plain([image, mate])
    assert (found["scores"] - alone["scores"]).abs().max() > 1e-6


@torch.no_grad()
def test_the_mask_alone_keeps_padding_out_of_attention():
    # One attention on the pixels themselves: what it adds inside the picture does not depend on the padding.
    model = awake(small(padding="masked", at=["fpn1"]))
    attention = model.backbone.fpn.layer_blocks[0].inserted_attention
    seen = []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    image, mate = pictures((50, 40), (60, 90))
    model([image, mate])
    x, y = seen[0]
    sizes = model.transform([image, mate])[0].image_sizes
    height, width = (-(-length // 4) for length in sizes[0])
    expected = attention(x[:1, :, :height, :width])
    torch.testing.assert_close(y[:1, :, :height, :width], expected)
    model.padding = "visible"
    model([image, mate])
    assert (seen[-1][1][:1, :, :height, :width] - expected).abs().max() > 1e-4


def test_the_modules_train_and_so_does_everything_else():
    model = awake(small()).train()
    images = pictures((50, 60), (64, 64))
    losses = model(images, targets(images))
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("layers", [0, 3, 5])
def test_trainable_layers_are_counted_from_the_last(layers):
    model = small(trainable_layers=layers)
    body = model.backbone.body
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    trained = [all(p.requires_grad for p in body[s].parameters() if p.dim() == 4) for s in stages]
    # Attention trains, wherever it is.
    attended = [any(p.requires_grad for p in body[s].parameters()) for s in ("layer2", "layer3")]
    assert trained[5 - layers :] == [True] * layers
    assert attended == [True, True]
    assert body.bn1.weight.requires_grad == (layers == 5)


def test_the_fifth_level_is_sampled_from_the_attended_fourth():
    model = awake(small(at=["fpn4", "fpn5"]))
    model.backbone.fpn.extra_blocks.p6 = nn.Sequential()
    features = model.backbone(torch.rand(1, 3, 64, 64))
    assert torch.equal(features["pool"], features["3"][:, :, ::2, ::2])


@torch.no_grad()
def test_the_backbone_compiles_whole_and_keeps_its_keys():
    model = awake(small()).double()
    batches = [
        [x.double() for x in pictures(*sizes)] for sizes in ([(50, 40), (60, 90)], [(50, 40)])
    ]
    expected, keys = [model(batch) for batch in batches], list(model.state_dict())
    model.backbone.compile(backend="eager", fullgraph=True)
    # With padding, then without: the mask is no constant of the program.
    for batch, results in zip(batches, expected, strict=True):
        for found, result in zip(model(batch), results, strict=True):
            assert_close(found, result)
    assert list(model.state_dict()) == keys


def test_copies_have_hooks_and_attention_of_their_own():
    model = awake(small())
    image, mate = pictures((50, 40), (60, 90))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin([image, mate])
        for parameter in model.parameters():
            parameter.zero_()
        assert all(map(same, twin([image, mate]), expected))


def test_pixels_inside_pictures_are_counted_from_the_top_left():
    mask = inside([(1, 3), (2, 2)], (2, 3), torch.device("cpu"))
    assert mask.tolist() == [
        [[True, True, True], [False, False, False]],
        [[True, True, False], [True, True, False]],
    ]
    assert inside([(2, 3), (2, 3)], (2, 3), torch.device("cpu")) is None


def test_the_body_is_torchvisions_resnext():
    model = create_model("mask_rcnn_resnext101_32x8d_fpn", "none", num_classes=2)
    plain = torchvision_resnet.resnext101_32x8d()
    own = {k: v.shape for k, v in model.backbone.body.state_dict().items()}
    assert own == {k: v.shape for k, v in plain.state_dict().items() if not k.startswith("fc.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "targets must be given for all 1 images to train; got none"),
        (lambda t: t * 2, "for all 1 images to train; got 2"),
        (lambda t: [{}], r"targets\[0\]\['boxes'\] must be a tensor \[N, 4\]; got NoneType"),
        (lambda t: [{"boxes": torch.zeros(4)}], r"must be a tensor \[N, 4\]; got \(4,\)"),
        (
            lambda t: [{"boxes": torch.tensor([[5.0, 5.0, 5.0, 9.0]])}],
            r"must have x1 < x2 and y1 < y2; got \[5.0, 5.0, 5.0, 9.0\]",
        ),
    ],
)
def test_targets_that_cannot_train_are_errors(change, message):
    images = pictures((64, 64))
    with pytest.raises(ValueError, match=message):
        small().train()(images, change(targets(images)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "none"}, "padding must be one of .*got 'none'"),
        ({"trainable_layers": 6}, "trainable_layers must be from 0 to 5; got 6"),
        ({"norm": "layer"}, "norm must be one of .*got 'layer'"),
        ({"body": "resnet50"}, "options of 'mask_rcnn_small' must be among .*got 'body'"),
    ],
)
def test_options_that_do_not_exist_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
