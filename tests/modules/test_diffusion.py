"""Efficient attention of diffusion models: the equations, and its memory as one more context."""

import pytest
import torch
import torch.nn.functional as F

from efficient_attention import masked
from efficient_attention.modules import DiffusionEfficientAttention
from efficient_attention.testing import assert_as_precise_as_plain


def plain(module, x):
    """The equations: keys and values of the memory stand before those of the input."""
    heads = module.num_heads
    normalized = F.normalize(x, dim=1) * module.norm.g * x.shape[1] ** 0.5
    q, k, v = (
        part.flatten(2).unflatten(1, (heads, -1)).mT
        for part in module.to_qkv(normalized).chunk(3, 1)
    )  # [B, H, N, D]
    memory = module.mem_kv.mT.unsqueeze(1).expand(-1, len(x), -1, -1, -1)
    k, v = (torch.cat((m, part), 2) for m, part in zip(memory, (k, v), strict=True))
    y = q.softmax(-1) @ (k.softmax(-2).mT @ v) / module.head_channels**0.5
    y = module.to_out[0](y.mT.flatten(1, 2).unflatten(2, x.shape[2:]))
    return F.normalize(y, dim=1) * module.to_out[1].g * x.shape[1] ** 0.5


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("num_memory", [0, 1, 4])
def test_output_and_gradients_are_those_of_the_equations(dimensions, num_memory):
    options = {"num_memory": num_memory, "dimensions": dimensions, "dtype": torch.float64}
    module = DiffusionEfficientAttention(6, 2, 4, **options)
    x = torch.randn(2, 6, *(5, 4, 3)[:dimensions], dtype=torch.float64, requires_grad=True)
    results = []
    for compute in (module, lambda x: plain(module, x)):
        y = compute(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_precise_as_the_plain_equations(dtype):
    module = DiffusionEfficientAttention(16, 2, 8).double()
    x = torch.randn(2, 16, 20, 20, dtype=torch.float64)
    truth = plain(module, x)
    module.to(dtype)
    assert_as_precise_as_plain(module(x.to(dtype)), plain(module, x.to(dtype)), truth, str(dtype))


def test_the_memory_is_the_same_for_every_sample():
    module = DiffusionEfficientAttention(6, 2, 4)
    x = torch.randn(3, 6, 5, 4)
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(module(x), alone)


def test_a_mask_for_the_whole_network_hides_padding_and_not_the_memory():
    module = DiffusionEfficientAttention(6, 2, 4).double()
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    inside = torch.ones(2, 16, 12, dtype=torch.bool)
    inside[1, 8:] = False
    with masked(module, inside):
        y = module(x)
    torch.testing.assert_close(y[1, :, :4], module(x[1:, :, :4])[0], rtol=1e-12, atol=1e-12)


def test_memory_formats_are_taken_and_kept():
    module, x = DiffusionEfficientAttention(6, 2, 4), torch.randn(2, 6, 5, 4)
    y = module(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, module(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_names_are_those_of_the_other_module():
    shapes = {
        k: tuple(v.shape) for k, v in DiffusionEfficientAttention(6, 2, 4).state_dict().items()
    }
    assert shapes == {
        "mem_kv": (2, 2, 4, 4),
        "norm.g": (1, 6, 1, 1),
        "to_qkv.weight": (24, 6, 1, 1),
        "to_out.0.weight": (6, 8, 1, 1),
        "to_out.0.bias": (6,),
        "to_out.1.g": (1, 6, 1, 1),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a positive integer; got 0"),
        ({"in_channels": 6, "num_heads": 0}, "num_heads must be a positive integer; got 0"),
        ({"in_channels": 6, "dimensions": 4}, "dimensions must be 1, 2 or 3; got 4"),
    ],
)
def test_the_constructor_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionEfficientAttention(**options)


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, H, W\] with C = 6; got"):
        DiffusionEfficientAttention(6)(torch.randn(2, 5, 4, 4))
