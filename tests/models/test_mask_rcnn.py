"""Mask R-CNN: torchvision's to the bit, attention where the paper has it, and pictures that do not see their mates."""

import copy
from concurrent.futures import ThreadPoolExecutor

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
from efficient_attention.models.padding import PaddedGroupNorm, inside, zero_outside

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


def small(attention="efficient", **options):
    options = {"num_classes": 4, "box_score_thresh": 0.0, "box_detections_per_img": 20, **options}
    return create_model("mask_rcnn_small", attention, **SIZE, **options).eval()


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


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@pytest.mark.parametrize("sizes", [[(50, 40), (60, 90), (64, 64)], [(30, 64), (31, 65), (20, 100)]])
@torch.no_grad()
def test_a_picture_is_detected_alike_alone_and_among_larger_mates(norm, sizes):
    model = awake(small(norm=norm)).double()
    image, *mates = (x.double() for x in pictures(*sizes))
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


@torch.no_grad()
def test_a_thin_picture_does_not_change_how_later_ones_are_pooled():
    fresh = awake(small()).double()
    used = copy.deepcopy(fresh)
    thin, image = (x.double() for x in pictures((20, 96), (64, 64)))
    used([thin])
    assert_close(used([image])[0], fresh([image])[0])
    assert used.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@torch.no_grad()
def test_a_layer_that_was_exchanged_obeys_too():
    model = awake(small()).double()
    old = model.backbone.body.layer2[0].conv2
    new = nn.Conv2d(128, 128, 3, padding=1, bias=False).double()
    new.weight = old.weight
    model.backbone.body.layer2[0].conv2 = new
    image, mate = (x.double() for x in pictures((50, 40), (60, 90)))
    assert_close(model([image, mate])[0], model([image])[0])


@torch.no_grad()
def test_threads_take_turns():
    model = awake(small()).double()
    batches = [[x.double() for x in pictures((50, 40), s)] for s in ((60, 90), (64, 70))]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for found, results in zip(pool.map(model, batches * 3), expected * 3, strict=True):
            for one, other in zip(found, results, strict=True):
                assert_close(one, other)


@torch.no_grad()
def test_the_pyramid_of_a_picture_is_cut_as_it_would_be_alone():
    model = small("none")
    image, mate = pictures((64, 64), (64, 96))
    batch, _ = model.transform([image, mate])
    features = model.backbone(batch.tensors)
    (_, levels), _ = model._parts(batch, features)
    alone = model.backbone(model.transform([image])[0].tensors)
    assert [f.shape for f in levels.values()] == [f.shape for f in alone.values()]
    assert [f.shape[-1] for f in levels.values()] == [16, 8, 4, 2, 1]


def test_masks_nest_and_end():
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    x = torch.ones(1, 1, 4, 4)
    one, other = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    one[:, :2] = True
    expected = [network(x), network(x * one), network(x * other)]
    with zero_outside(network, one):
        with zero_outside(network, other):
            assert torch.equal(network(x), expected[2])
        assert torch.equal(network(x), expected[1])
    assert torch.equal(network(x), expected[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_of_groups_are_those_of_the_picture(dtype):
    norm = PaddedGroupNorm(2, 4).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 4, 6).to(dtype)
    mask = inside([(2, 4), (4, 6)], (4, 6), torch.device("cpu"))
    with zero_outside(norm, mask):
        y = norm(x)
    assert y.dtype == dtype
    # In bfloat16, scale and shift each round numbers of up to 4 by 2**-9 of their size.
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-6}[dtype]
    for found, expected in ((y[:1, :, :2, :4], norm(x[:1, :, :2, :4])), (y[1:], norm(x[1:]))):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


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
        (lambda t: [{"boxes": t[0]["boxes"]}], r"it lacks \['labels', 'masks'\]"),
        (
            lambda t: [{**t[0], "boxes": torch.tensor([[5.0, 5.0, 5.0, 9.0]])}],
            r"must have x1 < x2 and y1 < y2; got \[5.0, 5.0, 5.0, 9.0\]",
        ),
        (lambda t: [{**t[0], "boxes": torch.tensor([[5.0, 5.0, torch.nan, 9.0]])}], "x1 < x2"),
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


def test_no_pictures_are_an_error():
    with pytest.raises(ValueError, match="images must be a list of pictures"):
        small()([])
