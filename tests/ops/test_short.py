"""Short problems: the same values, gradients and errors as every other, in few operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attention import efficient_attention
from efficient_attention.ops import planner, short, watching
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    make_inputs,
    plain_attention,
)


def served(*inputs, normalization="softmax", order="auto"):
    return short.efficient_attention(*inputs, None, normalization, order, "auto")


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("lengths", [(3, 4), (37, 53), (0, 5)])
def test_values_are_those_of_the_oracle(normalization, lengths):
    inputs = make_inputs(2, 3, *lengths)
    expected = efficient_attention(*inputs, normalization=normalization, backend="reference")
    for order in ("auto", "linear"):
        got = served(*inputs, normalization=normalization, order=order)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["channel-major", "token-major", "as it comes"])
@pytest.mark.parametrize("order", ["auto", "linear"])
@pytest.mark.parametrize("lengths", [(3, 4), (37, 53)])
def test_gradients_and_layouts_are_those_of_every_other(lengths, order, layout):
    inputs = make_inputs(2, 3, *lengths)
    if layout == "channel-major":
        inputs = [x.mT.contiguous().mT for x in inputs]
    elif layout == "token-major":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    got = served(*inputs, order=order)
    expected = efficient_attention(*inputs, backend="blocked")
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    slope = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, slope),
        torch.autograd.grad(expected, inputs, slope),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_float32(dtype):
    inputs = make_inputs(dtype=dtype)
    truth = plain_attention(*(x.double() for x in inputs))
    assert_as_precise_as_plain(served(*inputs), plain_attention(*inputs), truth)
    assert served(*inputs).dtype == dtype


def test_a_channel_without_any_weight_gives_zero():
    query, key, value = make_inputs()
    key[:, :, :, 3] = -torch.inf
    assert served(query, key, value) is None
    expected = efficient_attention(query, key, value, backend="reference", order="linear")
    torch.testing.assert_close(efficient_attention(query, key, value), expected, rtol=0, atol=1e-12)
    assert expected.isfinite().all()


def test_what_is_not_right_is_left_to_whoever_says_so():
    query, key, value = make_inputs()
    for wrong in (
        (query, key[:, :1], value),
        (query, key, value[:, :, :1]),
        (query.float(), key, value),
        (query.long(), key.long(), value.long()),
        (query[0], key[0], value[0]),
        (query.tolist(), key, value),
        (torch.nn.Parameter(query), key, value),
        (query.to("meta"), key.to("meta"), value.to("meta")),
    ):
        assert served(*wrong) is None
    assert served(query, key, value, normalization="other") is None
    assert served(query, key, value, order="quadratic") is None
    with pytest.raises(ValueError, match="normalization must be one of"):
        efficient_attention(query, key, value, normalization="other")


def test_long_problems_and_those_that_somebody_watches_are_left_alone():
    inputs = make_inputs(1, 16, 8193, 8192, 32, 32, dtype=torch.float32)
    assert served(*inputs) is None
    inputs = make_inputs(1, 16, 8192, 8192, 32, 32, dtype=torch.float32)
    assert served(*inputs) is not None
    assert served(*make_inputs(1, 1, 8192, 8193, 32, 32, dtype=torch.float32)) is None
    # With gradients what is kept counts.
    inputs[0].requires_grad_()
    assert served(*inputs) is None
    inputs = make_inputs()
    assert served(*inputs) is not None
    with TorchDispatchMode():
        assert served(*inputs) is None
    with torch.autocast("cpu"):
        assert served(*inputs) is None
    with torch.autograd.forward_ad.dual_level():
        assert served(*inputs) is None
    assert torch.func.vmap(lambda q: torch.tensor(served(q, q, q) is None))(inputs[0][None])
    assert watching.nobody_watches(*inputs)
    inputs[0].requires_grad_()
    assert not watching.nobody_watches(*inputs)
    with torch.no_grad():
        assert watching.nobody_watches(*inputs)


def test_what_is_known_is_found_for_tensors_that_are_alike_only():
    inputs = make_inputs(2, 3, 5, 5, 4, 4, dtype=torch.float32)  # which may change places
    recent = watching.Recent()
    assert recent.find("kind", *inputs) is None
    recent.add("found", "kind", *inputs)
    assert recent.find("kind", *inputs) == "found"
    assert recent.find("kind", *map(torch.randn_like, inputs)) == "found"
    assert recent.find("another", *inputs) is None
    query, *rest = inputs
    assert recent.find("kind", *rest, query) == "found"
    for other in (
        query[:, :, 1:],
        query.mT.contiguous().mT,
        query.double(),
        query.to("meta"),
        query.to_sparse(),
        query.clone().requires_grad_(),
        query.tolist(),
        query.numpy(),
        None,
        torch.nn.Parameter(query, requires_grad=False),
        torch._neg_view(query),
        torch._efficientzerotensor(query.shape),
        torch.nested.nested_tensor([query[0]]),
        torch.nested.nested_tensor([query[0]], layout=torch.jagged),
    ):
        assert recent.find("kind", other, *rest) is None
        assert recent.find("kind", *rest, other) is None
    with torch.autocast("cpu"):
        assert recent.find("kind", *inputs) is None
    assert torch.func.vmap(lambda q: torch.tensor(recent.find("kind", q, *rest) is None))(
        query[None]
    )
    # What it leaves to who asks.
    assert not watching.is_followed()
    for follower in (TorchDispatchMode(), FakeTensorMode(), torch.autograd.forward_ad.dual_level()):
        with follower:
            assert watching.is_followed()
    # Of a tensor that comes twice it would never be found again.
    recent.add("twice", "kind", query, query, query)
    assert recent.find("kind", query, query, query) is None
    # Not more kinds than it may know.
    for kind in range(2 * recent.MOST):
        recent.add(kind, kind, *inputs)
    assert recent.find(kind, *inputs) == kind
    assert len(recent._known) <= recent.MOST


def test_programs_are_traced_after_calls_that_were_alike():
    inputs = make_inputs(dtype=torch.float32)
    efficient_attention(*inputs)
    traced = make_fx(lambda q, k, v: efficient_attention(q, k, v))(*inputs)
    others = [*map(torch.randn_like, inputs)]
    torch.testing.assert_close(traced(*others), efficient_attention(*others))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(efficient_attention(*inputs), FakeTensor)


def test_what_is_known_spares_all_other_questions(monkeypatch):
    inputs = make_inputs(dtype=torch.float32)
    expected = served(*inputs)
    monkeypatch.setattr(short, "are_plain", None)
    monkeypatch.setattr(short, "_way", None)
    torch.testing.assert_close(served(*map(torch.clone, inputs)), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="not callable"):
        served(*make_inputs(2, 3, 5, 6, dtype=torch.float32))


def test_gradients_are_recorded_of_a_call_like_one_without():
    inputs = make_inputs(dtype=torch.float32)
    inputs[0].requires_grad_()
    with torch.no_grad():
        assert not served(*inputs).requires_grad
    assert served(*inputs).requires_grad
    with torch.inference_mode():
        assert served(*inputs).is_inference()
    assert not served(*inputs).is_inference()


def test_the_order_is_that_of_the_planner():
    for sizes in ((10, 20, 3, 4), (100, 3, 8, 8), (63, 63, 64, 64), (64, 64, 64, 64)):
        names = ("queries", "keys", "key_channels", "value_channels")
        costs = planner.operator_costs(**dict(zip(names, sizes, strict=True)))
        cheaper = costs["quadratic"].multiply_adds < costs["linear"].multiply_adds
        assert planner.quadratic_is_cheaper(*sizes) == cheaper


def test_few_operators_run():
    # A budget rather than a time, of operators and what they call: softmax twice, two products and their views, and
    # the search for empty channels.
    inputs = make_inputs(dtype=torch.float32)
    efficient_attention(*inputs)  # how it is computed is found out once
    with torch.profiler.profile() as profile:
        efficient_attention(*inputs)
    called = [e.name for e in profile.events()]  # by each other, too
    assert len(called) <= 32, called
