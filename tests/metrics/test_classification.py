"""Accuracies by hand."""

import math

import pytest
import torch

from efficient_attention.metrics.classification import ClassificationMetrics

# Of six classes, in falling order of their logits: 3 0 5 1 4 2.
LOGITS = [0.8, 0.4, 0.1, 0.9, 0.2, 0.6]


def scores(logits, labels):
    metrics = ClassificationMetrics()
    metrics.update(torch.tensor(logits), torch.tensor(labels))
    return metrics.compute()


@pytest.mark.parametrize(
    ("label", "top1", "top5"),
    [(3, 100, 100), (0, 0, 100), (5, 0, 100), (1, 0, 100), (4, 0, 100), (2, 0, 0)],
)
def test_a_sample_is_right_if_its_class_comes_soon_enough(label, top1, top5):
    assert scores([LOGITS], [label]) == (top1, top5, 1)


def test_scores_are_shares_of_all_samples_in_percent():
    # First, second, sixth and first: 2 of 4, and 3 of 4.
    assert scores([LOGITS] * 4, [3, 0, 2, 3]) == (50, 75, 4)


def test_a_network_that_does_not_decide_is_wrong():
    assert scores([[1.0] * 6], [0]) == (0, 0, 1)
    # Two share the first place.
    assert scores([[0.5, 0.5, 0, 0, 0, 0]], [1]) == (0, 100, 1)


@pytest.mark.parametrize("classes", [2, 6])
def test_what_is_not_a_number_is_wrong(classes):
    logits = [[math.nan] + [0.0] * (classes - 1)]
    assert scores(logits, [0]) == (0, 0, 1)
    assert scores([[math.nan] * classes], [1]) == (0, 0, 1)
    assert scores([[math.nan, *LOGITS]], [4]) == (0, 100, 1)
    assert scores([[math.inf, *LOGITS]], [0]) == (100, 100, 1)


def test_with_few_classes_top_5_is_always_right():
    assert scores([[0.1, 0.2, 0.3]], [0]) == (0, 100, 1)


def test_shares_of_processes_merge_to_the_whole():
    logits, labels = torch.randn(11, 8), torch.randint(8, (11,))
    whole = ClassificationMetrics()
    whole.update(logits, labels)
    shares = [ClassificationMetrics() for _ in range(2)]
    for i, share in enumerate(shares):
        for sample in range(i, 11, 2):
            share.update(logits[sample : sample + 1], labels[sample : sample + 1])
    before = shares[0].counts.clone()
    assert shares[0].merge(shares[1]).compute() == whole.compute()
    assert shares[1].merge(shares[0]).compute() == whole.compute()
    assert torch.equal(shares[0].counts, before)


def test_counts_are_exact_beyond_what_floats_hold():
    metrics = ClassificationMetrics()
    metrics.counts = torch.tensor([2**24, 2**24, 2**24])
    metrics.update(torch.tensor([LOGITS]), torch.tensor([3]))
    assert metrics.counts.tolist() == [2**24 + 1] * 3


def test_an_empty_batch_counts_nothing_and_no_sample_has_no_score():
    metrics = ClassificationMetrics()
    metrics.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="scores need a sample; got none"):
        metrics.compute()
    metrics.update(torch.eye(3), torch.arange(3))
    assert metrics.compute().top1 == 100
    metrics.reset()
    with pytest.raises(ValueError, match="got none"):
        metrics.compute()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(3),
            torch.zeros(3).long(),
            r"logits must be floating point \[B, K\]; got .*\(3,\)",
        ),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), r"got torch.int64 \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), r"labels must be int64 \[B\] with B = 2; got"),
        (torch.zeros(2, 3), torch.zeros(2, 3), r"got torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2), r"got torch.float32 \(2,\)"),
    ],
)
def test_other_shapes_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationMetrics().update(logits, labels)
