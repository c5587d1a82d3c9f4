"""Blocks of other libraries, written from their equations: known by what they compute, replaced over their layers."""

import copy
import pickle

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import efficient_attention as ea
from efficient_attention.surgery import recognition, replace

SIZES = (8, 7, 6)


def convolution(dimensions):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]


class NonLocalBlock(nn.Module):
    """``x + W(f(theta(x), phi(x)) g(x))``, with a pooling behind phi and g and a normalization behind W, as wished."""

    def __init__(self, channels, inner, dimensions, form, *, pools=False, norm=False, out="W"):
        super().__init__()
        conv = convolution(dimensions)
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimensions - 1](2)
        bn = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.g = conv(channels, inner, 1)
        self.theta, self.phi = conv(channels, inner, 1), conv(channels, inner, 1)
        output = conv(inner, channels, 1)
        setattr(self, out, nn.Sequential(output, bn(channels)) if norm else output)
        if pools:
            self.g, self.phi = nn.Sequential(self.g, pool), nn.Sequential(self.phi, pool)
        self.form, self.out = form, out

    def weights(self, logits):
        if self.form == "scaling":
            return logits / logits.shape[-1]
        scale = logits.new_tensor(self.theta.out_channels) ** -0.5 if self.form == "scaled" else 1
        return (logits * scale).softmax(-1)

    def forward(self, x):
        theta, phi, g = (part(x).flatten(2) for part in (self.theta, self.phi, self.g))
        y = g @ self.weights(theta.mT @ phi).mT
        return x + getattr(self, self.out)(y.unflatten(2, x.shape[2:]))


class Attention(nn.Module):
    """Self-attention of a vision transformer."""

    def __init__(self, dim, num_heads, *, qk_norm=False, bias=True, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x, attn_mask=None):
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        logits = self.q_norm(q) @ self.k_norm(k).mT * self.scale
        logits = logits if attn_mask is None else logits + attn_mask
        y = self.attn_drop(logits.softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class ChannelNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.g = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class LinearAttention(nn.Module):
    """Linear attention of a diffusion model's U-net, over the keys of the input and of a memory together."""

    def __init__(self, channels, heads, head_channels, *, memory=3, residual=False):
        super().__init__()
        inner = heads * head_channels
        self.heads, self.scale, self.residual = heads, head_channels**-0.5, residual
        self.norm = ChannelNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head_channels, memory))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1), ChannelNorm(channels))

    def forward(self, x):
        q, k, v = (
            part.flatten(2).unflatten(1, (self.heads, -1))
            for part in self.to_qkv(self.norm(x)).chunk(3, 1)
        )  # [B, H, D, N]
        memory = self.mem_kv.unsqueeze(1).expand(-1, len(x), -1, -1, -1)
        k, v = (torch.cat((m, part), -1) for m, part in zip(memory, (k, v), strict=True))
        context = k.softmax(-1) @ v.mT
        y = (context.mT @ (q.softmax(-2) * self.scale)).flatten(1, 2)
        y = self.to_out(y.unflatten(2, x.shape[2:]))
        return x + y if self.residual else y


def exchanged(block, **options):
    """A model before and after the exchange of its one block, in evaluation mode, and what the report says."""
    before = nn.Sequential(block).double().eval()
    after = copy.deepcopy(before)
    (change,) = replace(after, "0", **options).changes
    assert list(after.state_dict()) == list(before.state_dict())
    return before, after, change


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# Non-local blocks.


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("out", ["W", "conv_out"])
def test_the_dot_product_form_of_a_non_local_block_is_the_same_map(dimensions, pools, norm, out):
    block = NonLocalBlock(6, 4, dimensions, "scaling", pools=pools, norm=norm, out=out)
    before, after, change = exchanged(block)
    assert change[1:] == ("NonLocalBlock -> EfficientNonLocal", dimensions, 6, 0, "exact")
    x = torch.randn(2, 6, *SIZES[:dimensions], dtype=torch.float64)
    for mode in (True, False):
        assert error(after.train(mode)(x), before.train(mode)(x)) < 1e-12


@pytest.mark.parametrize("form", ["softmax", "scaled"])
def test_the_embedded_gaussian_form_has_the_same_parts_and_is_an_approximation(form):
    before, after, change = exchanged(NonLocalBlock(6, 4, 2, form, pools=True))
    assert change.outputs == "approximate"
    block, x = before[0], torch.randn(2, 6, *SIZES[:2], dtype=torch.float64)
    q, k, v = (part(x).flatten(2).mT for part in (block.theta, block.phi, block.g))
    y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    expected = x + block.W(y.mT.unflatten(2, x.shape[2:]))
    assert error(after(x), expected) < 1e-12
    _, scaling, change = exchanged(NonLocalBlock(6, 4, 2, form), normalization="scaling")
    assert change.outputs == "approximate"
    assert scaling[0].normalization == "scaling"


@pytest.mark.parametrize("training", [True, False])
def test_parts_stay_the_same_objects_in_their_own_modes(training):
    block = NonLocalBlock(6, 4, 2, "scaling", norm=True).train(training)
    block.W[1].train(not training)
    model = nn.Sequential(block)
    parameters = dict(model.named_parameters())
    replace(model, "0")
    assert model[0].W is block.W
    assert model[0].training == training
    assert model[0].W[1].training != training
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model[0].planned_order(torch.randn(1, 6, 64, 64)) == "linear"


def test_timms_non_local_block_is_known_by_its_letters():
    timm = pytest.importorskip("timm.layers")
    _, after, change = exchanged(timm.NonLocalAttn(16))
    assert change[1:] == ("NonLocalAttn -> EfficientNonLocal", 2, 16, 0, "approximate")
    block, x = after[0], torch.randn(2, 16, *SIZES[:2], dtype=torch.float64)
    nn.init.normal_(block.norm.weight)
    q, k, v = (part(x).flatten(2).mT for part in (block.t, block.p, block.g))
    y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    assert error(after(x), x + block.norm(block.z(y.mT.unflatten(2, x.shape[2:])))) < 1e-12


# Vision transformers.


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"bias": False}])
def test_a_vision_transformers_attention_becomes_that_of_the_paper(options):
    before, after, change = exchanged(Attention(12, 3, **options))
    assert change[1:] == ("Attention -> ViTEfficientAttention", "tokens", 12, 0, "approximate")
    block, x = before[0], torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = block.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    y = block.q_norm(q).softmax(-1) @ (block.k_norm(k).softmax(-2).mT @ v)
    assert error(after(x), block.proj(y.transpose(1, 2).flatten(2))) < 1e-12
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask[1, ..., 4:] = -torch.inf
    assert error(after[0](x, mask)[1, :4], after(x[1:, :4])[0]) < 1e-12


def test_dropout_of_weights_is_lost_only_by_agreement():
    model = nn.Sequential(Attention(12, 3, attn_drop=0.1))
    with pytest.raises(NotImplementedError, match=r"at '0': dropout must be 0.*got 0.1.*dropout=0"):
        replace(model, "0")
    assert isinstance(model[0], Attention)
    replace(model, "0", dropout=0.0)
    assert isinstance(model[0], ea.ViTEfficientAttention)


# Diffusion models.


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory", [0, 3])
def test_linear_attention_over_a_memory_is_the_same_map(residual, memory):
    block = LinearAttention(6, 2, 4, memory=memory, residual=residual)
    before, after, change = exchanged(block)
    what = "LinearAttention -> DiffusionEfficientAttention"
    assert change[1:] == (what, 2, 6, 0, "exact")
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    assert error(after(x), before(x)) < 1e-12


# What a model with replacements can still do.

CASES = {
    "non-local": (lambda: NonLocalBlock(6, 4, 2, "scaling", pools=True, norm=True), (2, 6, 8, 8)),
    "transformer": (lambda: Attention(6, 3), (2, 9, 6)),
    "diffusion": (lambda: LinearAttention(6, 2, 4), (2, 6, 8, 8)),
}


@pytest.fixture(params=CASES)
def replaced(request):
    make, shape = CASES[request.param]
    model = nn.Sequential(make()).eval()
    replace(model, "*")
    return model, torch.randn(shape)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_with_their_own_weights(replaced, copied):
    model, x = replaced
    twin, expected = copied(model), model(x)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_plain_model_loads_strictly(case):
    make, shape = CASES[case]
    plain, model = (nn.Sequential(make()).eval() for _ in range(2))
    replace(model, "0")
    model.load_state_dict(plain.state_dict())
    replace(plain, "0")
    x = torch.randn(shape)
    assert torch.equal(model(x), plain(x))


def test_compiles_to_one_graph(replaced):
    model, x = replaced
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_free_sizes(replaced, strict):
    model, x = replaced
    free = {axis: torch.export.Dim.AUTO for axis in range(1, x.dim()) if x.shape[axis] != 6}
    program = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=strict)
    other = torch.cat((x, x), dim=max(free))
    torch.testing.assert_close(program.module()(other), model(other))


def test_trains_under_distributed_data_parallel(replaced, tmp_path):
    model, x = replaced
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        DistributedDataParallel(model)(x).square().sum().backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(got, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_weights_on_meta_and_in_low_precision_are_recognised_and_kept():
    model = nn.Sequential(NonLocalBlock(6, 4, 2, "scaling")).to("meta", torch.bfloat16)
    assert replace(model, "0").changes[0].outputs == "exact"
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_recognition_leaves_no_trace(monkeypatch):
    block = NonLocalBlock(6, 4, 2, "scaling", norm=True)
    state, random = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    found = recognition.recognise(block)
    assert found.channels == 6
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert block.training


# What is not what it seems.


class Squared(Attention):
    def forward(self, x, attn_mask=None):
        return super().forward(x * x)


class Rotated(Attention):
    def forward(self, x, rope=None):
        return super().forward(x)


class Biased(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(5))


class Cubed(NonLocalBlock):
    def weights(self, logits):
        return logits**3


class Warmed(NonLocalBlock):
    """Another map, by less than what float32 would show."""

    def weights(self, logits):
        return super().weights(logits * (1 + 1e-7))


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.W = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)


class Concatenation(NonLocalBlock):
    def __init__(self):
        super().__init__(4, 2, 2, "scaling")
        self.concat_project = nn.Sequential(nn.Conv2d(4, 1, 1, bias=False), nn.ReLU())


class Undivided(LinearAttention):
    def forward(self, x):
        return super().forward(x) / self.scale


def uncopied():
    block = Attention(12, 3)
    block.kept = block.qkv.weight * 2
    return block


def hooked():
    block = Attention(12, 3)
    block.attn_drop.register_forward_hook(lambda module, inputs, output: None)
    return block


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Squared(12, 3), "does not compute dot-product attention of tokens"),
        (lambda: Rotated(12, 3), r"its forward takes \['rope'\] beside \['x', 'attn_mask'"),
        (lambda: Biased(12, 3), r"it has \['relative_position_bias_table'\] beside \['qkv'"),
        (hooked, "it has hooks"),
        (uncopied, "it cannot be copied, to see what it computes: Only Tensors created explicitly"),
        (lambda: Cubed(4, 2, 2, "scaling"), "computes neither dot-product nor embedded-Gaussian"),
        (lambda: Warmed(4, 2, 2, "softmax"), "computes neither dot-product nor embedded-Gaussian"),
        (lambda: Warmed(4, 2, 2, "scaling"), "computes neither dot-product nor embedded-Gaussian"),
        (Gaussian, "it is a Gaussian non-local block: .* no linear form"),
        (Concatenation, "it is a concatenation non-local block: .* no linear form"),
        (lambda: Undivided(6, 2, 4), "does not compute linear attention over a memory"),
    ],
)
def test_what_only_looks_like_attention_is_refused_with_the_reason(make, message):
    model = nn.Sequential(make())
    block = model[0]
    with pytest.raises(ValueError, match=f"got '0' by '0', but .*{message}"):
        replace(model, "0")
    assert model[0] is block
    model.append(nn.MultiheadAttention(4, 2))
    assert [change.name for change in replace(model, "*").changes] == ["1"]


def test_options_are_those_of_the_family():
    model = nn.Sequential(LinearAttention(6, 2, 4))
    with pytest.raises(ValueError, match=r"options of '0' must be among \(\); got 'order'"):
        replace(model, "0", order="linear")
    model = nn.Sequential(NonLocalBlock(6, 4, 2, "scaling"))
    with pytest.raises(ValueError, match=r"must be among \('normalization', 'order'\); got 'dropo"):
        replace(model, "0", dropout=0.0)
    with pytest.raises(ValueError, match="at '0': order must be one of"):
        replace(model, "0", order="folded")
    assert isinstance(model[0], NonLocalBlock)
    replace(model, "0", order="quadratic")
    assert model[0].order == "quadratic"
