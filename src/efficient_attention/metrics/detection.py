"""Average precision and recall of detections, as MS-COCO defines them.

``N`` detections in an image of ``H`` x ``W`` pixels. What matches what is decided by faster-coco-eval, whose numbers
are pycocotools'; here detections are collected, so that processes merge by images.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["DetectionMetrics", "DetectionScores"]


class DetectionScores(NamedTuple):
    """What :class:`DetectionMetrics` computes: COCO's twelve numbers for boxes, and for masks.

    All are in [0, 1]; a paper's 39.4 is 0.394 here. Where there is nothing to find they are -1, as pycocotools has it,
    whose order they have too. They are means over categories and, unless said otherwise, over the thresholds 0.50, 0.55
    to 0.95 of the overlap (intersection over union) from which a detection is a match.

    Attributes:
        box_ap: average precision of boxes: the mean of precision over 101 values of recall.
        box_ap_50: at overlap 0.5.
        box_ap_75: at overlap 0.75.
        box_ap_small: of objects of less than 32 x 32 pixels.
        box_ap_medium: of those between.
        box_ap_large: of objects of more than 96 x 96 pixels.
        box_ar_1: recall of the best detection of an image.
        box_ar_10: of its ten best.
        box_ar_100: of its hundred best.
        box_ar_small: of its hundred best, small objects.
        box_ar_medium: medium ones.
        box_ar_large: large ones.
        mask_ap: and so on, of masks; None if they are not evaluated.
        images: evaluated.
        box_ap_by_category: ``box_ap`` of every category by name, -1 where there is nothing to find.
        mask_ap_by_category: of masks; None if they are not evaluated.
    """

    box_ap: float
    box_ap_50: float
    box_ap_75: float
    box_ap_small: float
    box_ap_medium: float
    box_ap_large: float
    box_ar_1: float
    box_ar_10: float
    box_ar_100: float
    box_ar_small: float
    box_ar_medium: float
    box_ar_large: float
    mask_ap: float | None
    mask_ap_50: float | None
    mask_ap_75: float | None
    mask_ap_small: float | None
    mask_ap_medium: float | None
    mask_ap_large: float | None
    mask_ar_1: float | None
    mask_ar_10: float | None
    mask_ar_100: float | None
    mask_ar_small: float | None
    mask_ar_medium: float | None
    mask_ar_large: float | None
    images: int
    box_ap_by_category: dict[str, float]
    mask_ap_by_category: dict[str, float] | None


class _Truth(NamedTuple):
    """What there is to find in an image."""

    height: int
    width: int
    annotations: list[dict[str, Any]]


class DetectionMetrics:
    """COCO's average precision and recall, of the images whose detections were given.

    Crowds of the ground truth are neither missed nor false; what lies in one does not count. Masks are compared with
    masks of the size they have, so that small, medium and large mean the areas of masks, not of their boxes.

    An image counts once, however often it is given: by the first detections. So it does if processes that share out the
    images have some in common, as with ``torch.utils.data.DistributedSampler``. What a process sends to be merged is
    about the images that it has seen.

    Args:
        ground_truth: a COCO dict with images, annotations and categories, such as
            :meth:`~efficient_attention.data.coco.CocoInstances.ground_truth`, in the pixels of the images that are
            given to the network. The ids of its annotations do not matter.
        masks: whether masks are evaluated too; the ground truth then needs a ``segmentation`` of every annotation.

    Raises:
        ValueError: an annotation is about an unknown image or category, or has no segmentation though it needs one.

    Example:
        >>> truth = {
        ...     "images": [{"id": 7, "height": 8, "width": 8}],
        ...     "categories": [{"id": 1, "name": "cat"}],
        ...     "annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
        ... }
        >>> metrics = DetectionMetrics(truth, masks=False)
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 3.0]])  # three quarters of the object
        >>> metrics.update([{"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}], [7])
        >>> scores = metrics.compute()
        >>> scores.box_ap_75, round(scores.box_ap, 6)  # at 0.50 to 0.75 of the ten thresholds
        (1.0, 0.6)

    Paper: Shen et al. 2021, Sec. 4, reports the AP of boxes and of masks on MS-COCO 2017.
    """

    def __init__(self, ground_truth: Mapping[str, Any], *, masks: bool = True) -> None:
        self.masks = masks
        self.categories = _names(ground_truth["categories"])
        self._truth = {
            image["id"]: _Truth(image["height"], image["width"], [])
            for image in ground_truth["images"]
        }
        # By image, pickled: many small objects that live long would keep the large ones' memory from being given back.
        self._detections: dict[int, bytes] = {}
        needed = ("bbox", "area", "iscrowd", *(("segmentation",) if masks else ()))
        for annotation in ground_truth["annotations"]:
            image, category = annotation["image_id"], annotation["category_id"]
            if image not in self._truth or category not in self.categories:
                raise ValueError(
                    "annotations must be about images and categories of the ground truth; "
                    f"got image {image} and category {category}"
                )
            absent = [name for name in needed if annotation.get(name) is None]
            if absent:
                raise ValueError(
                    f"annotations must have {needed}; one of image {image} lacks {absent}"
                )
            kept = {name: annotation[name] for name in needed}
            self._truth[image].annotations.append({"category_id": category, **kept})

    @torch.no_grad()
    def update(
        self, detections: Sequence[Mapping[str, Tensor]], image_ids: Sequence[int] | Tensor
    ) -> None:
        """Take in what was found in some images.

        Args:
            detections: for every image, as torchvision's detectors return them: ``boxes [N, 4]``, x0, y0, x1, y1 in
                pixels; ``labels [N]``, categories' ids; ``scores [N]``; and, to evaluate masks, ``masks [N, 1, H, W]``
                or ``[N, H, W]``: probabilities, of which those above one half are inside, or bool or integers, of
                which ones are.
            image_ids: of the same images.

        Raises:
            ValueError: unlike numbers of images, an unknown image or category, shapes that do not fit, masks of another
                size than their image, or a box or score that is not finite.
        """
        ids = image_ids.tolist() if isinstance(image_ids, Tensor) else list(image_ids)
        if len(detections) != len(ids):
            raise ValueError(
                f"image_ids must be those of {len(detections)} detections; got {len(ids)}"
            )
        for image, found in zip(ids, detections, strict=True):
            if image not in self._truth:
                raise ValueError(f"image_ids must be in the ground truth; got {image!r}")
            self._check(image, found)
            if image not in self._detections:
                self._detections[image] = pickle.dumps(list(_results(found, self.masks)))

    def merge(self, other: Self) -> Self:
        """The metrics of the images of both, as if one had seen them all; neither is changed.

        Args:
            other: of the same ground truth, from another process for one.

        Raises:
            ValueError: other categories, or only one evaluates masks.
        """
        if self.masks != other.masks or self.categories != other.categories:
            raise ValueError(
                f"other must have masks={self.masks} and the same categories; got masks={other.masks} and "
                f"{len(other.categories)} categories"
            )
        merged = type(self).__new__(type(self))
        merged.masks, merged.categories = self.masks, self.categories
        merged._truth = other._truth | self._truth
        merged._detections = other._detections | self._detections
        return merged

    def compute(self) -> DetectionScores:
        """The scores of all images so far.

        Raises:
            ValueError: there was none.
            ImportError: faster-coco-eval is not installed.
        """
        if not self._detections:
            raise ValueError("scores need the detections of an image; got none")
        images = list(self._detections)
        found = [
            {"image_id": image, **result}
            for image in images
            for result in pickle.loads(self._detections[image])
        ]
        truth = self._coco(images)
        box, box_by_category = self._evaluate(truth, found, "bbox")
        mask: Sequence[float | None] = [None] * len(box)
        mask_by_category = None
        if self.masks:
            mask, mask_by_category = self._evaluate(truth, found, "segm")
        return DetectionScores._make([*box, *mask, len(images), box_by_category, mask_by_category])

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = {}

    def __getstate__(self) -> dict[str, Any]:
        seen = {image: self._truth[image] for image in self._detections}
        return {**self.__dict__, "_truth": seen}

    def _check(self, image: int, found: Mapping[str, Tensor]) -> None:
        height, width, _ = self._truth[image]
        count = len(found["scores"]) if "scores" in found else 0
        shapes: dict[str, list[tuple[int, ...]]] = {
            "boxes": [(count, 4)],
            "labels": [(count,)],
            "scores": [(count,)],
        }
        if self.masks:
            shapes["masks"] = [(count, height, width), (count, 1, height, width)]
        for name, allowed in shapes.items():
            shape = tuple(found[name].shape) if name in found else None
            if shape not in allowed:
                raise ValueError(
                    f"{name} of image {image} must have shape {allowed[-1]}; got {shape}"
                )
        for name in ("boxes", "scores"):
            if not found[name].isfinite().all():
                raise ValueError(f"{name} of image {image} must be finite; got {found[name]}")
        unknown = set(found["labels"].tolist()) - self.categories.keys()
        if unknown:
            raise ValueError(
                f"labels of image {image} must be ids of categories, {sorted(self.categories)}; got {sorted(unknown)}"
            )

    def _coco(self, images: Iterable[int]) -> dict[str, Any]:
        """The ground truth of some images, with ids from 1: one with id 0 would pass for unmatched."""
        annotations = [
            {"image_id": image, **annotation}
            for image in images
            for annotation in self._truth[image].annotations
        ]
        return {
            "images": [
                {"id": i, "height": self._truth[i].height, "width": self._truth[i].width}
                for i in images
            ],
            "annotations": [{"id": n, **a} for n, a in enumerate(annotations, 1)],
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
        }

    def _evaluate(
        self, truth: dict[str, Any], found: list[dict[str, Any]], kind: str
    ) -> tuple[list[float], dict[str, float]]:
        """The twelve numbers, and AP by category."""
        from faster_coco_eval import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster

        # With a box, a result would be small or large by that. And both dicts are written to.
        other = "segmentation" if kind == "bbox" else "bbox"
        results = [{k: v for k, v in result.items() if k != other} for result in found]
        coco = COCO({**truth, "annotations": [dict(a) for a in truth["annotations"]]})
        evaluation = COCOeval_faster(coco, coco.loadRes(results), kind)
        evaluation.run()
        numbers = [float(number) for number in evaluation.stats[:12]]
        precision = evaluation.eval[
            "precision"
        ]  # [thresholds, recalls, categories, areas, detections]
        by_category = {}
        for i, category in enumerate(evaluation.params.catIds):
            values = precision[:, :, i, 0, -1]
            values = values[values > -1]
            by_category[self.categories[category]] = float(values.mean()) if len(values) else -1.0
        return numbers, by_category


def _names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Names by id; a name that several have gets the id."""
    names = [category["name"] for category in categories]
    return {
        c["id"]: c["name"] if names.count(c["name"]) == 1 else f"{c['name']} ({c['id']})"
        for c in categories
    }


def _results(found: Mapping[str, Tensor], masks: bool) -> Iterable[dict[str, Any]]:
    """Detections of an image as COCO has results, the masks as run lengths."""
    low, high = found["boxes"].double().split(2, 1)
    boxes = torch.cat([low, high - low], 1).tolist()
    outlines = _encode(found["masks"]) if masks else [None] * len(boxes)
    for label, score, box, outline in zip(
        found["labels"].tolist(), found["scores"].tolist(), boxes, outlines, strict=True
    ):
        result = {"category_id": label, "score": score, "bbox": box}
        yield result if outline is None else {**result, "segmentation": outline}


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    from pycocotools import mask

    inside = (masks > 0.5).reshape(len(masks), *masks.shape[-2:])  # [N, H, W]
    columns = inside.transpose(1, 2).contiguous().cpu()  # [N, W, H]
    return mask.encode(columns.view(torch.uint8).permute(2, 1, 0).numpy())
