"""COCO folders: what a sample is, and what stays out of training but not out of evaluation."""

import copy
import io
import json
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from efficient_attention.data.batches import EpochBatches, ResumableLoader, collate_lists
from efficient_attention.data.coco import CocoInstances
from efficient_attention.data.draws import Draw
from efficient_attention.data.images import read_image
from efficient_attention.data.segmentations import encode_masks

REAL = os.environ.get("EFFICIENT_ATTENTION_DATA")
real = pytest.mark.skipif(not REAL, reason="EFFICIENT_ATTENTION_DATA names no folder")

# Two of three categories, whose ids have gaps and whose order in the json is another.
CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 17, "name": "eel"}]
BOX = [2.0, 1.0, 4.0, 3.0]
TRIANGLE = [[0.0, 0.0, 8.0, 0.0, 0.0, 8.0]]
CROWD = {"size": [8, 12], "counts": [0, 8, 88]}


def outline(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def instance(number, image, category, box, **changes):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": outline(box),
        **changes,
    }


CONTENT = {
    "categories": CATEGORIES,
    "images": [
        {"id": 7, "file_name": "seven.png", "width": 12, "height": 8},
        {"id": 5, "file_name": "five.png", "width": 6, "height": 10},
        {"id": 6, "file_name": "six.png", "width": 6, "height": 6},
    ],
    "annotations": [
        instance(11, 7, 90, BOX),
        instance(12, 7, 3, [-1.0, 4.0, 5.0, 9.0], segmentation=TRIANGLE, area=32.0),
        instance(13, 7, 3, [0.0, 0.0, 1.0, 8.0], iscrowd=1, segmentation=CROWD),
        instance(14, 5, 17, [1.0, 2.0, 2.0, 6.0]),
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0)
    for image in CONTENT["images"]:
        size = image["height"], image["width"], 3
        picture = Image.fromarray(pixels.integers(0, 256, size, dtype=np.uint8))
        picture.save(tmp_path / "images" / image["file_name"])
    write(tmp_path, CONTENT)
    return tmp_path


def write(folder, content):
    (folder / "instances.json").write_text(json.dumps(content))


def coco(folder, **options):
    return CocoInstances(folder / "images", folder / "instances.json", **options)


def test_a_sample_has_what_training_takes(folder):
    image, target = coco(folder)[0]
    assert torch.equal(image, read_image(folder / "images" / "seven.png"))
    assert list(target) == ["image_id", "boxes", "labels", "area", "iscrowd", "masks"]
    assert target["image_id"] == 7
    # Clipped to the image of 12 x 8.
    assert target["boxes"].tolist() == [[2, 1, 6, 4], [0, 4, 4, 8]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [3, 1]
    assert target["labels"].dtype == torch.int64
    assert target["area"].tolist() == [12, 32]
    assert target["iscrowd"].tolist() == [0, 0]
    square = torch.zeros(8, 12, dtype=torch.uint8)
    square[1:4, 2:6] = 1
    assert torch.equal(target["masks"][0], square)
    assert target["masks"].dtype == torch.uint8
    # Half of the square of 8, without its diagonal.
    assert torch.equal(target["masks"][1, :, :8].fliplr(), torch.ones(8, 8).triu(1).byte())


def test_categories_are_numbered_from_one_in_the_order_of_their_ids(folder):
    data = coco(folder)
    assert [tuple(c) for c in data.categories] == [(1, 3, "dog"), (2, 17, "eel"), (3, 90, "cat")]
    assert data.num_classes == 4
    assert repr(data).startswith("CocoInstances(3 images, 3 objects of 3 categories, 1 crowds: '")


def test_an_image_may_have_no_object(folder):
    image, target = coco(folder)[2]
    assert image.shape == (3, 6, 6)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 6, 6)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)
    assert [t["image_id"] for _, t in coco(folder, keep_empty=False)] == [7, 5]


def test_an_image_of_crowds_alone_is_empty(folder):
    content = copy.deepcopy(CONTENT)
    content["annotations"] = [content["annotations"][2]]
    write(folder, content)
    assert len(coco(folder)[0][1]["labels"]) == 0
    with pytest.raises(ValueError, match="no image that can be used"):
        coco(folder, keep_empty=False)


def test_some_of_the_images_make_a_data_set_of_their_own(folder):
    """Every image is in one of two shares, with its own objects, in samples and in the ground truth."""
    named = coco(folder, images=["six.*", "seven.png"])
    assert [target["image_id"] for _, target in named] == [7, 6]
    assert len(named.aspect_ratios) == 2
    parts = [coco(folder, share=share) for share in ((0, 0.67), (0.67, 1))]
    assert [len(part) for part in parts] == [2, 1]
    seen = [target for part in parts for _, target in part]
    assert {target["image_id"] for target in seen} == {5, 6, 7}
    annotations = [a for part in parts for a in part.ground_truth()["annotations"]]
    whole = coco(folder).ground_truth()["annotations"]
    kept = ("image_id", "category_id", "bbox")
    assert sorted([a[key] for key in kept] for a in annotations) == sorted(
        [a[key] for key in kept] for a in whole
    )
    with pytest.raises(ValueError, match=r"none is 'nine.png'"):
        coco(folder, images=["nine.png"])


def test_ground_truth_keeps_crowds_and_boxes_as_they_are(folder):
    truth = coco(folder).ground_truth()
    assert [image["id"] for image in truth["images"]] == [7, 5, 6]
    # As one with id 0 would not count, ids are new, from 1.
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    assert [a["category_id"] for a in truth["annotations"]] == [3, 1, 1, 2]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1, 0]
    kept = ("image_id", "bbox", "area", "segmentation")
    for mine, theirs in zip(truth["annotations"], CONTENT["annotations"], strict=True):
        assert {k: mine[k] for k in kept} == {k: theirs[k] for k in kept}
    assert truth["categories"][2] == {"id": 3, "name": "cat"}


@pytest.mark.parametrize("options", [{"max_side": 8}, {"augment": v2.Identity()}])
def test_ground_truth_is_refused_where_samples_are_changed(folder, options):
    with pytest.raises(ValueError, match="another data set without max_side and augment"):
        coco(folder, **options).ground_truth()


def test_without_masks_segmentations_are_not_needed(folder):
    content = copy.deepcopy(CONTENT)
    for annotation in content["annotations"]:
        annotation["segmentation"] = None
    write(folder, content)
    data = coco(folder, masks=False)
    assert "masks" not in data[0][1]
    assert "segmentation" not in data.ground_truth()["annotations"][0]


def test_aspect_ratios_are_width_by_height(folder):
    assert coco(folder).aspect_ratios.tolist() == [1.5, 0.6, 1.0]


def test_flips_turn_boxes_and_masks(folder):
    image, target = coco(folder)[0]
    flipped, mirrored = coco(folder, augment=v2.RandomHorizontalFlip(1.0))[0]
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(mirrored["masks"], target["masks"].flip(-1))
    assert mirrored["boxes"].tolist() == [[6, 1, 10, 4], [8, 4, 12, 8]]
    assert torch.equal(mirrored["labels"], target["labels"])
    assert all(type(part) in (torch.Tensor, int) for part in (flipped, *mirrored.values()))


def test_whether_a_sample_is_flipped_follows_from_its_draw(folder):
    data = coco(folder, augment=v2.RandomHorizontalFlip(0.5))
    kinds = {data[Draw(0, seed)][0][0, 0, 0].item() for seed in range(20)}
    assert len(kinds) == 2
    torch.manual_seed(1)
    again = [data[Draw(0, seed)][0] for seed in range(20)]
    torch.manual_seed(2)
    assert all(torch.equal(a, data[Draw(0, seed)][0]) for seed, a in enumerate(again))


def test_samples_of_one_seed_are_flipped_each_by_itself(folder):
    plain, data = coco(folder), coco(folder, augment=v2.RandomHorizontalFlip(0.5))
    flipped = [
        [not torch.equal(data[Draw(i, seed)][0], plain[i][0]) for seed in range(20)] for i in (0, 1)
    ]
    assert flipped[0] != flipped[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_samples_do_not_depend_on_workers_or_on_a_resumption(folder, workers):
    def loader(workers):
        augment = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ColorJitter(0.5)])
        batches = EpochBatches(3, 1, seed=4)
        data = coco(folder, augment=augment)
        return ResumableLoader(data, batches, num_workers=workers, collate_fn=collate_lists)

    whole = loader(0)
    expected = [batch for _ in range(2) for batch in whole]
    before = loader(workers)
    next(iter(before))
    after = loader(workers)
    after.load_state_dict(before.state_dict())
    found = [batch for _ in range(2) for batch in after]
    assert len(found) == 5
    for (images, targets), (others, truths) in zip(found, expected[1:], strict=True):
        assert torch.equal(images[0], others[0])
        assert torch.equal(targets[0]["masks"], truths[0]["masks"])


def test_objects_that_are_cut_away_are_dropped_and_areas_counted(folder):
    def right_half(image, target):
        crop = {"top": 0, "left": 5, "height": 8, "width": 7}
        target["boxes"] = v2.functional.crop(target["boxes"], **crop)
        target["masks"] = v2.functional.crop(target["masks"], **crop)
        return v2.functional.crop(image, **crop), target

    image, target = coco(folder, augment=right_half)[0]
    assert image.shape == (3, 8, 7)
    assert target["labels"].tolist() == [3]
    assert target["boxes"].tolist() == [[0, 1, 1, 4]]
    assert target["masks"].shape == (1, 8, 7)
    assert target["area"].tolist() == [3]


def test_an_augmentation_that_changes_the_dtype_is_refused(folder):
    with pytest.raises(
        TypeError, match=r"augment must leave the image in uint8; got torch.float32"
    ):
        coco(folder, augment=v2.ToDtype(torch.float32, scale=True))[0]


def test_long_sides_are_scaled_down_with_boxes_and_masks(folder):
    data = coco(folder, max_side=6)
    image, target = data[0]
    assert image.shape == (3, 4, 6)
    assert target["boxes"].tolist() == [[1, 0.5, 3, 2], [0, 2, 2, 4]]
    assert target["masks"].shape == (2, 4, 6)
    assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()
    assert data[2][0].shape == (3, 6, 6)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_pictures_of_every_mode_are_rgb(folder, mode):
    name = "six.jpg" if mode == "CMYK" else "six.png"
    content = copy.deepcopy(CONTENT)
    content["images"][2]["file_name"] = name
    write(folder, content)
    # A palette keeps only its own colours, and JPEG is near.
    gray = Image.new("L", (6, 6), 255)
    gray.convert(mode).save(folder / "images" / name)
    image, _ = coco(folder)[2]
    assert image.shape == (3, 6, 6)
    assert image.min() > 0.97


def test_a_file_that_changes_later_is_named(folder):
    data = coco(folder)
    Image.new("RGB", (6, 7)).save(folder / "images" / "six.png")
    with pytest.raises(ValueError, match=r"image 6 must have 6 x 6 pixels .* 'six.png' has 6 x 7"):
        data[2]
    (folder / "images" / "six.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image 6 can no longer be read: .*six.png"):
        data[2]


def test_records_are_shared_with_workers_rather_than_copied(folder):
    content = copy.deepcopy(CONTENT)
    content["annotations"] += [instance(100 + i, 5, 3, [1.0, 1.0, 2.0, 2.0]) for i in range(5000)]
    write(folder, content)
    data = coco(folder)
    sent = io.BytesIO()
    ForkingPickler(sent).dump(data)
    assert sent.tell() < 5000
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied[0][1]["masks"], data[0][1]["masks"])


def test_compressed_and_plain_run_lengths_and_polygons_are_one_mask(folder):
    mask = torch.zeros(1, 8, 12, dtype=torch.uint8)
    mask[0, 1:4, 2:6] = 1
    content = copy.deepcopy(CONTENT)
    plain = {"size": [8, 12], "counts": [17, 3, 5, 3, 5, 3, 5, 3, 52]}
    for segmentation in (encode_masks(mask)[0], plain):
        content["annotations"][0]["segmentation"] = segmentation
        write(folder, content)
        assert torch.equal(coco(folder)[0][1]["masks"][:1], mask)


@real
@pytest.mark.parametrize(
    ("name", "images", "objects", "empty"), [("nuclei", 3, 96, 0), ("neon_trees", 36, 563, 2)]
)
def test_real_folders_are_read(name, images, objects, empty):
    folder = Path(REAL) / "detection" / name
    data = CocoInstances(folder / "images", folder / "instances.json")
    assert data.problems == ()
    samples = list(data)
    assert len(samples) == images
    assert sum(len(target["labels"]) for _, target in samples) == objects
    assert sum(len(target["labels"]) == 0 for _, target in samples) == empty
    for image, target in samples:
        assert image.shape[1:] == target["masks"].shape[1:]
        assert 0 <= image.min() < image.max() <= 1
        if name == "nuclei":
            assert torch.equal(target["masks"].sum((1, 2)).float(), target["area"])
