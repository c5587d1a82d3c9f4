"""Losses by hand, what each task counts and predicts, and networks as recipes name them."""

from types import SimpleNamespace

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("faster_coco_eval")

import torch
from torch import nn

from efficient_attention import create_model
from efficient_attention.data.coco import Category
from efficient_attention.data.disparity_files import read_pfm
from efficient_attention.data.generated_shapes import GeneratedShapes
from efficient_attention.training.classification import Classification
from efficient_attention.training.colours import normalized
from efficient_attention.training.detection import Detection
from efficient_attention.training.networks import NetworkOptions, differences
from efficient_attention.training.optimization import SGD, Constant
from efficient_attention.training.stereo import Stereo

LEARNING = {"optimizer": SGD(lr=0.1), "schedule": Constant()}
SMALL = {
    "num_classes": 7,
    "norm": "group",
    "min_size": 64,
    "max_size": 64,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
}


class Given(nn.Module):
    """A network that returns what it is told to."""

    configuration = {}  # noqa: RUF012

    def __init__(self, outputs, **attributes):
        super().__init__()
        self.outputs = outputs
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs):
        self.inputs = inputs
        return self.outputs


class Built(NetworkOptions):
    def __init__(self, network):
        self.network = network

    def build(self):
        return self.network


def test_colours_are_those_of_imagenet():
    grey = torch.full((2, 3, 1, 1), 0.5)
    expected = torch.tensor([0.015 / 0.229, 0.044 / 0.224, 0.094 / 0.225])
    torch.testing.assert_close(normalized(grey)[0].flatten(), expected)
    assert normalized(grey.double()).dtype == torch.float64


def test_the_stereo_loss_is_the_weighted_mean_over_known_pixels():
    inf = float("inf")
    true = torch.tensor([[[2.0, 4.0, 0.0, 8.0, inf]]])
    valid = torch.tensor([[[True, True, True, True, False]]])
    # Of five pixels two count: the third is 0, the fourth not below 8, the fifth not known.
    heads = (
        torch.tensor([[[2.5, 4.0, 9.0, 9.0, 9.0]]]),  # errors 0.5 and 0: 0.125 and 0
        torch.tensor([[[5.0, 2.0, 9.0, 9.0, 9.0]]]),  # errors 3 and 2: 2.5 and 1.5
    )
    for head in heads:
        head.requires_grad_()
    network = Given(heads, loss_weights=(0.5, 1.0), max_disparity=8)
    task = Stereo(Built(network), **LEARNING)
    images = torch.full((1, 3, 1, 5), 0.5)
    batch = {"left": images, "right": images + 0.1, "disparity": true, "valid": valid}
    losses = task.losses(batch)
    assert {k: v.item() for k, v in losses.items()} == {"head1": 0.5 * 0.0625, "head2": 2.0}
    assert torch.equal(network.inputs[0], normalized(images))
    assert torch.equal(network.inputs[1], normalized(images + 0.1))
    sum(losses.values()).backward()
    # Of the smooth L1 distance over two pixels, times the weight: errors of 0.5 and 0, 3 and -2.
    assert heads[0].grad.flatten().tolist() == [0.125, 0, 0, 0, 0]
    assert heads[1].grad.flatten().tolist() == [0.5, -0.5, 0, 0, 0]


def test_a_batch_without_a_known_pixel_has_no_part_in_the_gradient():
    head = torch.ones(1, 1, 2, requires_grad=True)
    task = Stereo(Built(Given((head,), loss_weights=(1.0,), max_disparity=8)), **LEARNING)
    image, nothing = torch.zeros(1, 3, 1, 2), torch.zeros(1, 1, 2)
    batch = {"left": image, "right": image, "disparity": nothing, "valid": nothing.bool()}
    (loss,) = task.losses(batch).values()
    loss.backward()
    assert (loss.item(), head.grad.flatten().tolist()) == (0.0, [0.0, 0.0])


def test_stereo_writes_a_map_for_every_pair(tmp_path):
    disparity = torch.arange(12.0).view(2, 2, 3)
    task = Stereo(Built(Given(disparity, max_disparity=8)), **LEARNING)
    batch = {
        "left": torch.zeros(2, 3, 2, 3),
        "right": torch.zeros(2, 3, 2, 3),
        "name": ["a/1", "b"],
    }
    records = task.write_predictions(task.predict_step(batch, 0), tmp_path)
    assert records == [{"name": "a/1", "file": "a_1.pfm"}, {"name": "b", "file": "b.pfm"}]
    assert torch.equal(read_pfm(tmp_path / "a_1.pfm"), disparity[0])


def test_classification_descends_on_the_smoothed_cross_entropy():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    task = Classification(Built(Given(logits)), **LEARNING, label_smoothing=0.2)
    (loss,) = task.losses((torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]))).values()
    # The true class has 0.9 of the weight, the other 0.1; -log softmax is log(1 + e^-2) and log(1 + e^2).
    low, high = torch.tensor([-2.0, 2.0]).exp().log1p()
    torch.testing.assert_close(loss, (0.9 * low + 0.1 * high + torch.tensor(2.0).log()) / 2)


def test_classification_predicts_classes_by_the_index_of_the_picture(tmp_path):
    task = Classification(
        Built(Given(torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]]))), **LEARNING
    )
    data = SimpleNamespace(indices=lambda batch, size: [10 * batch + i for i in range(size)])
    type(task)._data = property(lambda self: data)
    try:
        outputs = task.predict_step((torch.zeros(2, 3, 1, 1), None), 4)
    finally:
        del type(task)._data
    first, second = task.write_predictions(outputs, tmp_path)
    assert (first["index"], first["classes"]) == (40, [1, 2, 0])
    assert (second["index"], second["classes"][0]) == (41, 0)
    assert sum(first["probabilities"]) == pytest.approx(1)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    options = NetworkOptions(name="mask_rcnn_small", at=["res3"], options=SMALL)
    return Detection(options, **LEARNING)


def test_the_losses_of_detection_are_those_of_mask_rcnn(detector):
    image, target = GeneratedShapes(1, size=(64, 64))[0]
    losses = detector.losses(([image], [target]))
    parts = ["box_reg", "classifier", "mask", "objectness", "rpn_box_reg"]
    assert sorted(losses) == parts
    assert all(loss.requires_grad for loss in losses.values())


def test_detections_are_counted_against_the_data_set(detector):
    shapes = GeneratedShapes(2, size=(64, 64))
    metrics = detector.new_metrics(shapes)
    for i in range(2):
        image, target = shapes[i]
        metrics.update([{**target, "scores": torch.ones(len(target["labels"]))}], [i])
    assert metrics.compute().mask_ap == 1
    found = detector.new_metrics(shapes)
    image, target = shapes[0]
    detector.eval().evaluate(([image], [target]), found)
    assert found.compute().images == 1
    detector.train()


def test_detections_are_written_with_the_ids_that_came_with_the_data(
    detector, monkeypatch, tmp_path
):
    data = SimpleNamespace(
        dataset=lambda name: SimpleNamespace(
            categories=[Category(1, 17, "cat"), Category(2, 90, "dog")]
        )
    )
    monkeypatch.setattr(Detection, "_data", property(lambda self: data))
    masks = torch.zeros(1, 1, 2, 3)
    masks[0, 0, :, 0] = 0.75
    found = {
        "image_id": 7,
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
        "masks": masks,
    }
    (record,) = detector.write_predictions([found], tmp_path)
    assert record == {
        "image_id": 7,
        "category_id": 90,
        "score": 0.5,
        "bbox": [1.0, 2.0, 3.0, 6.0],
        "segmentation": {"size": [2, 3], "counts": "024"},
    }


def test_what_labels_mean_is_known_from_the_data(detector):
    data = SimpleNamespace(categories=[Category(1, 17, "cat"), Category(2, 90, "dog")])
    assert detector.names(data)[1] == {"label": 2, "id": 90, "name": "dog"}
    classifier = Classification(Built(Given(None)), **LEARNING)
    assert classifier.names(SimpleNamespace(classes=("n01", "n02")))[1] == {
        "label": 1,
        "id": 1,
        "name": "n02",
    }
    assert classifier.names(object()) is detector.names(object()) is None


def test_a_plain_checkpoint_goes_into_the_part_that_it_is_of(tmp_path):
    classifier = create_model("resnet_small", "none", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    options = NetworkOptions(
        name="mask_rcnn_small",
        options={"norm": "frozen"},
        weights=str(tmp_path / "classifier.pth"),
        weights_into="backbone.body",
        ignore=["fc.*", "*num_batches_tracked"],
    )
    body = options.build().backbone.body
    assert torch.equal(body.layer3[0].conv1.weight, classifier.layer3[0].conv1.weight)
    options.ignore = []
    with pytest.raises(ValueError, match=r"unexpected: .*fc\.weight"):
        options.build()


def test_a_folder_is_a_network_with_options_of_its_own(tmp_path):
    network = create_model("psmnet_small", max_disparity=16, width=4)
    network.save_pretrained(tmp_path / "network")
    found = NetworkOptions(pretrained=str(tmp_path / "network")).build()
    assert found.training
    assert found.configuration == network.configuration
    with pytest.raises(ValueError, match="leave them out"):
        NetworkOptions(pretrained=str(tmp_path / "network"), at=[]).build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must have either a name or pretrained"),
        ({"name": "psmnet_small", "ignore": ["x"]}, "must have weights where"),
    ],
)
def test_options_of_networks_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkOptions(**options).build()


def test_differences_name_both_sides():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == {"b": (2, 3), "c": (None, 4)}
