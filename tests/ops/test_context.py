"""The algebra of contexts."""

import itertools
import math
import pickle

import pytest
import torch

from efficient_attention import Context, attend, efficient_attention, summarize
from efficient_attention.testing import make_inputs


def scalar_context(mean, log_weight):
    return Context(
        torch.tensor([[[[mean]]]], dtype=torch.float64),
        torch.tensor([[[log_weight]]], dtype=torch.float64),
    )


def test_merge_matches_hand_computed_numbers():
    # Means 10 and 20 with weights 1 and 3: mean 17.5, weight 4.
    merged = scalar_context(10.0, 0.0).merge(scalar_context(20.0, math.log(3.0)))
    assert merged.mean.item() == pytest.approx(17.5, abs=1e-14)
    assert merged.log_weight.item() == pytest.approx(math.log(4.0), abs=1e-15)


def test_merge_survives_weights_beyond_the_range_of_exp():
    merged = scalar_context(10.0, 5000.0).merge(scalar_context(20.0, 5000.0 + math.log(3.0)))
    assert merged.mean.item() == pytest.approx(17.5, abs=1e-9)
    assert merged.log_weight.item() == pytest.approx(5000.0 + math.log(4.0), abs=1e-9)


def test_merge_with_the_empty_context_changes_nothing():
    empty = scalar_context(0.0, -math.inf)
    for merged in (scalar_context(7.0, 2.0).merge(empty), empty.merge(scalar_context(7.0, 2.0))):
        assert merged.mean.item() == 7.0
        assert merged.log_weight.item() == pytest.approx(2.0, abs=1e-15)
    both = empty.merge(empty)
    assert both.mean.item() == 0.0
    assert both.log_weight.item() == -math.inf


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("masked", [False, True])
def test_whole_equals_merged_in_any_split_and_any_order(normalization, masked):
    _, key, value = make_inputs(keys=60)
    mask = torch.rand(2, 60) > 0.4 if masked else torch.ones(2, 60, dtype=torch.bool)
    options = {"normalization": normalization}
    whole = summarize(key, value, key_mask=mask, **options)
    for sizes in ([60], [1, 59], [20, 20, 20], [7, 0, 31, 22]):
        parts = [
            summarize(k, v, key_mask=m, **options)
            for k, v, m in zip(
                key.split(sizes, 2), value.split(sizes, 2), mask.split(sizes, 1), strict=True
            )
        ]
        for order in itertools.permutations(parts):
            merged = order[0].merge(*order[1:])
            torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(merged.log_weight, whole.log_weight, rtol=0, atol=1e-12)


def test_merge_is_associative():
    _, key, value = make_inputs(keys=30)
    a, b, c = (summarize(k, v) for k, v in zip(key.split(10, 2), value.split(10, 2), strict=True))
    left, right, flat = a.merge(b).merge(c), a.merge(b.merge(c)), a.merge(b, c)
    for other in (right, flat):
        torch.testing.assert_close(left, other, rtol=0, atol=1e-14)


def test_gradients_through_merge_equal_those_of_the_whole():
    query, key, value = make_inputs(requires_grad=True)
    whole = efficient_attention(query, key, value).square().sum()
    parts = [summarize(k, v) for k, v in zip(key.split(20, 2), value.split(20, 2), strict=True)]
    merged = attend(query, parts[0].merge(*parts[1:])).square().sum()
    expected = torch.autograd.grad(whole, (query, key, value))
    got = torch.autograd.grad(merged, (query, key, value))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradients_through_merge_with_an_empty_part_are_finite():
    query, key, value = make_inputs(requires_grad=True)
    hidden = torch.zeros(2, 53, dtype=torch.bool)
    context = summarize(key, value, key_mask=hidden).merge(summarize(key, value, key_mask=hidden))
    output = attend(query, context)
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert torch.equal(output, torch.zeros_like(output))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_context_is_a_pytree_and_pickles():
    _, key, value = make_inputs()
    context = summarize(key, value)
    leaves, spec = torch.utils._pytree.tree_flatten(context)
    assert len(leaves) == 2
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), Context)
    again = pickle.loads(pickle.dumps(context))
    assert isinstance(again, Context)
    assert torch.equal(again.mean, context.mean)


def test_a_kept_context_loads_with_weights_only(tmp_path):
    _, key, value = make_inputs()
    torch.save(summarize(key, value), tmp_path / "context.pt")
    again = torch.load(tmp_path / "context.pt", weights_only=True)
    assert isinstance(again, Context)
    assert torch.equal(again.mean, summarize(key, value).mean)


def test_merge_refuses_what_is_no_context():
    with pytest.raises(TypeError, match=r"others\[0\] must be a Context; got tuple"):
        scalar_context(1.0, 0.0).merge((torch.zeros(1), torch.zeros(1)))


def test_merge_refuses_other_shapes():
    other = Context(torch.zeros(1, 1, 2, 1).double(), torch.zeros(1, 1, 2).double())
    with pytest.raises(
        ValueError,
        match=r"others\[0\]\.mean must match \(1, 1, 1, 1\) torch\.float64 .* got \(1, 1, 2, 1\)",
    ):
        scalar_context(1.0, 0.0).merge(other)


def test_merge_refuses_other_dtypes():
    other = Context(*(x.float() for x in scalar_context(1.0, 0.0)))
    with pytest.raises(
        ValueError, match=r"others\[0\]\.mean must match .* got \(1, 1, 1, 1\) torch\.float32"
    ):
        scalar_context(1.0, 0.0).merge(other)
