"""COCO's numbers by hand, and those of pycocotools."""

import contextlib
import io
import os
import pickle
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from efficient_attention.data.batches import Shard
from efficient_attention.data.coco import CocoInstances
from efficient_attention.data.generated_shapes import GeneratedShapes
from efficient_attention.metrics.detection import DetectionMetrics

REAL = os.environ.get("EFFICIENT_ATTENTION_DATA")
SIZE = 64
NUMBERS = (
    *("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
# Of 101 values of recall, those up to one half.
HALF = 51 / 101


def rectangle(box):
    x0, y0, x1, y1 = box
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def runs(mask):
    """Uncompressed, down the columns."""
    counts, value = [0], 0
    for pixel in mask.t().flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def truth(*objects, images=1, categories=("cat", "dog")):
    """Objects are (image, category, box) and, if they are not plain rectangles, more of an annotation."""
    annotations = []
    for number, (image, category, (x0, y0, x1, y1), *more) in enumerate(objects):
        annotation = {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "segmentation": runs(rectangle((x0, y0, x1, y1))),
        }
        annotations.append({**annotation, **(more[0] if more else {})})
    return {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }


def found(*detections):
    """Detections are (category, score, box) and perhaps a mask."""
    masks = [d[3] if len(d) > 3 else rectangle(d[2]) for d in detections]
    return {
        "labels": torch.tensor([d[0] for d in detections], dtype=torch.int64),
        "scores": torch.tensor([d[1] for d in detections], dtype=torch.float32),
        "boxes": torch.tensor([d[2] for d in detections], dtype=torch.float32).reshape(-1, 4),
        "masks": torch.stack(masks) if masks else torch.zeros(0, SIZE, SIZE),
    }


def scores(ground_truth, *detections, **options):
    metrics = DetectionMetrics(ground_truth, **options)
    metrics.update(list(detections), list(range(len(detections))))
    return metrics.compute()


A, B, C = (0, 0, 20, 20), (30, 30, 50, 50), (5, 40, 25, 60)


def test_perfect_detections_score_one():
    result = scores(truth((0, 1, A), (0, 2, B)), found((1, 0.9, A), (2, 0.8, B)))
    for kind in ("box", "mask"):
        got = [getattr(result, f"{kind}_{number}") for number in NUMBERS]
        # Both are small; of medium and large ones there are none.
        assert got == [1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1]
    assert result.images == 1
    assert result.box_ap_by_category == result.mask_ap_by_category == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("score_of_the_false", "precision"),
    [
        # Behind the true one it costs nothing: at a recall of one half precision was 1.
        (0.5, 1.0),
        # Before it, one of two is true when half is found.
        (0.95, 0.5),
    ],
)
def test_one_found_one_missed_one_false(score_of_the_false, precision):
    result = scores(truth((0, 1, A), (0, 1, B)), found((1, 0.9, A), (1, score_of_the_false, C)))
    for kind in ("box", "mask"):
        assert getattr(result, f"{kind}_ap") == pytest.approx(HALF * precision, abs=1e-12)
        assert getattr(result, f"{kind}_ap_50") == pytest.approx(HALF * precision, abs=1e-12)
        assert getattr(result, f"{kind}_ar_100") == 0.5
        assert getattr(result, f"{kind}_ar_1") == (0.5 if score_of_the_false < 0.9 else 0.0)


def test_a_match_counts_up_to_its_overlap():
    # 20 x 17 of 20 x 20: 0.85, which is a match at 0.50 to 0.85: 8 of 10 thresholds.
    result = scores(truth((0, 1, A)), found((1, 0.9, (0, 0, 20, 17))))
    assert result.box_ap == result.mask_ap == pytest.approx(0.8, abs=1e-12)
    assert (result.box_ap_50, result.box_ap_75) == (1, 1)
    # 10 x 20 of 20 x 20: 0.5 is a match at 0.50 alone.
    result = scores(truth((0, 1, A)), found((1, 0.9, (0, 0, 10, 20))))
    assert (result.box_ap, result.box_ap_50, result.box_ap_75) == (pytest.approx(0.1), 1, 0)


def test_boxes_and_masks_are_judged_apart():
    # The right box with the upper half of the mask.
    result = scores(truth((0, 1, A)), found((1, 0.9, A, rectangle((0, 0, 20, 10)))))
    assert (result.box_ap, result.mask_ap) == (1, pytest.approx(0.1))


def test_an_object_is_found_once():
    result = scores(truth((0, 1, A), (0, 1, B)), found((1, 0.9, A), (1, 0.8, A), (1, 0.7, B)))
    # Precision is 1 up to a recall of one half, and 2 of 3 beyond.
    assert result.box_ap == pytest.approx(HALF + 50 / 101 * 2 / 3, abs=1e-12)


def test_a_wrong_class_is_a_miss_and_a_false_alarm():
    result = scores(truth((0, 1, A), (0, 2, B)), found((1, 0.9, A), (1, 0.8, B)))
    assert result.box_ap == 0.5
    assert result.box_ap_by_category == {"cat": 1, "dog": 0}


def test_a_category_without_objects_does_not_count():
    result = scores(truth((0, 1, A)), found((1, 0.9, A), (2, 0.8, B)))
    assert result.box_ap == 1
    assert result.box_ap_by_category == {"cat": 1, "dog": -1}


def test_recall_is_that_of_the_best_detections():
    result = scores(truth((0, 1, A), (0, 1, B)), found((1, 0.9, A), (1, 0.8, B)))
    assert (result.box_ar_1, result.box_ar_10, result.box_ar_100) == (0.5, 1, 1)
    # Precision is that of a hundred, in every category, too.
    assert result.box_ap == result.box_ap_by_category["cat"] == 1


def test_crowds_are_neither_missed_nor_false():
    crowd = (0, 1, (0, 0, 64, 30), {"iscrowd": 1})
    alone = scores(truth(crowd, (0, 1, B)), found((1, 0.8, B)))
    inside = scores(truth(crowd, (0, 1, B)), found((1, 0.9, A), (1, 0.8, B)))
    for result in (alone, inside):
        assert (result.box_ap, result.mask_ap, result.box_ar_100) == (1, 1, 1)
    beyond = scores(truth(crowd, (0, 1, B)), found((1, 0.9, (5, 34, 25, 54)), (1, 0.8, B)))
    assert (beyond.box_ap, beyond.mask_ap) == (0.5, 0.5)


def test_masks_are_small_by_their_own_area():
    # A frame of 44 x 44, 5 wide: its 780 pixels are small, while its box of 1936 would be medium.
    frame = rectangle((0, 0, 44, 44))
    frame[5:39, 5:39] = 0
    assert 780 == int(frame.sum()) < 32**2 < 44**2
    ground = truth((0, 1, (50, 50, 60, 60)))
    result = scores(ground, found((1, 0.9, (0, 0, 44, 44), frame), (1, 0.8, (50, 50, 60, 60))))
    # Of small masks one of two is true; among boxes the false one is medium, and no matter to small ones.
    assert result.mask_ap_small == 0.5
    assert result.box_ap_small == 1


def test_an_annotation_with_id_zero_is_found():
    ground = truth((0, 1, A), (0, 1, B), (1, 1, C), images=2)
    assert [a["id"] for a in ground["annotations"]] == [0, 1, 2]
    result = scores(ground, found((1, 0.9, A), (1, 0.8, B)), found((1, 0.7, C)))
    assert (result.box_ap, result.mask_ap) == (1, 1)


def test_only_images_that_were_given_are_evaluated():
    metrics = DetectionMetrics(truth((0, 1, A), (2, 1, B), images=3))
    metrics.update([found((1, 0.9, A))], [0])
    assert metrics.compute()[0] == 1
    metrics.update([found(), found()], torch.tensor([1, 2]))
    result = metrics.compute()
    assert result.box_ap == pytest.approx(HALF)
    assert result.images == 3


def test_an_image_counts_once_by_its_first_detections():
    metrics = DetectionMetrics(truth((0, 1, A)))
    metrics.update([found((1, 0.9, A)), found()], [0, 0])
    metrics.update([found((1, 0.99, B))], [0])
    assert (metrics.compute().box_ap, metrics.compute().images) == (1, 1)


def test_images_without_objects_and_without_detections_are_fine():
    assert scores(truth(), found()).box_ap == -1
    assert scores(truth(), found((1, 0.5, A))).box_ap == -1
    assert scores(truth((0, 1, A)), found()).box_ap == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.unsqueeze(1),
        lambda m: m.bool(),
        lambda m: m.unsqueeze(1) * 0.2 + 0.5 - 0.1,  # probabilities of 0.4 and 0.6
        lambda m: m.half() * 0.51,
    ],
)
def test_masks_may_be_probabilities_bool_or_integers(change):
    detections = found((1, 0.9, A), (1, 0.8, B))
    detections["masks"] = change(detections["masks"])
    result = scores(truth((0, 1, A), (0, 1, B)), detections)
    assert result.mask_ap == 1


def test_without_masks_there_are_no_scores_of_masks():
    ground = truth((0, 1, A))
    del ground["annotations"][0]["segmentation"]
    detections = found((1, 0.9, A))
    del detections["masks"]
    result = scores(ground, detections, masks=False)
    assert result.box_ap == 1
    assert result.mask_ap is result.mask_ar_large is result.mask_ap_by_category is None


def test_categories_of_one_name_are_told_apart():
    ground = truth((0, 1, A), (0, 2, B), categories=("cat", "cat"))
    result = scores(ground, found((1, 0.9, A)))
    assert result.box_ap_by_category == {"cat (1)": 1, "cat (2)": 0}


def detections_of(data, *, seed=0, categories=6):
    """What a fair detector may find: shifted masks, wrong classes, misses, false alarms, and equal scores."""
    random = torch.Generator().manual_seed(seed)

    def chance(*shape):
        return torch.rand(shape, generator=random)

    results = []
    for i in range(len(data)):
        _, target = data[i]
        kept = chance(len(target["labels"])) < 0.9
        masks = target["masks"][kept]
        false = torch.stack([m.roll((40, 40), (0, 1)) for m in masks[:2]]) if len(masks) else masks
        shifts = ((chance(len(masks), 2) - 0.5) * 8).int().tolist()
        masks = [m.roll(shift, (0, 1)) for m, shift in zip(masks, shifts, strict=True)]
        masks = torch.stack([*masks, *false]) if masks else target["masks"][:0]
        masks = masks[masks.flatten(1).amax(1) > 0] if len(masks) else masks
        labels = torch.cat([target["labels"][kept], target["labels"][kept][:2]])[: len(masks)]
        other = chance(len(labels)) < 0.15
        labels = torch.where(other, labels % categories + 1, labels)
        corners = [m.nonzero().aminmax(dim=0) for m in masks]
        boxes = [torch.cat([low.flip(0), high.flip(0) + 1]).float() for low, high in corners]
        boxes = torch.stack(boxes) + chance(len(boxes), 4) * 2 if boxes else torch.zeros(0, 4)
        results.append(
            {
                "boxes": boxes,
                "labels": labels,
                "scores": (chance(len(labels)) * 20).round() / 20,
                "masks": masks.unsqueeze(1).float() * 0.9,
            }
        )
    return results


@pytest.fixture(scope="module")
def generated():
    data = GeneratedShapes(25, size=(320, 320), seed=1, min_objects=0, max_objects=10)
    ground = data.ground_truth()
    for annotation in ground["annotations"][::9]:
        annotation["iscrowd"] = 1
    return ground, detections_of(data)


def by_pycocotools(ground_truth, detections, kind):
    """Straight from files' form: dicts with ids from 1, results with their boxes or their masks alone."""
    coco_tools = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    results = []
    for image, detection in zip(ground_truth["images"], detections, strict=True):
        for label, score, (x0, y0, x1, y1), mask in zip(
            *(detection[k].tolist() for k in ("labels", "scores", "boxes")),
            detection["masks"][:, 0] > 0.5,
            strict=True,
        ):
            result = {"image_id": image["id"], "category_id": label, "score": score}
            if kind == "bbox":
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                pixels = np.asfortranarray(mask.numpy().astype(np.uint8))
                result["segmentation"] = coco_tools.maskUtils.encode(pixels)
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_tools.COCO()
        coco.dataset = ground_truth
        coco.createIndex()
        judge = evaluation.COCOeval(coco, coco.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def test_all_numbers_are_those_of_pycocotools(generated):
    # The comparison is about something: objects of all sizes, found in part.
    assert all(0.05 < number < 0.95 for number in compared_with_pycocotools(*generated))


def compared_with_pycocotools(ground, detections):
    """The twelve numbers of boxes and of masks, which are those of pycocotools."""
    metrics = DetectionMetrics(ground)
    metrics.update(detections, [image["id"] for image in ground["images"]])
    result = metrics.compute()._asdict()
    numbers = []
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        expected = by_pycocotools(pickle.loads(pickle.dumps(ground)), detections, kind)
        mine = [result[f"{prefix}_{number}"] for number in NUMBERS]
        assert mine == pytest.approx(expected, abs=1e-6)
        numbers += mine
    return numbers


def processes(generated, samplers):
    ground, detections = generated
    shares = []
    for indices in samplers:
        share = DetectionMetrics(ground)
        for i in indices:
            share.update([detections[i]], [ground["images"][i]["id"]])
        # As it would reach another process.
        shares.append(pickle.loads(pickle.dumps(share)))
    return shares


@pytest.fixture
def eleven(generated):
    ground, detections = generated
    images = ground["images"][:11]
    ids = {image["id"] for image in images}
    annotations = [a for a in ground["annotations"] if a["image_id"] in ids]
    return {**ground, "images": images, "annotations": annotations}, detections[:11]


def test_processes_that_share_images_out_score_as_one(eleven):
    (one,) = processes(eleven, [range(11)])
    shares = processes(eleven, [list(Shard(11, i, 2)) for i in range(2)])
    whole = one.compute()
    assert shares[0].merge(shares[1]).compute() == whole
    assert shares[1].merge(shares[0]).compute() == whole
    assert whole.images == 11
    assert shares[0].compute().images == 6


def test_images_that_two_processes_have_seen_count_once(eleven):
    (one,) = processes(eleven, [range(11)])
    samplers = [
        DistributedSampler(range(11), num_replicas=count, rank=i, shuffle=False)
        for count in (4,)
        for i in range(count)
    ]
    # Twelve places for eleven images.
    assert sum(len(sampler) for sampler in samplers) == 12
    merged = reduce(lambda a, b: a.merge(b), processes(eleven, map(list, samplers)))
    assert merged.compute() == one.compute()


def test_the_order_of_images_does_not_matter(eleven):
    (forth,) = processes(eleven, [range(11)])
    (back,) = processes(eleven, [range(10, -1, -1)])
    assert forth.compute() == back.compute()


def test_what_a_process_sends_is_about_the_images_it_has_seen(generated):
    ground, detections = generated
    metrics = DetectionMetrics(ground)
    metrics.update(detections[:1], [0])
    whole = DetectionMetrics(ground)
    whole.update(detections, list(range(25)))
    assert len(pickle.dumps(metrics)) < len(pickle.dumps(whole)) / 10


def test_merging_changes_neither(eleven):
    a, b = processes(eleven, [range(5), range(5, 11)])
    before = a.compute(), b.compute()
    a.merge(b)
    assert (a.compute(), b.compute()) == before


def test_other_metrics_do_not_merge():
    ground = truth((0, 1, A))
    with pytest.raises(ValueError, match="other must have masks=True and the same categories; got"):
        DetectionMetrics(ground).merge(DetectionMetrics(ground, masks=False))
    with pytest.raises(ValueError, match="got masks=True and 1 categories"):
        DetectionMetrics(ground).merge(DetectionMetrics(truth(categories=("cat",))))


def test_nothing_has_no_score_and_can_be_forgotten():
    metrics = DetectionMetrics(truth((0, 1, A)))
    with pytest.raises(ValueError, match="scores need the detections of an image; got none"):
        metrics.compute()
    metrics.update([found()], [0])
    metrics.reset()
    with pytest.raises(ValueError, match="got none"):
        metrics.compute()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(1, 5)}, r"boxes of image 0 must have shape \(1, 4\); got \(1, 5\)"),
        ({"labels": torch.ones(2)}, r"labels of image 0 must have shape \(1,\); got \(2,\)"),
        ({"masks": torch.zeros(1, 1, 60, 64)}, r"shape \(1, 1, 64, 64\); got \(1, 1, 60, 64\)"),
        ({"scores": torch.tensor([torch.nan])}, "scores of image 0 must be finite; got tensor"),
        ({"boxes": torch.full((1, 4), torch.inf)}, "boxes of image 0 must be finite"),
        ({"labels": torch.tensor([3])}, r"must be ids of categories, \[1, 2\]; got \[3\]"),
        ({"labels": torch.tensor([0])}, r"must be ids of categories, \[1, 2\]; got \[0\]"),
    ],
)
def test_detections_that_cannot_be_are_refused(changes, message):
    metrics = DetectionMetrics(truth((0, 1, A)))
    with pytest.raises(ValueError, match=message):
        metrics.update([{**found((1, 0.9, A)), **changes}], [0])


def test_detections_without_masks_or_of_unknown_images_are_refused():
    metrics = DetectionMetrics(truth((0, 1, A)))
    detections = found((1, 0.9, A))
    with pytest.raises(ValueError, match="image_ids must be in the ground truth; got 5"):
        metrics.update([detections], [5])
    with pytest.raises(ValueError, match="image_ids must be those of 1 detections; got 2"):
        metrics.update([detections], [0, 0])
    del detections["masks"]
    with pytest.raises(ValueError, match=r"masks of image 0 must have shape .*; got None"):
        metrics.update([detections], [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "got image 9 and category 1"),
        ({"category_id": 9}, "got image 0 and category 9"),
        ({"segmentation": None}, r"one of image 0 lacks \['segmentation'\]"),
    ],
)
def test_a_ground_truth_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DetectionMetrics(truth((0, 1, A, change)))


@pytest.mark.skipif(not REAL, reason="EFFICIENT_ATTENTION_DATA names no folder")
@pytest.mark.parametrize("name", ["nuclei", "neon_trees"])
def test_the_truth_of_real_folders_is_perfect(name):
    folder = Path(REAL) / "detection" / name
    data = CocoInstances(folder / "images", folder / "instances.json")
    metrics = DetectionMetrics(data.ground_truth())
    for _, target in data:
        scores = torch.ones(len(target["labels"]))
        metrics.update([{**target, "scores": scores}], [target["image_id"]])
    result = metrics.compute()
    assert result.images == len(data)
    assert result.mask_ap == pytest.approx(1, abs=1e-12)
    assert result.box_ap == pytest.approx(1, abs=1e-12)


@pytest.mark.skipif(not REAL, reason="EFFICIENT_ATTENTION_DATA names no folder")
@pytest.mark.parametrize("name", ["nuclei", "neon_trees"])
def test_all_numbers_of_real_folders_are_those_of_pycocotools(name):
    folder = Path(REAL) / "detection" / name
    data = CocoInstances(folder / "images", folder / "instances.json")
    numbers = compared_with_pycocotools(data.ground_truth(), detections_of(data, categories=1))
    assert all(0.05 < ap < 0.95 for ap in numbers[:: len(NUMBERS)])
