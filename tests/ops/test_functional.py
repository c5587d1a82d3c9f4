"""The contract of the public functions: every way to misuse them has its message."""

import re

import pytest
import torch

from efficient_attention import (
    Context,
    attend,
    dot_product_attention,
    efficient_attention,
    summarize,
)
from efficient_attention.memory import peak_bytes
from efficient_attention.testing import make_inputs

Q, K, V = make_inputs()
CONTEXT = summarize(K, V)


def bad(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # Options.
        (
            bad(efficient_attention, Q, K, V, normalization="sofmax"),
            ValueError,
            "normalization must be one of 'softmax', 'scaling'; got 'sofmax'",
        ),
        (
            bad(efficient_attention, Q, K, V, order="fast"),
            ValueError,
            "order must be one of 'auto', 'linear', 'quadratic'; got 'fast'",
        ),
        (
            bad(efficient_attention, Q, K, V, backend="cuda"),
            ValueError,
            "backend must be one of 'auto', 'reference', 'blocked', 'native', 'triton'; got 'cuda'",
        ),
        (
            bad(efficient_attention, Q, K, V, order="quadratic", backend="blocked"),
            NotImplementedError,
            "backend='blocked' computes order='linear' only; for order='quadratic' use backend='auto'",
        ),
        (
            bad(efficient_attention, Q, K, V, mask=None),
            TypeError,
            "unexpected keyword argument 'mask'",
        ),
        (
            bad(efficient_attention, Q, K, V, dropout_p=0.1),
            TypeError,
            "unexpected keyword argument 'dropout_p'",
        ),
        (
            bad(summarize, K, V, normalization="l2"),
            ValueError,
            "normalization must be one of 'softmax', 'scaling'; got 'l2'",
        ),
        (
            bad(summarize, K, V, backend="x"),
            ValueError,
            "backend must be one of 'auto', 'reference', 'blocked', 'native', 'triton'; got 'x'",
        ),
        (
            bad(attend, Q, CONTEXT, normalization=None),
            ValueError,
            "normalization must be one of 'softmax', 'scaling'; got None",
        ),
        (
            bad(attend, Q, CONTEXT, backend="x"),
            ValueError,
            "backend must be one of 'auto', 'reference', 'blocked', 'native', 'triton'; got 'x'",
        ),
        (
            bad(attend, Q, CONTEXT, num_groups=3),
            ValueError,
            "num_groups must divide query's Dk = 8; got 3",
        ),
        (
            bad(attend, Q, CONTEXT, num_groups=0),
            ValueError,
            "num_groups must be a positive integer; got 0",
        ),
        (
            bad(attend, Q, CONTEXT, num_groups=2.0),
            ValueError,
            "num_groups must be a positive integer; got 2.0",
        ),
        (
            bad(attend, Q, CONTEXT, num_groups=True),
            ValueError,
            "num_groups must be a positive integer; got True",
        ),
        (
            bad(dot_product_attention, Q, K, V, normalization="x"),
            ValueError,
            "normalization must be one of 'softmax', 'scaling'; got 'x'",
        ),
        (
            bad(dot_product_attention, Q, K, V, normalization="scaling", scale=0.5),
            ValueError,
            "scale must be 1 with normalization='scaling'; got 0.5",
        ),
        # What is no tensor, or none of the right kind.
        (
            bad(efficient_attention, [1.0], K, V),
            TypeError,
            "query must be a tensor [B, H, positions, channels]; got list",
        ),
        (
            bad(efficient_attention, Q.to_sparse(), K, V),
            TypeError,
            "query must be a dense tensor; got layout torch.sparse_coo",
        ),
        (
            bad(efficient_attention, Q, None, V),
            TypeError,
            "key must be a tensor [B, H, positions, channels]; got NoneType",
        ),
        (
            bad(efficient_attention, Q, K, 3),
            TypeError,
            "value must be a tensor [B, H, positions, channels]; got int",
        ),
        (
            bad(efficient_attention, Q.long(), K, V),
            TypeError,
            "query must have dtype float16, bfloat16, float32, float64; got torch.int64",
        ),
        (
            bad(summarize, K.to(torch.complex64), V),
            TypeError,
            "key must have dtype float16, bfloat16, float32, float64; got torch.complex64",
        ),
        (
            bad(efficient_attention, Q[0], K, V),
            ValueError,
            "query must have shape [B, H, positions, channels]; got (3, 37, 8)",
        ),
        (
            bad(summarize, K, V[0]),
            ValueError,
            "value must have shape [B, H, positions, channels]; got (3, 53, 5)",
        ),
        (
            bad(attend, Q[0], CONTEXT),
            ValueError,
            "query must have shape [B, H, positions, channels]; got (3, 37, 8)",
        ),
        (bad(attend, Q, tuple(CONTEXT)), TypeError, "context must be a Context; got tuple"),
        # Tensors that do not fit together.
        (
            bad(efficient_attention, Q, K[..., :4], V),
            ValueError,
            "key must have shape [B, H, M, Dk] matching query's B, H, Dk = (2, 3, 8); got (2, 3, 53, 4)",
        ),
        (
            bad(efficient_attention, Q, K[:1], V),
            ValueError,
            "key must have shape [B, H, M, Dk] matching query's B, H, Dk = (2, 3, 8); got (1, 3, 53, 8)",
        ),
        (
            bad(efficient_attention, Q, K, V[:, :, :50]),
            ValueError,
            "value must have shape [B, H, M, Dv] matching key's B, H, M = (2, 3, 53); got (2, 3, 50, 5)",
        ),
        (
            bad(dot_product_attention, Q, K, V[:, :1]),
            ValueError,
            "value must have shape [B, H, M, Dv] matching key's B, H, M = (2, 3, 53); got (2, 1, 53, 5)",
        ),
        (
            bad(summarize, K, V[:, :, :50]),
            ValueError,
            "value must have shape [B, H, M, Dv] matching key's B, H, M = (2, 3, 53); got (2, 3, 50, 5)",
        ),
        (
            bad(attend, Q[..., :4], CONTEXT),
            ValueError,
            "context.mean must have shape [B, H, Dk, Dv] matching query's B, H, Dk = (2, 3, 4); got (2, 3, 8, 5)",
        ),
        (
            bad(attend, Q, Context(CONTEXT.mean[0], CONTEXT.log_weight)),
            ValueError,
            "context.mean must have shape [B, H, Dk, Dv] matching query's B, H, Dk = (2, 3, 8); got (3, 8, 5)",
        ),
        (
            bad(efficient_attention, Q, K.float(), V),
            ValueError,
            "key must have query's dtype and device torch.float64 cpu; got torch.float32 cpu",
        ),
        (
            bad(efficient_attention, Q, K, V.float()),
            ValueError,
            "value must have query's dtype and device torch.float64 cpu; got torch.float32 cpu",
        ),
        (
            bad(efficient_attention, Q, K.to("meta"), V),
            ValueError,
            "key must have query's dtype and device torch.float64 cpu; got torch.float64 meta",
        ),
        (
            bad(summarize, K, V.to("meta")),
            ValueError,
            "value must have key's dtype and device torch.float64 cpu; got torch.float64 meta",
        ),
        (
            bad(attend, Q, Context(*(x.to("meta") for x in CONTEXT))),
            ValueError,
            "context must be torch.float64 on cpu for a query of torch.float64; got torch.float64 meta",
        ),
        # Masks.
        (
            bad(efficient_attention, Q, K, V, key_mask=[True]),
            TypeError,
            "key_mask must be a tensor, bool [B, M] or [B, H, M], B and H perhaps 1, for B, H, M = (2, 3, 53); "
            "got list",
        ),
        (
            bad(efficient_attention, Q, K, V, key_mask=torch.ones(2, 53)),
            TypeError,
            "key_mask must be bool [B, M] or [B, H, M], B and H perhaps 1, for B, H, M = (2, 3, 53); got torch.float32",
        ),
        (
            bad(summarize, K, V, key_mask=torch.ones(2, 37).bool()),
            ValueError,
            "key_mask must be bool [B, M] or [B, H, M], B and H perhaps 1, for B, H, M = (2, 3, 53); got shape (2, 37)",
        ),
        (
            bad(summarize, K, V, key_mask=torch.ones(3, 53).bool()),
            ValueError,
            "key_mask must be bool [B, M] or [B, H, M], B and H perhaps 1, for B, H, M = (2, 3, 53); got shape (3, 53)",
        ),
        (
            bad(efficient_attention, Q, K, V, key_mask=torch.ones(2, 3, 37, 53).bool()),
            ValueError,
            "got shape (2, 3, 37, 53)",
        ),
        (
            bad(efficient_attention, Q, K, V, key_mask=torch.ones(2, 1).bool()),
            ValueError,
            "got shape (2, 1)",
        ),
        (
            bad(dot_product_attention, Q, K, V, key_mask=torch.ones(37, 53).bool()),
            ValueError,
            "got shape (37, 53)",
        ),
        (
            bad(efficient_attention, Q, K, V, key_mask=torch.ones(2, 53).bool().to("meta")),
            ValueError,
            "key_mask must be on key's device cpu; got meta",
        ),
    ],
)
def test_misuse_names_the_argument_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_context_of_another_precision_is_refused(dtype):
    message = f"context must be torch.float32 on cpu for a query of {dtype}; got torch.float64 cpu"
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(Q.to(dtype), CONTEXT)


def test_quadratic_order_is_chosen_for_short_inputs_only():
    # Crossover at 2 * 8 * 5 / 13 = 6.2 positions.
    for length, order in ((6, "quadratic"), (7, "linear")):
        query, key, value = make_inputs(queries=length, keys=length, dtype=torch.float32)
        auto = efficient_attention(query, key, value)
        assert torch.equal(auto, efficient_attention(query, key, value, order=order))
        other = {"linear": "quadratic", "quadratic": "linear"}[order]
        assert not torch.equal(auto, efficient_attention(query, key, value, order=other))


def test_few_queries_do_not_make_memory_grow_with_the_keys():
    # One query has fewer multiply-adds in the quadratic order, but that keeps both softmaxes in memory.
    query, key, value = make_inputs(1, 8, 1, 65_536, 64, 64, dtype=torch.float32)
    assert peak_bytes(lambda: efficient_attention(query, key, value)) < 8_000_000


def test_shapes_can_be_planned_on_the_meta_device():
    query, key, value = (x.to("meta") for x in make_inputs())
    for order in ("linear", "quadratic"):
        assert efficient_attention(query, key, value, order=order).shape == (2, 3, 37, 5)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("order", ["auto", "linear", "quadratic"])
@pytest.mark.parametrize("lengths", [(37, 53), (3, 4)])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_results_are_written_to_memory_that_is_there(backend, order, lengths, normalization):
    if (backend, order) == ("blocked", "quadratic"):
        pytest.skip("it has one order")
    query, key, value = make_inputs(2, 3, *lengths, 5, 5)
    options = {"backend": backend, "order": order, "normalization": normalization}
    expected = efficient_attention(query, key, value, **options)
    for out in (
        torch.empty_like(query),
        torch.empty(2, 3, 5, lengths[0], dtype=query.dtype).mT,
        torch.empty(2, lengths[0], 3, 10, dtype=query.dtype)[..., ::2].transpose(1, 2),
        query.clone(),
    ):
        returned = efficient_attention(query, key, value, out=out, **options)
        assert returned is out
        torch.testing.assert_close(out, expected)
    version = query._version
    assert efficient_attention(query, key, value, out=query, **options) is query
    torch.testing.assert_close(query, expected)
    # Who kept the query for a backward pass is told.
    assert query._version > version


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_results_may_overlap_with_queries(backend):
    whole = torch.randn(1, 2, 20_100, 32)
    query, out = whole[:, :, :20_000], whole[:, :, 64:20_064]
    key, value = torch.randn(2, 1, 2, 300, 32)
    expected = efficient_attention(query.clone(), key, value, backend=backend)
    efficient_attention(query, key, value, out=out, backend=backend)
    torch.testing.assert_close(out, expected)


def test_negative_views_are_resolved():
    query, key, value = torch.randn(3, 1, 1, 100, 16, dtype=torch.complex64).conj().imag
    assert query.is_neg()
    mask = torch.rand(1, 100) > 0.5
    for key_mask in (None, mask):
        got = efficient_attention(query, key, value, key_mask=key_mask, order="linear")
        expected = efficient_attention(
            *(x.resolve_neg() for x in (query, key, value)),
            key_mask=key_mask,
            backend="reference",
            order="linear",
        )
        torch.testing.assert_close(got, expected)


def test_attending_writes_to_memory_that_is_there_and_takes_no_other():
    query, key, value = make_inputs(1, 2, 20_000, 300, 64, 64, dtype=torch.float32)
    memory = summarize(key, value)
    expected = attend(query, memory)
    out = torch.empty_like(expected)
    assert peak_bytes(lambda: attend(query, memory, out=out)) < 5_000_000 < out.nbytes
    assert torch.equal(out, expected)


@pytest.mark.parametrize("lengths", [(37, 53), (3, 4)])
def test_memory_that_does_not_fit_is_refused(lengths):
    query, key, value = make_inputs(2, 3, *lengths)
    out = efficient_attention(query, key, value)
    for wrong, message in (
        (out.tolist(), "out must be a tensor"),
        (out[:, :, :-1], "out must have shape"),
        (out.float(), "out must have query's dtype"),
        (out.to("meta"), "out must have query's dtype and device"),
        (out[:, :, :1].expand_as(out), "out must not overlap with itself"),
        (out.clone().requires_grad_(), "out must be None where gradients are recorded"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            efficient_attention(query, key, value, out=wrong)
        with pytest.raises((TypeError, ValueError), match=message):
            attend(query, summarize(key, value), out=wrong)
    with pytest.raises(ValueError, match="out must be None where gradients are recorded"):
        efficient_attention(query, key.requires_grad_(), value, out=out)
    with torch.no_grad():
        assert efficient_attention(query, key, value, out=out) is out
