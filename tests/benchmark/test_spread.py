"""What several seeds say, worked out by hand."""

import pytest

from efficient_attention.benchmark.spread import differences, percentiles, spread


def test_mean_and_deviation_are_those_of_a_sample():
    # Around 5: -3, -1, -1, -1, 0, 0, 2, 4; squares add up to 32, and 32 / 7 is 4.571.
    found = spread(dict(enumerate([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])))
    assert found.mean == 5
    assert found.deviation == pytest.approx((32 / 7) ** 0.5)


def test_one_seed_says_nothing_of_its_spread():
    assert spread({3: 1.5}) == (1.5, None, {3: 1.5})


def test_differences_are_paired_by_seed():
    # Scores spread by 10 and more over the seeds, their differences 1, 2 and 3 by 1.
    values, baseline = {0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0}
    assert differences(values, baseline) == (2.0, 1.0, {0: 1.0, 1: 2.0, 2: 3.0})


def test_seeds_that_are_not_the_same_have_no_differences():
    with pytest.raises(
        ValueError, match=r"baseline must have the seeds of values, \[0, 1\]; got \[0, 2\]"
    ):
        differences({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="by_seed must have a value"):
        spread({})


def test_percentiles_lie_between_values():
    # Of 0, 10, ..., 50: the 20th at a fifth of the five steps, the median half a step behind the middle ones' first.
    assert percentiles([50.0, 0.0, 30.0, 20.0, 40.0, 10.0]) == [10.0, 25.0, 40.0]
