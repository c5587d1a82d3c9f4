"""Whatever is wrong with a COCO folder is told before the first sample, by file and id."""

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from efficient_attention.data.coco import CocoInstances
from efficient_attention.data.coco_checks import BadEntries

SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]
CONTENT = {
    "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}],
    "images": [
        {"id": 1, "file_name": "one.jpg", "width": 40, "height": 30},
        {"id": 2, "file_name": "two.png", "width": 40, "height": 30},
    ],
    "annotations": [
        {
            "id": 10 + image,
            "image_id": image,
            "category_id": 4,
            "bbox": [1, 1, 4, 4],
            "area": 16,
            "iscrowd": 0,
            "segmentation": SQUARE,
        }
        for image in (1, 2)
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for image in CONTENT["images"]:
        Image.fromarray(pixels).save(tmp_path / "images" / image["file_name"])
    return tmp_path


def coco(folder, content=CONTENT, **options):
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoInstances(folder / "images", folder / "instances.json", **options)


def changed(part, **changes):
    """The content with changes to the second of its images, annotations or categories."""
    content = copy.deepcopy(CONTENT)
    content[part][1].update(changes)
    return content


def test_a_sound_folder_has_no_problem(folder):
    assert coco(folder).problems == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 1, 0, 4]}, r"bbox must be .* of positive size in the image of 40 x 30; got"),
        ({"bbox": [5, 1, -4, 4]}, r"bbox must be .*; got \[5, 1, -4, 4\]"),
        ({"bbox": [1, 1, math.nan, 4]}, r"bbox must be .*; got \[1, 1, nan, 4\]"),
        ({"bbox": [1, 1, math.inf, 4]}, r"bbox must be .*; got \[1, 1, inf, 4\]"),
        ({"bbox": [40, 1, 4, 4]}, r"bbox must be .*; got \[40, 1, 4, 4\]"),
        ({"bbox": [1, -9, 4, 9]}, r"bbox must be .*; got \[1, -9, 4, 9\]"),
        ({"bbox": [1, 1, 4]}, r"bbox must be .*; got \[1, 1, 4\]"),
        ({"bbox": [5, 1, 1e-9, 4]}, r"bbox must be .*; got \[5, 1, 1e-09, 4\]"),
        ({"bbox": [1, 10**400, 4, 4]}, r"bbox must be .*; got \[1, 10"),
        ({"bbox": [1e300, 1, 1e300, 4]}, r"bbox must be .*; got \[1e\+300"),
        ({"bbox": ["1", 1, 4, 4]}, r"bbox must be .*; got \['1', 1, 4, 4\]"),
        ({"bbox": None}, r"bbox must be .*; got None"),
        ({"category_id": 0}, "category_id must be that of a category; got 0"),
        ({"category_id": 2}, "category_id must be that of a category; got 2"),
        ({"category_id": None}, "category_id must be that of a category; got None"),
        ({"category_id": "dog"}, "category_id must be that of a category; got 'dog'"),
        ({"category_id": [4]}, r"category_id must be that of a category; got \[4\]"),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1; got 2"),
        ({"segmentation": []}, r"segmentation must have a polygon; got \[\]"),
        ({"segmentation": [[1, 1, 3, 3]]}, "got 4 numbers, not three points or more"),
        ({"segmentation": None}, "segmentation must be polygons or run lengths; it is absent"),
        (
            {"segmentation": {"size": [40, 30], "counts": [600, 600]}},
            r"segmentation must have the image's size \[30, 40\]; got \[40, 30\]",
        ),
        (
            {"segmentation": {"size": [30, 40], "counts": [3, 2]}},
            "run lengths that sum to the image's 1200 pixels; got 5",
        ),
    ],
)
def test_a_bad_annotation_is_named_by_file_and_id(folder, changes, message):
    content = changed("annotations", **changes)
    with pytest.raises(BadEntries, match=message) as caught:
        coco(folder, content)
    (problem,) = caught.value.problems
    assert problem[:3] == ("two.png", 2, 12)
    assert "instances.json has 1 bad annotation: two.png (image 2), annotation 12: " in str(
        caught.value
    )
    assert str(caught.value).endswith("; on_bad='drop' leaves them out")
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        data = coco(folder, content, on_bad="drop")
    assert data.problems == (problem,)
    assert [len(target["labels"]) for _, target in data] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message", "name"),
    [
        ({"image_id": 99}, "image_id must be that of an image; got 99", "no image, annotation 12"),
        ({"image_id": None}, "image_id must be that of an image; got None", "no image"),
        ({"image_id": [2]}, r"image_id must be that of an image; got None", "no image"),
        ({"id": 11}, "id must be its own; another annotation has 11 too", "two.png"),
        ({"id": None}, "id must be an integer; got None", "two.png"),
    ],
)
def test_annotations_without_an_image_or_an_id_of_their_own_are_told(
    folder, changes, message, name
):
    content = changed("annotations", **changes)
    with pytest.raises(BadEntries, match=message) as caught:
        coco(folder, content)
    assert f": {name}" in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        assert len(coco(folder, content, on_bad="drop")[1][1]["labels"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": "three.png"}, r"three.png \(image 2\): no such file"),
        ({"file_name": None}, "file_name must be a string; got None"),
        ({"width": 30, "height": 40}, "the file has 40 x 30 pixels, its entry says 30 x 40"),
        ({"width": None}, "width and height must be positive integers; got None and 30"),
        ({"id": "2"}, "id must be an integer; got '2'"),
    ],
)
def test_a_bad_image_is_named_and_takes_its_annotations_along(folder, changes, message):
    content = changed("images", **changes)
    with pytest.raises(BadEntries, match=message) as caught:
        coco(folder, content)
    assert "has 1 bad image" in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        data = coco(folder, content, on_bad="drop")
    assert [target["image_id"] for _, target in data] == [1]
    assert len(data.ground_truth()["annotations"]) == 1


def test_images_of_one_id_are_all_bad_as_nobody_knows_whose_the_annotations_are(folder):
    content = changed("images", id=1)
    with pytest.raises(BadEntries, match="id must be its own; 2 images have 1") as caught:
        coco(folder, content)
    assert [p.file_name for p in caught.value.problems] == ["one.jpg", "two.png", None]
    content["images"].append({**CONTENT["images"][1], "id": 2})
    with pytest.warns(UserWarning, match="has 2 bad images, the first: one.jpg"):
        data = coco(folder, content, on_bad="drop")
    assert [target["image_id"] for _, target in data] == [2]


@pytest.mark.parametrize("name", ["one.jpg", "two.png"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", r"\(0 bytes\) must be a picture: it begins as none"),
        (lambda data: b"garbage" * 20, r"\(140 bytes\) must be a picture: it begins as none"),
        (lambda data: data[: len(data) // 2], "must be a picture: image file is truncated"),
        (lambda data: data[:-40], "must be a picture: image file is truncated"),
    ],
)
def test_a_damaged_file_is_found_before_it_is_trained_on(folder, name, damage, message):
    path = folder / "images" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadEntries, match=f"{name} .*{message}"):
        coco(folder)


def test_a_jpeg_with_something_behind_its_end_is_sound(folder):
    path = folder / "images" / "one.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert len(coco(folder)) == 2


def test_sixteen_bits_are_refused_rather_than_cut(folder):
    deep = Image.fromarray(np.full((30, 40), 60_000, dtype=np.uint16))
    deep.save(folder / "images" / "two.png")
    with pytest.raises(BadEntries, match=r"two.png must be .* 8 bits a channel; got mode I;16"):
        coco(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id"', "annotation_file must be json; .*line 1 column 18"),
        ("", "annotation_file must be json"),
        pytest.param("[" * 100_000, "annotation_file must be json", id="brackets"),
        ("[]", "annotation_file must hold images, annotations and categories; .* holds a list"),
        ("{}", "annotation_file must have a list of images; .* has none"),
        ('{"images": []}', "annotation_file must have a list of annotations"),
        ('{"images": {}}', "annotation_file must have a list of images"),
        (
            '{"images": [], "annotations": [], "categories": []}',
            "annotation_file must have images; .* has an empty list",
        ),
        (
            '{"images": [1], "annotations": [], "categories": [{"id": 1}]}',
            "categories must each have an integer id of their own and a name; .* has {'id': 1}",
        ),
        (
            '{"images": [1], "annotations": [], '
            '"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "an integer id of their own and a name; .* 'b'}",
        ),
    ],
)
def test_a_json_that_is_no_description_is_refused_whatever_on_bad_says(folder, text, message):
    (folder / "instances.json").write_text(text)
    for on_bad in ("error", "drop"):
        with pytest.raises(ValueError, match=message):
            CocoInstances(folder / "images", folder / "instances.json", on_bad=on_bad)


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}])
@pytest.mark.parametrize("part", ["images", "annotations"])
def test_an_entry_that_is_none_is_told(folder, part, entry):
    content = copy.deepcopy(CONTENT)
    content[part].append(entry)
    with pytest.raises(BadEntries, match="id must be an integer; got None"):
        coco(folder, content)


def test_missing_folders_and_files_are_named(folder):
    coco(folder)
    with pytest.raises(
        FileNotFoundError, match=r"images_folder must be a folder; there is no '.*x'"
    ):
        CocoInstances(folder / "x", folder / "instances.json")
    with pytest.raises(FileNotFoundError, match=r"annotation_file must be a json file; .* '.*y'"):
        CocoInstances(folder / "images", folder / "y")


def test_options_that_are_none_are_refused(folder):
    with pytest.raises(ValueError, match="on_bad must be 'error' or 'drop'; got 'skip'"):
        coco(folder, on_bad="skip")
    with pytest.raises(ValueError, match="max_side must be positive; got 0"):
        coco(folder, max_side=0)


def test_nothing_left_is_an_error(folder):
    content = copy.deepcopy(CONTENT)
    content["images"] = [{**image, "width": 1} for image in content["images"]]
    with (
        pytest.warns(UserWarning, match="2 bad images"),
        pytest.raises(ValueError, match="has no image that can be used"),
    ):
        coco(folder, content, on_bad="drop")


def test_the_first_of_many_problems_are_shown_and_all_kept(folder):
    content = copy.deepcopy(CONTENT)
    wrong = [{**content["annotations"][1], "id": 100 + i, "category_id": i} for i in range(50, 80)]
    content["annotations"] += wrong
    with pytest.raises(BadEntries) as caught:
        coco(folder, content)
    assert len(caught.value.problems) == 30
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert "has 30 bad annotations, the first: two.png (image 2), annotation 150: " in lines[0]
    assert lines[1].startswith("  two.png (image 2), annotation 151: ")
    assert lines[-1] == "  ... and 20 more"
    # As a worker or a launcher would send it.
    sent = pickle.loads(pickle.dumps(caught.value))
    assert str(sent) == str(caught.value)
    assert sent.problems == caught.value.problems


@pytest.mark.parametrize("area", [1200, -1, math.nan, None, "16"])
@pytest.mark.parametrize(("masks", "expected"), [(True, 9.0), (False, 16.0)])
def test_an_area_that_cannot_be_is_counted(folder, area, masks, expected):
    # 1200 is the whole image, as some converters write for every object.
    content = changed("annotations", area=area, segmentation=[[1, 1, 4, 1, 4, 4, 1, 4]])
    with pytest.warns(UserWarning, match="has 1 annotations whose area is absent or more than"):
        data = coco(folder, content, masks=masks)
    assert data[1][1]["area"].tolist() == [expected]
    assert [a["area"] for a in data.ground_truth()["annotations"]] == [16, expected]


@pytest.mark.parametrize(("area", "kept"), [(0, True), (25, True), (25.5, False), (-0.5, False)])
def test_an_area_may_be_as_large_as_a_box_with_a_border(folder, area, kept):
    # Boxes of 4 x 4 pixels that end at the centres of pixels hold 5 x 5.
    content = changed("annotations", area=area)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = coco(folder, content)
    assert len(told) == (not kept)
    assert data[1][1]["area"].tolist() == [area if kept else 16]
