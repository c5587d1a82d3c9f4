"""What every network here promises, whichever it is: one contract, all builders."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from efficient_attention import create_model, list_models, load_checkpoint
from efficient_attention.models.network import Network

# By family: options that make a network small enough for a test.
OPTIONS = {
    "resnet": {"num_classes": 5},
    "mask_rcnn": {
        "num_classes": 5,
        "norm": "group",
        "min_size": 64,
        "max_size": 96,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 4,
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
    },
    # Batch normalization without statistics as yet would let scores grow until the softmax is a step.
    "psmnet": {"max_disparity": 16, "norm": "group"},
}


def family(name):
    return next(family for family in OPTIONS if name.startswith(family))


def build(name, attention="efficient", **options):
    torch.manual_seed(0)
    return create_model(name, attention, **OPTIONS[family(name)], **options)


def inputs(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 96, generator=generator).to(dtype)
    if name.startswith("mask_rcnn"):
        return (list(images),)
    return (images, images.roll(2, -1)) if name.startswith("psmnet") else (images,)


def loss(name, model):
    """A number that everything in the network has a part in."""
    if name.startswith("mask_rcnn"):
        target = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 96, dtype=torch.uint8),
        }
        return sum(model(*inputs(name), [target, target]).values())
    return sum((y * torch.randn_like(y)).sum() for y in tree_leaves(model(*inputs(name))))


def awake(model):
    for name, parameter in model.named_parameters():
        if "inserted_attention.reprojection" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="module", params=list_models())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def network(name):
    """In evaluation mode; not to be changed."""
    return awake(build(name)).eval()


@pytest.fixture(scope="module")
def expected(name, network):
    return outputs(network, name)


@torch.no_grad()
def outputs(model, name, dtype=torch.float32):
    return tree_leaves(model(*inputs(name, dtype)))


def equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_outputs_have_the_form_of_the_task(name, network):
    with torch.no_grad():
        found = network(*inputs(name))
    if name.startswith("mask_rcnn"):
        assert [set(d) for d in found] == [{"boxes", "labels", "scores", "masks"}] * 2
        assert [d["masks"].shape for d in found] == [(4, 1, 64, 96)] * 2
        assert [d["boxes"].shape for d in found] == [(4, 4)] * 2
    else:
        assert found.shape == ((2, 64, 96) if name.startswith("psmnet") else (2, 5))
    assert all(y.isfinite().all() for y in tree_leaves(found))


def test_double_precision_in_is_double_precision_out(name, network, expected):
    wide = outputs(copy.deepcopy(network).double(), name, torch.float64)
    assert {y.dtype for y in wide} <= {torch.float64, torch.int64}
    if not name.startswith("mask_rcnn"):  # whose detections are picked by rank
        for y, narrow in zip(wide, expected, strict=True):
            torch.testing.assert_close(narrow.double(), y, rtol=1e-3, atol=1e-3)


def test_every_parameter_gets_a_gradient(name):
    model = awake(build(name)).train()
    loss(name, model).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    # Not one gradient may be lost, nor be nothing but zeros; key biases have no effect under softmax keys.
    idle = [
        n
        for n, p in model.named_parameters()
        if p.grad is not None and not p.grad.any() and not n.endswith("keys.bias")
    ]
    assert (missing, idle) == ([], [])


def test_networks_are_born_in_training_mode(name):
    assert all(module.training for module in build(name, "none").modules())


def test_new_attention_changes_no_output(name):
    plain, model = build(name, "none").eval(), build(name).eval()
    new = load_checkpoint(model, plain.state_dict(), allow_missing=["*inserted_attention*"])
    assert set(model.state_dict()) == set(plain.state_dict()) | set(new)
    assert len(new) == 8 * len(model.paper_places)
    assert equal(outputs(model, name), outputs(plain, name))


def test_attention_that_was_trained_changes_the_outputs(name, network, expected):
    asleep = copy.deepcopy(network)
    for key, parameter in asleep.named_parameters():
        if "inserted_attention.reprojection" in key:
            nn.init.zeros_(parameter)
    assert not equal(outputs(asleep, name), expected)


def test_the_baseline_has_the_same_parameters(name, network, expected):
    other = build(name, "non_local").eval()
    load_checkpoint(other, network.state_dict())
    assert not equal(outputs(other, name), expected)


def test_every_named_place_takes_attention(name):
    model = build(name, at=list(build(name, "none").places), attention_options={"num_heads": 2})
    assert all(y.isfinite().all() for y in outputs(model.eval(), name))
    for place in model.places.values():
        assert hasattr(model.get_submodule(place.module), "inserted_attention")


def test_the_network_compiles_whole(name, network):
    model = copy.deepcopy(network).double()
    eager = outputs(model, name, torch.float64)
    # A detector's shapes depend on what it detects: its backbone compiles.
    part = model.backbone if name.startswith("mask_rcnn") else model
    part.compile(backend="eager", fullgraph=True)
    for y, reference in zip(outputs(model, name, torch.float64), eager, strict=True):
        torch.testing.assert_close(y, reference, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == network.state_dict().keys()


def test_copies_and_pickles_compute_the_same(name, network, expected):
    assert equal(outputs(copy.deepcopy(network), name), expected)
    assert equal(outputs(pickle.loads(pickle.dumps(network)), name), expected)


def test_a_folder_holds_the_whole_network(name, network, expected, tmp_path):
    network.save_pretrained(tmp_path / "network")
    assert {path.name for path in (tmp_path / "network").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    found = Network.from_pretrained(tmp_path / "network")
    assert type(found) is type(network)
    assert found.configuration == network.configuration
    assert equal(outputs(found, name), expected)
