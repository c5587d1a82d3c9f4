"""EA-PSMNet: the authors' state_dict, the paper's equations over it, views of any size, attention on the volume."""

import hashlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_attention import EfficientAttention3d, create_model, insert, load_checkpoint
from efficient_attention.memory import peak_bytes
from efficient_attention.models.psmnet import PSMNet, psmnet_small
from efficient_attention.ops.planner import module_costs

EXACT = {"rtol": 1e-9, "atol": 1e-9}
HEADS = ("stacked_hourglass", "basic")
# Of the lines "key shape" of the state_dicts of the authors' networks, sorted: SHA-256.
DIGESTS = {
    "stacked_hourglass": "e18a97d54d076774cfb338c5fd842d0a11d59d8381415a119a5acfa168963746",
    "basic": "b55327a1b1a40dae57ca0c8c8aef678d5de3889fde73fa86194345f8de477dbe",
}
# Entries of the state_dict, parameters, and the parameters of parts.
COUNTS = {"stacked_hourglass": (514, 5_224_768), "basic": (428, 3_672_896)}
PARTS = {
    "stacked_hourglass": {
        "feature_extraction": 3_339_552,
        "dres0": 83_072,
        "dres1": 55_424,
        **dict.fromkeys(("dres2", "dres3", "dres4"), 553_664),
        **dict.fromkeys(("classif1", "classif2", "classif3"), 28_576),
        "volume": 0,
    },
    "basic": {
        "feature_extraction": 3_339_552,
        "dres0": 83_072,
        **dict.fromkeys(("dres1", "dres2", "dres3", "dres4"), 55_424),
        "classify": 28_576,
        "volume": 0,
    },
}
SHAPES = {
    "feature_extraction.firstconv.0.0.weight": (32, 3, 3, 3),
    "feature_extraction.layer2.15.conv2.1.running_var": (64,),
    "feature_extraction.layer3.0.downsample.0.weight": (128, 64, 1, 1),
    "feature_extraction.branch4.1.0.weight": (32, 128, 1, 1),
    "feature_extraction.lastconv.2.weight": (32, 128, 1, 1),
    "dres0.0.0.weight": (32, 64, 3, 3, 3),
    "dres2.conv2.0.weight": (64, 64, 3, 3, 3),
    "dres4.conv6.0.weight": (64, 32, 3, 3, 3),
    "dres4.conv6.1.num_batches_tracked": (),
    "classif3.2.weight": (1, 32, 3, 3, 3),
}


def tiny(head="stacked_hourglass", **options):
    """Of four channels and double precision, with statistics as of a network that was trained."""
    options = {"max_disparity": 32, "width": 4, **options}
    network = PSMNet(head=head, **options).double()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network.eval()


def views(batch=1, height=48, width=64, dtype=torch.float64):
    return torch.randn(2, batch, 3, height, width, dtype=dtype)


def awake(network):
    """With attention that does something."""
    for name, parameter in network.named_parameters():
        if "inserted_attention" in name:
            nn.init.normal_(parameter, std=0.1)
    return network


class Equations:
    """The network of Chang and Chen as functions of the authors' state_dict, in evaluation."""

    def __init__(self, state, disparities, align_corners):
        self.state, self.disparities, self.align_corners = state, disparities, align_corners

    def unit(self, name, x, convolve=None, **options):
        weight = self.state[f"{name}.0.weight"]
        convolve = convolve or (F.conv2d if weight.ndim == 4 else F.conv3d)
        mean, var, scale, shift = (
            self.state[f"{name}.1.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(convolve(x, weight, **options), mean, var, scale, shift)

    def block(self, name, x, stride, dilation):
        window = {"padding": dilation, "dilation": dilation}
        y = self.unit(f"{name}.conv1.0", x, stride=stride, **window).relu()
        y = self.unit(f"{name}.conv2", y, **window)
        projected = f"{name}.downsample.0.weight" in self.state
        return y + (self.unit(f"{name}.downsample", x, stride=stride) if projected else x)

    def features(self, x):
        name = "feature_extraction"
        for index, stride in ((0, 2), (2, 1), (4, 1)):
            x = self.unit(f"{name}.firstconv.{index}", x, stride=stride, padding=1).relu()
        parts = []
        for layer, blocks, stride, dilation in (
            (1, 3, 1, 1),
            (2, 16, 2, 1),
            (3, 3, 1, 1),
            (4, 3, 1, 2),
        ):
            for index in range(blocks):
                x = self.block(f"{name}.layer{layer}.{index}", x, 1 if index else stride, dilation)
            parts += [x] if layer in (2, 4) else []
        for branch, side in ((4, 8), (3, 16), (2, 32), (1, 64)):
            means = F.avg_pool2d(x, (min(side, x.shape[2]), min(side, x.shape[3])))
            means = self.unit(f"{name}.branch{branch}.1", means).relu()
            size, corners = x.shape[2:], self.align_corners
            parts.append(F.interpolate(means, size, mode="bilinear", align_corners=corners))
        x = self.unit(f"{name}.lastconv.0", torch.cat(parts, 1), padding=1).relu()
        return F.conv2d(x, self.state[f"{name}.lastconv.2.weight"])

    def pair(self, name, x):
        return self.unit(f"{name}.2", self.unit(f"{name}.0", x, padding=1).relu(), padding=1)

    def hourglass(self, name, x, presqu, postsqu):
        twice = {"convolve": F.conv_transpose3d, "stride": 2, "padding": 1, "output_padding": 1}
        pre = self.unit(f"{name}.conv1.0", x, stride=2, padding=1).relu()
        pre = (self.unit(f"{name}.conv2", pre, padding=1) + postsqu).relu()
        y = self.unit(f"{name}.conv3.0", pre, stride=2, padding=1).relu()
        y = self.unit(f"{name}.conv4.0", y, padding=1).relu()
        post = self.unit(f"{name}.conv5", y, **twice)
        post = (post + (pre if presqu is None else presqu)).relu()
        return self.unit(f"{name}.conv6", post, **twice), pre, post

    def classified(self, name, x):
        x = self.unit(f"{name}.0", x, padding=1).relu()
        return F.conv3d(x, self.state[f"{name}.2.weight"], padding=1)

    def scores(self, left, right):
        left, right = self.features(left), self.features(right)
        zero = left.new_zeros(*left.shape[:3], self.disparities // 4)
        levels = [
            torch.cat(
                [
                    torch.cat([zero[..., :d], left[..., d:]], 3),
                    torch.cat([zero[..., :d], right], 3)[..., : right.shape[3]],
                ],
                1,
            )
            for d in range(self.disparities // 4)
        ]
        x = self.pair("dres0", torch.stack(levels, 2)).relu()
        x = self.pair("dres1", x) + x
        if "classify.2.weight" in self.state:
            for name in ("dres2", "dres3", "dres4"):
                x = self.pair(name, x) + x
            return [self.classified("classify", x)]
        out1, pre1, post1 = self.hourglass("dres2", x, None, 0)
        out2, _, post2 = self.hourglass("dres3", out1 + x, pre1, post1)
        out3, _, _ = self.hourglass("dres4", out2 + x, pre1, post2)
        score1 = self.classified("classif1", out1 + x)
        score2 = self.classified("classif2", out2 + x) + score1
        return [score1, score2, self.classified("classif3", out3 + x) + score2]

    def __call__(self, left, right):
        size = (self.disparities, *left.shape[2:])
        options = {"mode": "trilinear", "align_corners": self.align_corners}
        pixels = torch.arange(self.disparities, dtype=left.dtype)
        volumes = [F.interpolate(s, size, **options)[:, 0] for s in self.scores(left, right)]
        return [torch.einsum("bdyx,d->byx", volume.softmax(1), pixels) for volume in volumes]


@pytest.mark.parametrize("head", HEADS)
def test_the_state_dict_is_the_authors_in_names_and_shapes(head):
    network = PSMNet(head=head)
    state = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    lines = "\n".join(f"{key} {shape}" for key, shape in sorted(state.items()))
    parameters = sum(p.numel() for p in network.parameters())
    assert (len(state), parameters) == COUNTS[head]
    parts = {n: sum(p.numel() for p in part.parameters()) for n, part in network.named_children()}
    assert parts == PARTS[head]
    if head == "stacked_hourglass":
        assert {key: state[key] for key in SHAPES} == SHAPES
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGESTS[head]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_the_network_is_the_equations_over_its_state_dict(head, align_corners):
    network = tiny(head, align_corners=align_corners)
    # At a quarter, 16 x 72: pooled by 8, 16, 32 and 64 to 2 x 9, 1 x 4, 1 x 2 and one.
    left, right = views(height=64, width=288)
    with torch.no_grad():
        expected = Equations(network.state_dict(), 32, align_corners)(left, right)
        found = network(left, right)
        torch.testing.assert_close(found, expected[-1], **EXACT)
        for module in network.modules():
            module.training = not isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
        found = network(left, right)
    assert len(found) == len(network.loss_weights) == len(expected)
    torch.testing.assert_close(list(found), expected, **EXACT)


def test_views_of_any_size_are_padded_at_the_top_and_right():
    network = tiny()
    left, right = views(height=37, width=61)
    padded = [F.pad(view, (0, 3, 11, 0)) for view in (left, right)]
    assert torch.equal(network(left, right), network(*padded)[:, 11:, :61])
    network.train()
    for module in network.modules():
        module.training = not isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
    for cropped, whole in zip(network(left, right), network(*padded), strict=True):
        assert torch.equal(cropped, whole[:, 11:, :61])


@pytest.mark.parametrize("size", [(1, 1), (5, 130), (16, 16), (33, 20)])
def test_views_may_be_smaller_than_the_pools_and_the_disparities(size):
    disparity = tiny(max_disparity=64)(*views(2, *size))
    assert disparity.shape == (2, *size)
    assert ((disparity >= 0) & (disparity <= 63)).all()


def test_pools_of_large_maps_have_their_size():
    (pool, *_), x = tiny().feature_extraction.branch1, torch.randn(1, 1, 130, 70)
    expected = torch.stack([x[..., :64, :64].mean(), x[..., 64:128, :64].mean()])
    torch.testing.assert_close(pool(x).flatten(), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_new_attention_at_every_place_changes_no_bit_in_training_or_evaluation(head, norm):
    options = {"head": head, "norm": norm, "width": 4, "max_disparity": 32}
    plain = create_model("psmnet_small", "none", **options)
    everywhere = list(plain.places)
    attentive = create_model("psmnet_small", at=everywhere, **options)
    load_checkpoint(attentive, plain.state_dict(), allow_missing=["*inserted_attention*"])
    left, right = views(2, 40, 64, torch.float32)
    for mode in (True, False):
        results = [list(network.train(mode)(left, right)) for network in (plain, attentive)]
        assert all(map(torch.equal, *results))
    changed = awake(attentive)(left, right)
    assert not torch.equal(changed, results[0][0])


@pytest.mark.parametrize("head", HEADS)
def test_places_are_what_they_say(head):
    network = tiny(head)
    declared = {place.module: place[1:] for place in network.places.values()}
    report = insert(network, list(declared), example=tuple(views()))
    assert {c.name: (c.dimensions, c.channels) for c in report.changes} == declared
    assert network.paper_places == ("volume",)


def test_attention_sees_the_volume_behind_the_residual_sum():
    network, seen = tiny(), {}
    for name in ("dres0", "dres1", "volume"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, y, name=name: seen.update({name: y.clone()})
        )
    network(*views())
    assert torch.equal(seen["volume"], seen["dres1"] + seen["dres0"])
    assert seen["volume"].shape == (1, 4, 32 // 4, 48 // 4, 64 // 4)


def test_ea_psmnet_has_the_papers_module_at_the_volume():
    with torch.device("meta"):
        network = create_model("psmnet")
    attention = network.volume.inserted_attention
    assert isinstance(attention, EfficientAttention3d)
    assert sum(p.numel() for p in attention.parameters()) == 3_168
    assert sum(p.numel() for p in network.parameters()) == 5_224_768 + 3_168
    shape = network.eval()(*torch.empty(2, 1, 3, 270, 500, device="meta")).shape
    assert shape == (1, 270, 500)


def test_attention_over_a_full_volume_trains_in_little_memory():
    # The volume of 256 x 512 views with 192 disparities: 393,216 positions, 48 MiB.
    attention = awake(nn.ModuleDict({"inserted_attention": EfficientAttention3d(32)}))
    volume = torch.randn(1, 32, 48, 64, 128, requires_grad=True)
    peak = peak_bytes(lambda: attention["inserted_attention"](volume).sum().backward())
    positions = volume[0, 0].numel()
    assert peak < 6 * volume.numel() * 4
    # The map of a non-local block over as many positions: 576 GiB.
    explicit = positions * positions * 4
    assert explicit == 576 * 2**30
    costs = module_costs(
        queries=positions, keys=positions, in_channels=32, key_channels=16, value_channels=32
    )
    assert costs["quadratic"].multiply_adds > 1_000 * costs["linear"].multiply_adds


def test_attention_in_the_network_trains_on_a_volume_that_is_large():
    network = awake(create_model("psmnet_small", head="basic", width=4, max_disparity=128))
    (disparity,) = network(*views(1, 128, 256, torch.float32))  # 65,536 positions, a map of 16 GiB
    disparity.mean().backward()
    attention = network.volume.inserted_attention
    assert all(p.grad.isfinite().all() for p in attention.parameters())
    assert all(attention.get_submodule(n).weight.grad.any() for n in ("keys", "values"))


@pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="minutes and 2 GiB; set SLOW_TESTS")
def test_ea_psmnet_of_full_size_trains_in_two_gibibytes():
    network = awake(create_model("psmnet"))

    def step():
        disparities = network(*views(1, 256, 512, torch.float32))
        sum(w * d.mean() for w, d in zip(network.loss_weights, disparities, strict=True)).backward()

    assert peak_bytes(step) < 2.2 * 2**30
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_as_the_authors_wrote_them_load(head, tmp_path):
    official = tiny(head).float()
    # Of DataParallel, and of PyTorch 0.4, which did not count batches.
    state = {f"module.{k}": v for k, v in official.state_dict().items() if "num_batches" not in k}
    torch.save({"epoch": 10, "state_dict": state, "train_loss": 0.5}, tmp_path / "psmnet.tar")
    network = create_model("psmnet_small", head=head, width=4, max_disparity=32, norm="batch")
    new = load_checkpoint(network, tmp_path / "psmnet.tar", allow_missing=["*inserted_attention*"])
    assert {key.split(".inserted_attention.")[0] for key in new if "num_" not in key} == {"volume"}
    left, right = views(dtype=torch.float32)
    assert torch.equal(network.eval()(left, right), official(left, right))


def test_checkpoints_of_the_other_head_are_refused():
    with pytest.raises(ValueError, match=r"missing: dres2\.conv1\..* unexpected: dres2\.0\."):
        load_checkpoint(tiny("stacked_hourglass"), tiny("basic").state_dict())


@pytest.mark.parametrize(("norm", "size"), [("group", (32, 48)), ("batch", (32, 512))])
def test_a_single_pair_trains(norm, size):
    network = tiny(norm=norm).train()
    loss = sum(d.mean() for d in network(*views(1, *size)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("size", [(32, 48), (256, 256)])
def test_one_value_per_channel_is_refused_before_it_is_normalized(size):
    network = tiny().train()
    with pytest.raises(ValueError, match=r"one pair of .* norm='group'"):
        network(*views(1, *size))
    network.feature_extraction.eval()
    assert network(*views(1, 32, 48))[-1].shape == (1, 32, 48)


@pytest.mark.parametrize("width", [4, 6, 8, 11, 20, 22, 32])
def test_groups_divide_every_width_and_have_channels_enough(width):
    network = PSMNet(width=width, norm="group", max_disparity=16)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    batches = [
        m for m in PSMNet(width=width).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert [m.num_channels for m in norms] == [m.num_features for m in batches]
    sizes = {(m.num_channels, m.num_channels // m.num_groups) for m in norms}
    assert all(size == channels if channels < 16 else size >= 8 for channels, size in sizes)
    if width == 32:
        assert sizes == {(32, 8), (64, 8), (128, 8)}


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    network = create_model("psmnet_small", max_disparity=16)
    truth = torch.tensor([3.0, 8.0]).view(2, 1, 1).expand(2, 32, 64)
    scene = torch.randn(2, 3, 32, 80)
    left = scene[..., :64]
    right = torch.stack([scene[0, ..., 3:67], scene[1, ..., 8:72]])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        predictions = network(left, right)
        loss = sum(
            weight * F.smooth_l1_loss(disparity, truth)
            for weight, disparity in zip(network.loss_weights, predictions, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.5 * losses[0]


def test_autocast_gives_disparities_in_single_precision():
    network, (left, right) = psmnet_small(max_disparity=16).eval(), views(1, 16, 32, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        disparity = network(left, right)
    assert disparity.dtype == torch.float32
    assert ((disparity >= 0) & (disparity <= 15)).all()


def test_volumes_may_be_channels_last():
    network = tiny()
    left, right = views()
    expected = network(left, right)
    nn.utils.convert_conv3d_weight_memory_format(network, torch.channels_last_3d)
    torch.testing.assert_close(network(left, right), expected, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_disparity": 60}, "max_disparity must be a positive multiple of 16; got 60"),
        ({"max_disparity": 0}, "max_disparity .* got 0"),
        ({"max_disparity": 64.0}, "max_disparity .* got 64.0"),
        ({"head": "hourglass"}, "head must be one of .* got 'hourglass'"),
        ({"norm": "layer"}, "norm must be one of .* got 'layer'"),
        ({"width": 2}, "width must be at least 4; got 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PSMNet(**options)


@pytest.mark.parametrize(
    ("left", "right", "error", "message"),
    [
        ((1, 1, 32, 32), (1, 1, 32, 32), ValueError, r"left must have shape \[B, 3, H, W\]"),
        ((3, 32, 32), (3, 32, 32), ValueError, r"left must .* got \(3, 32, 32\)"),
        ((1, 3, 0, 32), (1, 3, 0, 32), ValueError, r"left must .* got \(1, 3, 0, 32\)"),
        ((1, 3, 32, 32), (1, 32, 32), ValueError, r"right must .* got \(1, 32, 32\)"),
        ((1, 3, 32, 32), (1, 3, 32, 48), ValueError, r"right must have the shape of left, \(1,"),
    ],
)
def test_views_that_are_no_pair_are_refused(left, right, error, message):
    with pytest.raises(error, match=message):
        tiny()(torch.zeros(left), torch.zeros(right))


def test_dtypes_that_do_not_fit_are_refused():
    view = torch.zeros(1, 3, 32, 32)
    with pytest.raises(TypeError, match=r"left must be floating-point, normalized .* torch\.uint8"):
        tiny()(view.byte(), view.byte())
    with pytest.raises(ValueError, match=r"right must be torch\.float32 .* got torch\.float64"):
        tiny()(view, view.double())


def test_convolutions_start_with_the_authors_variance():
    weights = PSMNet(max_disparity=16).state_dict()
    for key, fan_out in (
        ("feature_extraction.layer4.0.conv2.0.weight", 128 * 9),
        ("dres2.conv4.0.0.weight", 64 * 27),
        ("classif3.2.weight", 27),
    ):
        expected = (2 / fan_out) ** 0.5
        # Ten standard errors.
        tolerance = 10 * expected / (2 * weights[key].numel()) ** 0.5
        assert abs(weights[key].std().item() - expected) < tolerance


def test_builders_build_what_they_say():
    with torch.device("meta"):
        whole, basic = (create_model(name, "none") for name in ("psmnet", "psmnet_basic"))
        assert (whole.head, whole.max_disparity) == ("stacked_hourglass", 192)
        assert (basic.head, basic.width) == ("basic", 32)
        small = psmnet_small(head="basic", align_corners=True)
    assert (small.head, small.max_disparity, small.align_corners) == ("basic", 64, True)
    assert 200_000 < sum(p.numel() for p in small.parameters()) < 400_000
