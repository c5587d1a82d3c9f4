"""Surgery on networks that people have."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficient_attention as ea
from efficient_attention.surgery import insert, replace


def test_resnet50_takes_attention_after_a_stage():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50(weights=None).eval()
    x = torch.rand(1, 3, 64, 64)
    keys, before = set(model.state_dict()), model(x)
    report = insert(model, {"layer2": {}, "layer3.5": {"num_heads": 4}}, example=x)
    assert [c.channels for c in report.changes] == [512, 1024]
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) - keys == set(report.new_keys)


def test_mask_rcnn_takes_attention_in_its_body_and_its_pyramid():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=5,
    ).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 60)]
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(images)
    report = insert(
        model, {"backbone.body.layer2": {}, "backbone.fpn.layer_blocks.[0-9]": {}}, example=images
    )
    assert [c[2:4] for c in report.changes] == [(2, 512)] + [(2, 256)] * 4
    assert set(model.state_dict()) - keys == set(report.new_keys)
    with torch.no_grad():
        after = model(images)
    assert sum(len(picture["boxes"]) for picture in before) > 0
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    with pytest.raises(TypeError, match="got OrderedDict of"):
        insert(model, "backbone.fpn", example=images)


def timm_resnet():
    return pytest.importorskip("timm").create_model("resnet18")


def timm_convnext():
    return pytest.importorskip("timm").create_model("convnext_atto")


def timm_vit(depth=3, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth, **options)


def timm_swin():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **sizes)


def torchvision_swin():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [3, 3], [4, 4])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("make", "places", "layout"),
    [
        (timm_resnet, ["layer2", "layer3.0"], [(2, 128), (2, 256)]),
        (timm_convnext, ["stages.1", "stages.2.blocks.0"], [(2, 80), (2, 160)]),
        (timm_vit, ["blocks.1", "blocks.2.mlp"], [("tokens", 192)] * 2),
        (timm_swin, ["layers.[01]"], [("channels_last", 24), ("channels_last", 48)]),
        (torchvision_swin, ["features.[13]"], [("channels_last", 24), ("channels_last", 48)]),
    ],
)
def test_networks_take_attention_and_compute_what_they_did(make, places, layout, mode):
    model, x = make().train(mode == "train"), torch.rand(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    report = insert(model, places, example=x)
    assert [change[2:4] for change in report.changes] == layout
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)
    missing, unexpected = model.load_state_dict(make().state_dict(), strict=False)
    assert (set(missing), unexpected) == (set(report.new_keys), [])
    for name, parameter in model.named_parameters():
        if "reprojection" in name:
            nn.init.normal_(parameter)
    assert not torch.equal(model(x), plain(x))


# A vision transformer, by replacement.


def plain_attention(attention, x):
    """The paper's equations with the weights of a vision transformer's attention."""
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    )
    y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    return F.linear(y.transpose(1, 2).flatten(2), attention.proj.weight, attention.proj.bias)


def test_a_vision_transformer_computes_the_papers_equations_with_its_own_weights():
    model, x = timm_vit().double().eval(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    expected = copy.deepcopy(model)
    for block in expected.blocks:
        block.attn.forward = partial(_called, block.attn)
    keys = list(model.state_dict())
    report = replace(model, "blocks.*.attn")
    assert [change.name for change in report.changes] == [f"blocks.{i}.attn" for i in range(3)]
    assert {change.outputs for change in report.changes} == {"approximate"}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)


def _called(attention, x, attn_mask=None, is_causal=False):
    assert attn_mask is None
    assert not is_causal
    return plain_attention(attention, x)


def test_a_vision_transformer_is_built_with_our_attention_and_takes_its_checkpoint():
    plain, model = timm_vit(), timm_vit(attn_layer=ea.ViTEfficientAttention)
    assert all(isinstance(block.attn, ea.ViTEfficientAttention) for block in model.blocks)
    model.load_state_dict(plain.state_dict())
    replace(plain, "blocks.*.attn")
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_vision_transformers_attention_and_its_parts_stay_in_their_own_modes(training):
    model = timm_vit(depth=1).train(training)
    model.blocks[0].attn.proj_drop.train(not training)
    replace(model, "blocks.0.attn")
    assert model.blocks[0].attn.training == training
    assert model.blocks[0].attn.proj_drop.training != training


def test_pictures_of_several_sizes_do_not_see_their_padding():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    model = timm.create_model("naflexvit_base_patch16_gap", use_key_only_attn_mask=True, **sizes)
    model.eval()
    replace(model, "*.attn")
    patches = torch.rand(2, 9, 3 * 16 * 16)
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(3)) * valid.unsqueeze(-1)
    together = model({"patches": patches, "patch_coord": coordinates, "patch_valid": valid})
    alone = {"patches": patches[1:, :6], "patch_coord": coordinates[1:, :6]}
    alone["patch_valid"] = valid[1:, :6]
    torch.testing.assert_close(together[1:], model(alone))


def test_a_vision_transformer_compiles_exports_and_is_copied_after_replacement():
    model, x = timm_vit(depth=1).eval(), torch.rand(2, 3, 64, 64)
    replace(model, "blocks.*.attn")
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
