"""The comparison that all other tests rest on can fail."""

import pytest
import torch

from efficient_attention.testing import assert_as_precise_as_plain, relative_error

TRUTH = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_relative_error_matches_hand_computed_numbers():
    assert relative_error(TRUTH + torch.tensor([0.3, 0.4]).double(), TRUTH) == pytest.approx(0.1)


def test_twice_the_plain_error_passes_and_more_fails():
    plain = (TRUTH * 1.01).float()
    assert_as_precise_as_plain((TRUTH * 1.019).float(), plain, TRUTH)
    with pytest.raises(
        AssertionError, match=r"output: relative error 2\.10e-02, allowed 2\.00e-02"
    ):
        assert_as_precise_as_plain((TRUTH * 1.021).float(), plain, TRUTH, "output")


def test_nan_fails():
    with pytest.raises(AssertionError):
        assert_as_precise_as_plain(torch.tensor([torch.nan, 4.0]), TRUTH.float(), TRUTH)
