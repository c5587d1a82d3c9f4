"""Errors of disparities, worked out by hand."""

import pytest
import torch

from efficient_attention.metrics.stereo import StereoMetrics

# One image: errors 0.5, 1.5, 2.5 and 3.5 px where the truth is 10, 20, 60 and 80 px.
TRUTH = torch.tensor([[[10.0, 20.0], [60.0, 80.0]]])
GUESS = torch.tensor([[[10.5, 18.5], [62.5, 76.5]]])
KNOWN = torch.ones(1, 2, 2, dtype=torch.bool)


def scores(prediction, disparity, valid=None, visible=None, **protocol):
    metrics = StereoMetrics(**protocol)
    valid = torch.ones_like(disparity, dtype=torch.bool) if valid is None else valid
    metrics.update(prediction, disparity, valid, visible)
    return metrics.compute()


def test_scores_equal_those_worked_out_by_hand():
    result = scores(GUESS, TRUTH)
    assert result.end_point_error == (0.5 + 1.5 + 2.5 + 3.5) / 4
    assert (result.bad_1, result.bad_2, result.bad_3) == (75, 50, 25)
    # 3.5 px of 80 are 4.4 %: bad, but no outlier of KITTI's.
    assert result.d1_all == 0
    assert (result.images, result.skipped, result.pixels) == (1, 0, 4)


@pytest.mark.parametrize(
    ("truth", "error", "outlier"),
    [
        *((40, 3.5, True), (40, 2.5, False), (100, 4.5, False), (100, 5.5, True)),
        # No more than three pixels, and no more than five percent.
        *((40, 3, False), (80, 4, False)),
    ],
)
def test_outliers_of_kitti_exceed_three_pixels_and_five_percent(truth, error, outlier):
    truth = torch.full((1, 1, 1), float(truth))
    assert scores(truth - error, truth).d1_all == 100 * outlier


def test_bad_pixels_are_off_by_more_than_the_threshold():
    truth = torch.full((1, 1, 4), 50.0)
    result = scores(truth + torch.tensor([1.0, 2.0, 3.0, 4.0]), truth)
    assert (result.bad_1, result.bad_2, result.bad_3) == (75, 50, 25)


def test_pixels_count_between_zero_and_the_bound():
    truth = torch.tensor([[[0.0, -1.0, 5.0, 191.0, 192.0, 300.0]]])
    result = scores(truth + 2, truth)
    assert (result.pixels, result.end_point_error) == (2, 2)
    assert scores(truth + 2, truth, max_disparity=None).pixels == 4
    assert scores(truth + 2, truth, max_disparity=100).pixels == 1


def test_what_is_unknown_does_not_count_whatever_it_holds():
    truth = torch.tensor([[[torch.nan, torch.inf, 7.0, 8.0]]])
    valid = torch.tensor([[[False, False, False, True]]])
    guess = torch.tensor([[[torch.nan, 1.0, torch.inf, 9.0]]])
    result = scores(guess, truth, valid)
    assert (result.pixels, result.end_point_error) == (1, 1)


def test_occluded_pixels_count_unless_they_are_left_out():
    visible = torch.tensor([[[True, True], [True, False]]])
    assert scores(GUESS, TRUTH, visible=visible).end_point_error == 2
    result = scores(GUESS, TRUTH, visible=visible, occluded=False)
    assert (result.end_point_error, result.pixels) == (1.5, 3)


def test_the_average_is_over_pixels_or_over_images():
    # Errors of 1 in four pixels of the first image, and of 6 in one of the second.
    truth = torch.full((2, 1, 4), 10.0)
    guess = truth + torch.tensor([1.0, 6.0])[:, None, None]
    valid = torch.tensor([[[True] * 4], [[True] + [False] * 3]])
    assert scores(guess, truth, valid).end_point_error == (4 * 1 + 6) / 5
    assert scores(guess, truth, valid).bad_3 == 20
    assert scores(guess, truth, valid, average="image").end_point_error == (1 + 6) / 2
    assert scores(guess, truth, valid, average="image").d1_all == 50


@pytest.mark.parametrize("average", ["pixel", "image"])
def test_images_without_a_valid_pixel_are_counted_and_change_nothing(average):
    truth = torch.stack([TRUTH[0], torch.zeros(2, 2)])
    guess = torch.stack([GUESS[0], torch.full((2, 2), torch.nan)])
    result = scores(guess, truth, average=average)
    assert result.end_point_error == 2
    assert (result.images, result.skipped, result.pixels) == (1, 1, 4)


def test_images_with_few_valid_pixels_are_skipped_on_demand():
    valid = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    truth, guess = TRUTH.repeat(2, 1, 1), GUESS.repeat(2, 1, 1)
    result = scores(guess, truth, valid, least_valid=0.5)
    assert (result.end_point_error, result.images, result.skipped) == (1, 1, 1)
    assert result.pixels == 2


def test_a_prediction_that_is_no_number_is_bad_and_shows():
    guess = torch.tensor([[[torch.nan, 20.0], [60.0, 80.0]]])
    result = scores(guess, TRUTH)
    assert (result.bad_1, result.bad_3, result.d1_all) == (25, 25, 25)
    assert result.end_point_error != result.end_point_error


@pytest.mark.parametrize("average", ["pixel", "image"])
@pytest.mark.parametrize("cuts", [(7,), (1, 6), (3, 2, 2), (7, 0)])
def test_batches_and_processes_do_not_change_the_scores(average, cuts):
    truth = torch.rand(7, 4, 5) * 250
    guess, valid = truth + 4 * torch.randn(7, 4, 5), torch.rand(7, 4, 5) > 0.4
    whole = scores(guess, truth, valid, average=average)
    merged = StereoMetrics(average=average)
    for part in zip(*(x.split(cuts) for x in (guess, truth, valid)), strict=True):
        of_process = StereoMetrics(average=average)
        of_process.update(*part)
        merged = merged.merge(of_process)
    assert merged.compute()[5:] == whole[5:]
    assert merged.compute()[:5] == pytest.approx(whole[:5], rel=1e-12)


def test_sums_keep_what_float32_would_lose():
    truth = torch.ones(2, 1, 1)
    guess = torch.tensor([2.0**25 + 1, 2.0], dtype=torch.float64)[:, None, None]
    assert scores(guess, truth).end_point_error == (2**25 + 1) / 2


def test_reset_forgets():
    metrics = StereoMetrics()
    metrics.update(GUESS, TRUTH, KNOWN)
    metrics.reset()
    metrics.update(TRUTH, TRUTH, KNOWN)
    assert metrics.compute().end_point_error == 0
    assert metrics.compute().images == 1


def test_the_protocol_is_said_with_the_scores():
    result = scores(GUESS, TRUTH, visible=KNOWN, occluded=False, average="image", least_valid=0.1)
    assert (
        result.protocol
        == "0 < d < 192 px, occluded pixels out, mean over images, images with less than 10% out"
    )


def test_another_protocol_is_not_merged():
    with pytest.raises(
        ValueError, match=r"other must have the protocol '0 < d < 192 px.*got '0 < d,"
    ):
        StereoMetrics().merge(StereoMetrics(max_disparity=None))


def test_scores_of_nothing_are_an_error():
    metrics = StereoMetrics()
    metrics.update(GUESS, TRUTH, ~KNOWN)
    with pytest.raises(ValueError, match="got 1 images without"):
        metrics.compute()


def test_what_does_not_fit_is_named():
    metrics = StereoMetrics(occluded=False)
    with pytest.raises(ValueError, match="visible must be given under occluded=False"):
        metrics.update(GUESS, TRUTH, KNOWN)
    with pytest.raises(ValueError, match=r"prediction and visible .*\(1, 2, 2\) and \(2, 2\)"):
        metrics.update(GUESS, TRUTH, KNOWN, KNOWN[0])
    with pytest.raises(ValueError, match="average must be 'pixel' or 'image'; got 'batch'"):
        StereoMetrics(average="batch")
    with pytest.raises(ValueError, match=r"least_valid must be a share in \[0, 1\]; got 10"):
        StereoMetrics(least_valid=10)
    with pytest.raises(ValueError, match="max_disparity must be positive or None; got 0"):
        StereoMetrics(max_disparity=0)
