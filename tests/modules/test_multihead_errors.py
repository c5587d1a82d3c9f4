"""What the drop-in for nn.MultiheadAttention refuses, and what it says."""

import pytest
import torch

from efficient_attention import MultiheadEfficientAttention

X = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build():
    return MultiheadEfficientAttention(12, 3, batch_first=True, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dropout": 0.1},
            NotImplementedError,
            "dropout must be 0: the N x M weights .* got 0.1. Apply nn.Dropout to the output",
        ),
        (
            {"normalization": "relu"},
            ValueError,
            "normalization must be one of 'softmax', 'scaling'; got 'relu'",
        ),
        (
            {"order": "folded"},
            ValueError,
            "order must be one of 'auto', 'linear', 'quadratic'; got 'folded'",
        ),
        ({"heads": 2}, TypeError, "heads"),
    ],
)
def test_constructor_refuses_with_the_reason(options, error, message):
    with pytest.raises(error, match=message):
        MultiheadEfficientAttention(12, 3, **options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 5), "embed_dim must be divisible by num_heads = 5; got 12"),
        ((0, 1), "embed_dim must be a positive integer; got 0"),
        ((12.0, 3), r"embed_dim must be a positive integer; got 12\.0"),
        ((12, 3.0), r"num_heads must be a positive integer; got 3\.0"),
        ((12, True), "num_heads must be a positive integer; got True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MultiheadEfficientAttention(*sizes)


@pytest.mark.parametrize("name", ["kdim", "vdim"])
def test_widths_of_keys_and_values_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got 0"):
        MultiheadEfficientAttention(12, 3, **{name: 0})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (X, Y, Y),
            {"attn_mask": torch.zeros(9, 15)},
            NotImplementedError,
            "attn_mask must be None: .* no linear form.*key_padding_mask",
        ),
        (
            (X, X, X),
            {"is_causal": True},
            NotImplementedError,
            "is_causal must be False: .*normalized over all positions",
        ),
        (
            (X, Y, Y[..., :7]),
            {},
            ValueError,
            r"value must have shape \[B, N, E\].* with E = 12; got \(2, 15, 7\)",
        ),
        ((X, Y[0], Y), {}, ValueError, r"key must have shape .* with E = 12; got \(15, 12\)"),
        (
            (X, Y, Y[:, :3]),
            {},
            ValueError,
            r"value must have as many positions and samples as key, \(2, 15\); got \(2, 3\)",
        ),
        ((X, Y[:1], Y[:1]), {}, ValueError, r"key must have B = 2, as query; got 1"),
        (
            (X, Y, Y),
            {"key_padding_mask": torch.zeros(2, 9).bool()},
            ValueError,
            r"key_padding_mask must have shape \(2, 15\); got \(2, 9\)",
        ),
        (
            (X, Y, Y),
            {"key_padding_mask": torch.zeros(2, 15).long()},
            TypeError,
            "key_padding_mask must be bool or float; got torch.int64",
        ),
    ],
)
def test_forward_refuses_with_the_reason(arguments, options, error, message):
    with pytest.raises(error, match=message):
        build()(*arguments, **options)


def test_nested_tensors_are_refused_with_the_way_out():
    nested = torch.nested.nested_tensor([X[0], X[1, :4]], layout=torch.jagged)
    with pytest.raises(
        NotImplementedError, match="query must not be nested; pad it and pass key_padding_mask"
    ):
        build()(nested, nested, nested)
