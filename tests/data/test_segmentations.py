"""Masks are those that pycocotools makes, and what it would misread is told."""

import math

import numpy as np
import pytest
import torch

from efficient_attention.data.segmentations import decode_masks, encode_masks, segmentation_fault

coco = pytest.importorskip("pycocotools.mask")

SQUARE = [[1, 0, 3, 0, 3, 2, 1, 2]]
# Columns of [[0, 1, 1, 0], [0, 1, 1, 0]].
RUNS = {"size": [2, 4], "counts": [2, 4, 2]}


def blobs(count, height, width):
    """Masks with holes and many runs, an empty and a full one."""
    fields = torch.rand(count, 1, 6, 6)
    fields = torch.nn.functional.interpolate(fields, (height, width), mode="bilinear")[:, 0]
    return (fields > torch.linspace(-0.1, 1.1, count)[:, None, None]).to(torch.uint8)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 200), (480, 640)])
def test_masks_make_the_round_trip(size):
    masks = blobs(12, *size)
    outlines = encode_masks(masks)
    for outline, mask in zip(outlines, masks, strict=True):
        assert (segmentation_fault(outline, *size) is None) == bool(mask.any())
    decoded = decode_masks(outlines, *size)
    assert torch.equal(decoded, masks)
    assert decoded.dtype == torch.uint8


def test_run_lengths_are_those_of_pycocotools():
    masks = blobs(12, 50, 70)
    for outline, mask in zip(encode_masks(masks), masks, strict=True):
        expected = coco.encode(np.asfortranarray(mask.numpy()))
        assert outline == {"size": [50, 70], "counts": expected["counts"].decode()}


@pytest.mark.parametrize("segmentation", [SQUARE, RUNS, {"size": [2, 4], "counts": "242"}])
def test_every_form_gives_the_same_pixels(segmentation):
    assert segmentation_fault(segmentation, 2, 4) is None
    assert decode_masks([segmentation], 2, 4).tolist() == [[[0, 1, 1, 0], [0, 1, 1, 0]]]


def test_polygons_are_filled_as_pycocotools_does_and_their_union_taken():
    angles = torch.linspace(0, 2 * math.pi, 40)[:-1]
    star = 30 + 10 * torch.sin(5 * angles)
    polygons = [
        torch.stack([x + star * angles.cos(), y + star * angles.sin()], 1).flatten().tolist()
        for x, y in ((40, 40), (60.5, 70.25), (115, 10))
    ]
    expected = coco.decode([coco.merge(coco.frPyObjects(polygons, 100, 120))])[:, :, 0]
    assert torch.equal(decode_masks([polygons], 100, 120)[0], torch.from_numpy(expected))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[3.9, 1.9, 44, 2, 44, 22]],
        [[-40, -40, 0.1, 0.1, -40, 0]],
        [[9, 9, 10, 9, 10, 10], [0, 0, 1, 0, 1, 1]],
        {"size": [2, 4], "counts": [0, 8]},
    ],
)
def test_a_part_in_the_image_is_enough(segmentation):
    assert segmentation_fault(segmentation, 2, 4) is None


def test_no_segmentation_makes_no_mask():
    assert decode_masks([], 5, 6).shape == (0, 5, 6)
    assert encode_masks(torch.zeros(0, 5, 6)) == []


def test_polygons_and_runs_are_scaled_with_the_image():
    polygon = [[10, 20, 50, 20, 50, 80, 10, 80]]
    whole = decode_masks([polygon], 100, 60)
    half = torch.zeros(50, 30, dtype=torch.uint8)
    half[10:40, 5:25] = 1
    for segmentation in (polygon, encode_masks(whole)[0]):
        assert torch.equal(decode_masks([segmentation], 100, 60, size=(50, 30))[0], half)


def test_nearest_pixels_are_those_at_the_centres():
    # A row of 5 becomes 3: centres at 5/6, 15/6 and 25/6 of the old pixels, which are 0, 2 and 4.
    runs = encode_masks(torch.tensor([[[1, 0, 1, 0, 0]]]))
    assert decode_masks(runs, 1, 5, size=(1, 3)).tolist() == [[[1, 1, 0]]]


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        (None, "it is absent"),
        ("garbage", "got 'garbage'"),
        ([], r"must have a polygon; got \[\]"),
        ([[]], "got 0 numbers, not three points"),
        ([[1, 1, 3, 3]], "got 4 numbers, not three points"),
        ([[1, 1, 3, 3, 2]], "got 5 numbers"),
        ([[1, 1, 3, 3, 2, 0, 4]], "got 7 numbers"),
        ([[0, 0, math.nan, 0, 3, 3]], "finite numbers; got .*nan"),
        ([[0, 0, math.inf, 0, -math.inf, 3]], "finite numbers; got .*inf"),
        ([[0, 0, 10**400, 0, 3, 3]], "finite numbers; got .0, 0, 10"),
        # pycocotools takes its time, or falls, on the way there.
        ([[0, 0, 1e12, 0, 1e12, 1e12]], "points in the image of 4 x 2 or near it; got .0, 0, 1"),
        (
            [[0, 0, 3, 0, 3, -41]],
            "points in the image of 4 x 2 or near it; got .0, 0, 3, 0, 3, -41",
        ),
        ([[-41, 0, 3, 0, 3, 1]], "points in the image .* got .-41"),
        ([[0, 0, 3, 0, 3, 43]], "points in the image .* 43"),
        ([[0, 0, 45, 0, 3, 3]], "points in the image .* 45"),
        ([[4, 0, 9, 0, 9, 2], [0, 2, 3, 2, 3, 9]], "cover something of the image of 4 x 2; got"),
        ([[-3, 0, 0, 0, 0, 2], [0, -2, 3, -2, 3, 0]], "cover something of the image of 4 x 2"),
        ({"size": [2, 4], "counts": [8]}, "cover something of the image; got run lengths"),
        ({"size": [2, 4], "counts": [4, 0, 4]}, "cover something of the image; got run lengths"),
        ([["0", "0", "1", "0", "3", "3"]], "got .'0', "),
        ([1, 1, 3, 1, 3, 3], "got 1"),
        ({"size": [4, 2], "counts": [2, 4, 2]}, r"size \[2, 4\]; got \[4, 2\]"),
        ({"counts": [2, 4, 2]}, r"size \[2, 4\]; got None"),
        ({"size": [2, 4]}, "integers or a string; got None"),
        ({"size": [2, 4], "counts": [2, 4.0, 2]}, "integers or a string; got"),
        ({"size": [2, 4], "counts": "24\u00e92"}, "integers or a string; got"),
        ({"size": [2, 4], "counts": "24 2"}, "integers or a string; got"),
        # A last character that says that more follow.
        ({"size": [2, 4], "counts": "24R"}, "integers or a string; got"),
        ({"size": [2, 4], "counts": ""}, "integers or a string; got"),
        ({"size": [2, 4], "counts": "o" * 40 + "0"}, "integers or a string; got"),
        ({"size": [2, 4], "counts": "24"}, "sum to the image's 8 pixels; got 6"),
        ({"size": [2, 4], "counts": []}, "sum to the image's 8 pixels; got 0"),
        ({"size": [2, 4], "counts": [2, 4]}, "sum to the image's 8 pixels; got 6"),
        ({"size": [2, 4], "counts": [2, 10**30]}, "pixels; got 10"),
        ({"size": [2, 4], "counts": [10, -4, 2]}, "got 8, of which the least is -4"),
    ],
)
def test_what_is_no_segmentation_is_told(segmentation, fault):
    found = segmentation_fault(segmentation, 2, 4)
    assert found is not None
    with pytest.raises(ValueError, match=fault):
        raise ValueError(found)
