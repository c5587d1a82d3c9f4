"""The oracle against numbers worked out by hand and against loops that follow the paper's text."""

import math

import pytest
import torch

from efficient_attention.ops import reference
from efficient_attention.testing import make_inputs


def test_summarize_softmax_matches_hand_computed_numbers():
    # Two keys of one channel with weights 1 : 3, values 10 and 20: mean 17.5, total weight 4.
    key = torch.tensor([[[[0.0], [math.log(3.0)]]]], dtype=torch.float64)
    value = torch.tensor([[[[10.0], [20.0]]]], dtype=torch.float64)
    mean, log_weight = reference.summarize(key, value, None, "softmax")
    assert mean.item() == pytest.approx(17.5, abs=1e-14)
    assert log_weight.item() == pytest.approx(math.log(4.0), abs=1e-14)


def test_summarize_scaling_matches_hand_computed_numbers():
    # (2 * 10 + 4 * 20) / 2 keys = 50.
    key = torch.tensor([[[[2.0], [4.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[10.0], [20.0]]]], dtype=torch.float64)
    mean, log_weight = reference.summarize(key, value, None, "scaling")
    assert mean.item() == 50.0
    assert log_weight.item() == pytest.approx(math.log(2.0), abs=1e-15)


def test_attend_softmax_matches_hand_computed_numbers():
    # Channel weights 1 : 1 over rows (1, 2) and (3, 6) of the context.
    query = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    mean = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], dtype=torch.float64)
    assert reference.attend(query, mean, "softmax").flatten().tolist() == [2.0, 4.0]


def test_attend_in_groups_sums_the_heads():
    query, _, _ = make_inputs(key_channels=4, heads=3)
    mean = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    apart = reference.attend(query, mean, "softmax").sum(1, keepdim=True)
    stacked = query.transpose(1, 2).flatten(2).unsqueeze(1)
    together = reference.attend(stacked, mean.flatten(1, 2).unsqueeze(1), "softmax", num_groups=3)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_linear_order_equals_the_papers_equation_position_by_position(normalization):
    query, key, value = make_inputs(1, 1, 5, 6, 3, 2)
    mean, _ = reference.summarize(key, value, None, normalization)
    got = reference.attend(query, mean, normalization)[0, 0]
    q, k, v = query[0, 0], key[0, 0], value[0, 0]
    for n in range(5):
        expected = torch.zeros(2, dtype=torch.float64)
        for m in range(6):
            weight = 0.0
            for c in range(3):
                if normalization == "softmax":
                    rho_q = math.exp(q[n, c]) / sum(math.exp(q[n, j]) for j in range(3))
                    rho_k = math.exp(k[m, c]) / sum(math.exp(k[i, c]) for i in range(6))
                else:
                    rho_q, rho_k = q[n, c].item() / math.sqrt(6), k[m, c].item() / math.sqrt(6)
                weight += rho_q * rho_k
            expected += weight * v[m]
        torch.testing.assert_close(got[n], expected, rtol=0, atol=1e-14)


def test_attention_weights_are_non_negative_and_sum_to_one():
    query, key, _ = make_inputs()
    weights = reference.attention_weights(query, key, None, "softmax")
    assert weights.shape == (2, 3, 37, 53)
    assert (weights >= 0).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-14
    )


def test_dot_product_softmax_matches_hand_computed_numbers():
    # Scores 0 and ln 3: weights 1/4 and 3/4.
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([[[[0.0], [math.log(3.0)]]]], dtype=torch.float64)
    value = torch.tensor([[[[10.0], [20.0]]]], dtype=torch.float64)
    got = reference.dot_product_attention(query, key, value, None, "softmax", 1.0)
    assert got.item() == pytest.approx(17.5, abs=1e-14)


def test_reference_ignores_autocast():
    query, key, value = make_inputs(dtype=torch.float32)
    expected = reference.quadratic(query, key, value, None, "softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reference.quadratic(query, key, value, None, "softmax")
    assert torch.equal(got, expected)
