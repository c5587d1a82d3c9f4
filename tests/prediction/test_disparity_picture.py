"""A disparity in colours: near is bright, pixels are pixels, and the scale tells what they are."""

import numpy as np
import pytest
import torch

from efficient_attention.prediction import draw_disparity
from efficient_attention.prediction.disparity_picture import _ticks

pytest.importorskip("matplotlib")
pytest.importorskip("PIL.Image")


def brightness(picture):
    return np.asarray(picture).astype(float) @ [0.2126, 0.7152, 0.0722]


def test_near_is_bright_and_far_is_dark_without_a_step_back():
    ramp = torch.linspace(0, 80, 400).expand(300, 400)
    bright = brightness(draw_disparity(ramp))[150, :400]
    assert bright[0] < 5
    assert bright[-1] > 230
    # Rounding to bytes is the only way down.
    assert np.diff(bright).min() > -1


def test_every_pixel_has_its_place_and_a_few_do_not_take_all_colours():
    disparity = torch.full((200, 300), 10.0)
    disparity[50:80, 20:60] = 30.0
    disparity[0, 0] = 5000.0
    bright = brightness(draw_disparity(disparity))
    assert bright[50:80, 20:60].min() > 200
    assert bright[81:200, :300].max() < 5


def test_scale_stands_beside_the_picture_and_inside():
    picture = draw_disparity(torch.linspace(10, 90, 480).view(-1, 1).expand(480, 640))
    pixels = np.asarray(picture)
    assert picture.height == 480
    assert 700 < picture.width < 800
    white = (pixels[:, 641:] == 255).all(2)
    # Nothing is cut off at the edges.
    assert white[0].all()
    assert white[-1].all()
    assert white[:, -1].all()
    assert not white.all()


def test_flat_disparity_can_be_drawn():
    pixels = np.asarray(draw_disparity(torch.full((200, 100), 7.0)))[:, :100]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 81.0, ["0", "10", "20", "30", "40", "50", "60", "70", "80"]),
        (21.5, 105.5, ["30", "40", "50", "60", "70", "80", "90", "100"]),
        (0.0, 2.1, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (6.5, 7.5, ["6.5", "6.6", "6.7", "6.8", "6.9", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5"]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    ticks = _ticks(low, high, room=20)
    assert list(ticks.values()) == expected
    assert [float(text) for text in expected] == pytest.approx(list(ticks))
