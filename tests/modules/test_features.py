"""Layouts of tokens and feature maps, and the memory that they are in."""

import pytest
import torch

import efficient_attention as ea
from efficient_attention.memory import peak_bytes
from efficient_attention.modules.features import FeatureMaps


@pytest.mark.parametrize("kind", [ea.EfficientAttention2d, ea.NonLocal2d])
@pytest.mark.parametrize("order", ["linear", "quadratic", "folded"])
@pytest.mark.parametrize("cropped", [False, True])
def test_memory_format_is_kept_without_a_residual_too(kind, order, cropped):
    # A sum takes the format of the input, whatever that of the attention is. (PyTorch keeps it in two dimensions only.)
    options = {} if kind is ea.NonLocal2d else {"order": order}
    module = kind(6, 4, 8, num_heads=2, init="official", residual=False, **options)
    x = torch.randn(2, 6, 7, 5)
    x = x[..., 1:] if cropped else x
    last = x.movedim(1, -1).contiguous()
    last = (last[..., 1:, :] if cropped else last).movedim(-1, 1)
    assert module(x).is_contiguous()
    assert module(last).movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cropped", [False, True])
def test_joining_heads_copies_nothing(channels_last, cropped):
    features = FeatureMaps(2)
    x = torch.randn(2, 8, 60, 70)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    heads = features.split(x, heads=4)
    like = torch.empty_like(x)[..., 5:, 5:] if cropped else x
    joined = features.join(heads, like=x)
    assert joined.data_ptr() == x.data_ptr()
    assert torch.equal(joined, x)
    # The layout of a cropped map shows in its strides: it need not be copied into one that is whole.
    parts = features.split(like.clone(), heads=4)
    assert peak_bytes(lambda: features.join(parts, like=like)) == 0
