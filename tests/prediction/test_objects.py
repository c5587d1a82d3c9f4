"""Objects are those that the network finds, as COCO's results have them, and drawn where they are."""

import json

import numpy as np
import pytest
import torch

from efficient_attention import create_model
from efficient_attention.data.segmentations import decode_masks, encode_masks
from efficient_attention.errors import InputError
from efficient_attention.prediction import FoundObjects, draw_objects, predict_objects
from efficient_attention.prediction import objects as module
from efficient_attention.prediction.class_names import find_class_names, read_class_names
from efficient_attention.prediction.objects import coco_results

pytest.importorskip("torchvision")
pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    options = {
        "min_size": 64,
        "max_size": 96,
        "box_detections_per_img": 10,
        "box_score_thresh": 0.0,
    }
    return create_model("mask_rcnn_small", num_classes=3, **options).eval()


@pytest.mark.parametrize("bytes_", [1, 2**26])
def test_objects_are_those_of_the_network(network, monkeypatch, bytes_):
    monkeypatch.setattr(module, "_MASK_BYTES", bytes_)
    picture = torch.rand(3, 50, 70)
    with torch.no_grad():
        (expected,) = network([picture])
    found = predict_objects(network, picture)
    assert len(found.labels) == 10
    for name in ("boxes", "labels", "scores"):
        assert torch.equal(getattr(found, name), expected[name])
    masks = expected["masks"][:, 0] > 0.5
    assert masks.any()
    assert torch.equal(decode_masks(found.outlines, 50, 70).bool(), masks)


def test_picture_without_objects_gives_none(network):
    network.roi_heads.score_thresh = 1.0
    found = predict_objects(network, torch.zeros(3, 50, 70, dtype=torch.uint8))
    network.roi_heads.score_thresh = 0.0
    assert found.boxes.shape == (0, 4)
    assert coco_results(found, 1, "a.png", {}, {}) == []


def square(x0, y0, x1, y1, *, size):
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    mask[:, y0:y1, x0:x1] = 1
    boxes = torch.tensor([[x0, y0, x1, y1]]).float()
    return FoundObjects(boxes, torch.tensor([2]), torch.tensor([0.75]), encode_masks(mask))


def test_results_have_coco_s_form():
    coco = pytest.importorskip("pycocotools.mask")
    found = square(10, 20, 40, 60, size=(480, 640))
    (result,) = coco_results(found, 7, "a.png", {1: 5, 2: 90}, {2: "toothbrush"})
    outline = result.pop("segmentation")
    assert result == {
        "image_id": 7,
        "file_name": "a.png",
        "category_id": 90,
        "category": "toothbrush",
        "score": 0.75,
        "bbox": [10, 20, 30, 40],
    }
    assert coco.area(json.loads(json.dumps(outline))) == 30 * 40


@pytest.mark.parametrize(
    "corner", [(0, 0), (600, 0), (0, 440), (600, 440), (300, 200)], ids=lambda corner: str(corner)
)
def test_drawing_stays_in_the_picture_and_leaves_the_rest_alone(corner):
    x, y = corner
    found = square(x, y, x + 40, y + 40, size=(480, 640))
    picture = torch.full((3, 480, 640), 200, dtype=torch.uint8)
    drawn = np.asarray(draw_objects(picture, found, {2: "a long name"}))
    assert drawn.shape == (480, 640, 3)
    rows, columns = (drawn != 200).any(2).nonzero()
    # The object, and a label of less than 20 x 140 pixels beside it.
    assert rows.min() >= max(0, y - 20)
    assert rows.max() < min(480, y + 60)
    assert columns.min() >= max(0, x - 140)
    assert columns.max() < min(640, x + 140)
    colours = {tuple(pixel) for pixel in drawn[rows, columns]}
    # The ground of a label of 14 x 90 pixels and more, most of which is not text; the outline has 160.
    assert (drawn == (230, 25, 75)).all(2).sum() > 600, "no outline, or a label that is cut off"
    # Six tenths of 200, four of the colour.
    assert (212, 130, 150) in colours, "no tint"


def test_only_what_reaches_the_score_is_drawn():
    found = square(10, 10, 40, 40, size=(480, 640))
    picture = torch.zeros(3, 480, 640, dtype=torch.uint8)
    assert not np.asarray(draw_objects(picture, found, score=0.76)).any()
    assert np.asarray(draw_objects(picture, found, score=0.75)).any()


def test_labels_of_one_place_make_room_for_each_other():
    one = square(300, 200, 340, 240, size=(480, 640))
    both = FoundObjects(*(torch.cat([x, x]) for x in one[:3]), one.outlines * 2)
    picture = torch.zeros(3, 480, 640, dtype=torch.uint8)
    drawn = np.asarray(draw_objects(picture, both, {2: "name"}))
    first, second = ((drawn == colour).all(2) for colour in ([230, 25, 75], [0, 158, 255]))
    # The box and the tint of the second lie over the first's; of their labels both are whole.
    assert first.sum() > 300
    assert second.sum() > 300


def test_small_picture_is_enlarged():
    found = square(10, 10, 30, 30, size=(100, 60))
    drawn = draw_objects(torch.zeros(3, 100, 60, dtype=torch.uint8), found)
    assert drawn.size == (240, 400)


COCO = {
    "categories": [{"id": 90, "name": "z"}, {"id": 5, "name": "a"}],
    "images": [{"id": 3, "file_name": "x/1.png"}],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return write


def test_categories_are_labels_in_the_order_of_their_ids(write):
    path = write(COCO, "a.json")
    classes = read_class_names(path, 3, background=True)
    assert classes == ({1: "a", 2: "z"}, {1: 5, 2: 90}, {"x/1.png": 3})
    # A classifier counts from 0; and a detector with a label for each id has the ids.
    assert read_class_names(path, 2, background=False).names == {0: "a", 1: "z"}
    assert read_class_names(path, 91, background=True)[:2] == ({5: "a", 90: "z"}, {5: 5, 90: 90})


def test_lines_are_labels(write):
    path = write("cat\n\n  dog \n", "a.txt")
    assert read_class_names(path, 3, background=True).names == {1: "cat", 2: "dog"}
    assert read_class_names(path, 2, background=False).names == {0: "cat", 1: "dog"}
    path = write("__background__\ncat\n", "b.txt")
    assert read_class_names(path, 2, background=True).names == {1: "cat"}


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("cat\n", "a.txt", "must name the network's 3 classes; .* has 1 names"),
        (COCO, "a.json", "must name the network's 3 classes; .* has 2 categories"),
        ("{", "a.json", "must be a json with categories"),
        ([], "a.json", "must be a json with categories"),
        ({"categories": [{"id": 1}]}, "a.json", "KeyError: 'name'"),
        ({"categories": COCO["categories"][:1] * 3}, "a.json", "different ids"),
    ],
)
def test_classes_that_do_not_fit_are_told(write, content, name, expected):
    with pytest.raises(InputError, match=expected):
        read_class_names(write(content, name), 4, background=True)


def test_names_come_from_beside_the_network_unless_a_file_is_given(tmp_path):
    run, own = tmp_path / "network", tmp_path / "own.txt"
    run.mkdir()
    entries = [{"label": 2, "id": 90, "name": "zebra"}, {"label": 1, "id": 18, "name": "dog"}]
    (run / "classes.json").write_text(json.dumps(entries))
    own.write_text("cat\nhen\n")
    found = find_class_names(None, run, 3, background=True)
    assert (found.names, found.ids) == ({1: "dog", 2: "zebra"}, {1: 18, 2: 90})
    assert find_class_names(own, run, 3, background=True).names == {1: "cat", 2: "hen"}
    assert find_class_names(None, tmp_path, 3, background=True).names == {}
    with pytest.raises(InputError, match=r"the network's 1 classes; .* has labels from 1 to 2"):
        find_class_names(None, run, 2, background=True)


def test_classes_that_are_not_there_are_told(tmp_path):
    with pytest.raises(InputError, match=r"--classes must be .* got .*none\.txt"):
        read_class_names(tmp_path / "none.txt", 2, background=True)
