"""Calibrations, depths and points against numbers that were worked out by hand."""

import struct

import pytest
import torch

from efficient_attention.data.disparity_files import read_disparity_png
from efficient_attention.errors import InputError
from efficient_attention.prediction import (
    Calibration,
    depth_of,
    points_of,
    read_calibration,
    write_depth_png,
    write_ply,
)

MIDDLEBURY = """cam0=[4000 0 1300.5; 0 4000 1000; 0 0 1]
cam1=[4000 0 1400.5; 0 4000 1000; 0 0 1]
doffs=100
baseline=200
width=2960
height=2016
ndisp=280
"""
# f = 700 px; -f b is 35 and -315 px m: the cameras are 0.5 m apart.
KITTI = """calib_time: 09-Jan-2012 13:57:47
P0: 7e+02 0 6e+02 0 0 7e+02 1.8e+02 0 0 0 1 0
P1: 7e+02 0 6e+02 -3.5e+02 0 7e+02 1.8e+02 0 0 0 1 0
P2: 7e+02 0 6e+02 3.5e+01 0 7e+02 1.8e+02 2.1e-01 0 0 1 2.7e-03
P3: 7e+02 0 6.02e+02 -3.15e+02 0 7e+02 1.8e+02 2.2e+00 0 0 1 2.7e-03
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "calib.txt").write_text(text)
        return read_calibration(tmp_path / "calib.txt")

    return read


def test_middlebury_is_read(read):
    assert read(MIDDLEBURY) == Calibration(4000, 0.2, 100, 1300.5, 1000, 2960, 2016)


def test_kitti_is_read_colour_before_gray(read):
    assert read(KITTI) == Calibration(700, 0.5, 2.0, 600, 180)
    gray = "".join(line for line in KITTI.splitlines(True) if line[:2] in ("P0", "P1"))
    assert read(gray) == Calibration(700, 0.5, 0, 600, 180)


def test_rectified_projections_of_raw_kitti_are_read_with_their_size(read):
    text = KITTI.replace("P2:", "P_rect_02:").replace("P3:", "P_rect_03:")
    assert read(f"{text}S_rect_02: 1.242e+03 3.75e+02\n")[-2:] == (1242, 375)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must have cam0=.* got .* with neither"),
        ("P2: 1 2 3", "must have cam0=.* with P2"),
        ("cam0=[1 0 0; 0 1 0; 0 0 1]", "must give baseline as a number; got 'no such line'"),
        (MIDDLEBURY.replace("=200", "=wide"), "baseline as a number; got 'wide'"),
        (MIDDLEBURY.replace("=200", "=0"), "positive focal length .* and baseline"),
        (MIDDLEBURY.replace("; 0 0 1]", "]"), "cam0 as 9 numbers"),
        (KITTI.replace("-3.15e+02", "3.15e+02"), "positive focal length"),
        (
            KITTI.replace("P3: 7e+02", "P3: 8e+02"),
            "one positive focal length in P2 and P3; got 700, 800",
        ),
    ],
)
def test_calibration_that_cannot_be_is_told(read, text, expected):
    with pytest.raises(InputError, match=expected):
        read(text)


def test_depth_is_focal_times_baseline_by_disparity():
    # Middlebury: 4000 px * 0.2 m = 800 px m. (300 + 100): 2 m; (60 + 100): 5 m.
    disparity = torch.zeros(1, 400)
    disparity[0, [350, 351]] = torch.tensor([300.0, 60.0])
    depth = depth_of(disparity, Calibration(4000, 0.2, 100))
    assert depth[0, [350, 351]].tolist() == [2.0, 5.0]
    assert depth.count_nonzero() == 2


def test_depth_is_unknown_where_it_would_be_infinite_or_the_match_is_outside():
    disparity = torch.tensor([[0.5, 1.0, -1.0, 0.0, 3.0, 1e-40, torch.nan]])
    depth = depth_of(disparity, Calibration(2.0, 1.0))
    # At column 0 half a pixel is already outside; at 1 the match is the first column.
    assert depth[0, :5].tolist() == [0, 2.0, 0, 0, pytest.approx(2 / 3)]
    assert depth[0, 5:].tolist() == [0, 0]
    # doffs may take a small disparity behind infinity.
    behind = depth_of(torch.full((1, 3), 1.0), Calibration(2.0, 1.0, doffs=-1.0))
    assert behind.tolist() == [[0, 0, 0]]


def test_depth_needs_the_size_of_its_calibration():
    with pytest.raises(ValueError, match="views of 3 x 2; got one of 6 x 2"):
        depth_of(torch.ones(2, 3), Calibration(1, 1, width=6))


def test_points_lie_on_the_rays_of_their_pixels():
    depth = torch.zeros(3, 5)
    depth[0, 4], depth[2, 1] = 10.0, 4.0
    points, known = points_of(depth, Calibration(focal=2.0, baseline=1.0, cx=1.0, cy=1.0))
    # (4 - 1) * 10 / 2 = 15 to the right, (0 - 1) * 10 / 2 = 5 up; then straight ahead, 2 down.
    assert points.tolist() == [[15.0, -5.0, 10.0], [0.0, 2.0, 4.0]]
    assert torch.equal(known, depth > 0)
    # Without a principal point, the middle of 5 x 3 pixels is that of column 2 and row 1.
    middle = torch.zeros(3, 5)
    middle[1, 2] = 7.0
    assert points_of(middle, Calibration(2.0, 1.0))[0].tolist() == [[0.0, 0.0, 7.0]]


def test_depth_png_has_millimetres_and_saturates(tmp_path):
    depth = torch.tensor([[0.0, 0.0001, 1.2344, 65.535, 65.5356, 1e6]])
    assert write_depth_png(tmp_path / "depth.png", depth) == 2
    stored = read_disparity_png(tmp_path / "depth.png", scale=1)
    # What is known is never 0.
    assert stored.tolist() == [[0, 1, 1234, 65535, 65535, 65535]]


def test_ply_is_what_its_header_says(tmp_path):
    points = torch.tensor([[1.5, -2.0, 3.0], [0.25, 0.0, 9.0]])
    colours = torch.tensor([[255, 0, 7], [1, 2, 3]], dtype=torch.uint8)
    write_ply(tmp_path / "a.ply", points, colours)
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert header.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 2",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
    ]
    assert list(struct.iter_unpack("<fffBBB", body)) == [
        (1.5, -2.0, 3.0, 255, 0, 7),
        (0.25, 0.0, 9.0, 1, 2, 3),
    ]
