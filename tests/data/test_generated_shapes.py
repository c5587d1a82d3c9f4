"""Generated pictures: the truth about them is exact, and the same wherever and however often they are made."""

import json
import math
import stat

import pytest
import torch
from torch.utils.data import DataLoader

from efficient_attention.data import generated_shapes
from efficient_attention.data.batches import collate_lists
from efficient_attention.data.coco import CocoInstances
from efficient_attention.data.draws import Draw
from efficient_attention.data.generated_shapes import GeneratedShapes, write_coco
from efficient_attention.data.outlines import OUTLINES, figure


def same(first, second):
    (image, target), (other_image, other_target) = first, second
    assert torch.equal(image, other_image)
    assert target.keys() == other_target.keys()
    for name, value in target.items():
        other = other_target[name]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        else:
            assert value == other, name


AREAS = {
    "ellipse": math.pi,
    "rectangle": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    "ring": math.pi * (1 - 0.55**2),
    "cross": 8 * 0.3 * math.sqrt(1 - 0.3**2) - 4 * 0.3**2,
}


@pytest.mark.parametrize("name", OUTLINES)
def test_figures_have_the_area_of_their_equation(name):
    patch = figure(
        OUTLINES[name], (300, 300), centre=(150.3, 149.6), radius=120, angle=0.4, slim=0.7
    )
    # The outline is at most 10 radii long, and a pixel on it may count or not.
    assert abs(int(patch.inside.sum()) - AREAS[name] * 120**2 * 0.7) < 0.05 * 10 * 120


@pytest.mark.parametrize("name", OUTLINES)
def test_figures_reach_the_ends_of_their_disc_and_no_farther(name):
    patch = figure(OUTLINES[name], (300, 300), centre=(150, 150), radius=120)
    y, x = (patch.inside.nonzero() + 0.5 - 120).unbind(1)
    assert 118.5 < torch.hypot(y, x).max() <= 120.8


def test_a_figure_beyond_the_border_is_the_part_of_the_whole():
    options = {"radius": 20.0, "angle": 1.0, "slim": 0.8}
    whole = torch.zeros(80, 80, dtype=torch.bool)
    rows, columns, inside = figure(OUTLINES["star"], (80, 80), centre=(32, 68), **options)
    whole[rows, columns] = inside
    part = torch.zeros(50, 60, dtype=torch.bool)
    rows, columns, inside = figure(OUTLINES["star"], (50, 60), centre=(2, 58), **options)
    part[rows, columns] = inside
    assert torch.equal(part, whole[30:, 10:70])


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (200, 120)])
def test_boxes_and_areas_are_those_of_what_is_seen(size):
    data = GeneratedShapes(6, size=size)
    for image, target in (data[i] for i in range(6)):
        assert image.shape == (3, *size)
        assert 0 <= image.min() < image.max() <= 1
        masks = target["masks"]
        assert len(masks) == len(target["boxes"]) == len(target["labels"]) >= 1
        assert masks.sum(0).max() == 1
        assert torch.equal(target["area"], masks.sum((1, 2)).float())
        assert target["area"].min() >= 24
        for mask, box in zip(masks, target["boxes"], strict=True):
            low, high = mask.nonzero().aminmax(dim=0)
            assert box.tolist() == [*low.flip(0).tolist(), *(high.flip(0) + 1).tolist()]


def test_masks_lie_on_the_pixels_of_their_object():
    # Away from its border, noise and pattern are all that differs from an object's own colour.
    data = GeneratedShapes(8, size=(160, 160), seed=4)
    for image, target in (data[i] for i in range(8)):
        for mask in target["masks"]:
            edge = torch.nn.functional.max_pool2d(1.0 - mask[None].float(), 5, 1, 2)[0]
            core = edge == 0
            if core.sum() > 200:
                spread = image[:, core].std(1).max()
                assert spread < 0.17
                assert image.std((1, 2)).max() > 0.05


def test_objects_are_never_hidden(monkeypatch):
    # Crowded enough that most places are refused.
    data = GeneratedShapes(3, size=(64, 64), min_objects=30, max_objects=30)
    for _, target in (data[i] for i in range(3)):
        assert 3 < len(target["masks"]) <= 30
        assert target["area"].min() >= 24
    monkeypatch.setattr(generated_shapes, "_VISIBLE_PIXELS", 0)
    monkeypatch.setattr(generated_shapes, "_VISIBLE_SHARE", 0.0)
    assert min(data[i][1]["area"].min() for i in range(3)) < 24


def test_every_class_occurs():
    data = GeneratedShapes(40, size=(96, 96))
    labels = torch.cat([target["labels"] for _, target in (data[i] for i in range(40))])
    assert labels.unique().tolist() == [c.label for c in data.categories] == list(range(1, 7))
    assert data.num_classes == 7


def test_a_sample_follows_from_seed_and_index_alone():
    data = GeneratedShapes(5, size=(48, 48), seed=2)
    expected = data[3]
    torch.manual_seed(77)
    data[0]
    same(GeneratedShapes(50, size=(48, 48), seed=2)[3], expected)
    same(data[Draw(3, 123)], expected)
    assert not torch.equal(GeneratedShapes(5, size=(48, 48), seed=3)[3][0], expected[0])
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate_lists)
    samples = [sample for batch in loader for sample in zip(*batch, strict=True)]
    assert len(samples) == 5
    for i, sample in enumerate(samples):
        same(sample, data[i])


def test_pictures_may_be_empty():
    data = GeneratedShapes(20, size=(32, 32), min_objects=0, max_objects=1)
    counts = {len(data[i][1]["boxes"]) for i in range(20)}
    assert counts == {0, 1}
    empty = next(target for _, target in data if not len(target["boxes"]))
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 32, 32)


def test_a_written_folder_is_read_back_equal(tmp_path):
    data = GeneratedShapes(6, size=(48, 80), min_objects=0, max_objects=6)
    write_coco(data, tmp_path / "new" / "shapes")
    folder = tmp_path / "new" / "shapes"
    back = CocoInstances(folder / "images", folder / "instances.json")
    assert len(back) == len(data)
    assert back.categories == data.categories
    for i in range(len(data)):
        same(back[i], data[i])
    assert back.ground_truth() == data.ground_truth()
    assert torch.equal(back.aspect_ratios, data.aspect_ratios)
    assert "seed=0" in json.loads((folder / "instances.json").read_text())["info"]["description"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data = GeneratedShapes(3, size=(32, 32))
    monkeypatch.setattr(generated_shapes, "coco_of", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_coco(data, tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match=r"folder must be a new one; '.*mine' exists"):
        write_coco(data, tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be positive; got 0"),
        ({"size": (31, 64)}, r"size must be \(H, W\) of at least 32 pixels; got \(31, 64\)"),
        ({"max_objects": 0, "min_objects": 0}, "max_objects must be positive"),
        ({"max_objects": 2, "min_objects": 3}, "from 0 to max_objects; got 2 and 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedShapes(**{"length": 1, **options})


def test_there_are_no_samples_beyond_the_length():
    with pytest.raises(IndexError, match="below 2, the number of samples; got 2"):
        GeneratedShapes(2)[2]


def test_of_what_is_in_the_picture_two_fifths_are_seen_of_every_object(monkeypatch):
    place, counts = GeneratedShapes._place, []

    def counted(self, label, owner, objects, random):
        patch = place(self, label, owner, objects, random)
        counts.extend(objects[1:])
        return patch

    monkeypatch.setattr(GeneratedShapes, "_place", counted)
    list(GeneratedShapes(10, size=(48, 48), min_objects=20, max_objects=20))
    # Some are hidden nearly so far, or nothing would be tested.
    assert 0.4 <= min(pixels.seen / pixels.all for pixels in counts) < 0.5
