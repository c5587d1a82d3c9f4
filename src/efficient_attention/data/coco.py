"""Instances of objects in photographs, as MS-COCO and most of its successors store them.

Paper: Sec. 4 trains and evaluates on MS-COCO 2017.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .coco_checks import BadEntries, Checked, Problem, check_coco, read_coco
from .draws import Draw, as_draw, reproducibly
from .images import read_pixels
from .packing import Packed
from .segmentations import decode_masks
from .selection import selected

__all__ = ["Category", "CocoInstances"]

Target = dict[str, Any]


class Category(NamedTuple):
    """A kind of object: ``label`` is ours, from 1 without gaps; ``id`` is the json's."""

    label: int
    id: int
    name: str


class _Instance(NamedTuple):
    label: int
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    area: float
    crowd: bool
    segmentation: Any


class _Record(NamedTuple):
    image_id: int
    file_name: str
    height: int
    width: int
    instances: tuple[_Instance, ...]


class CocoInstances(Dataset[tuple[Tensor, Target]]):
    """Images with boxes, labels and masks of their objects, from a folder and a json as MS-COCO has them.

    ::

        coco/
          train2017/000000000009.jpg ...          images_folder
          annotations/instances_train2017.json    annotation_file

    All entries are checked when the data set is made, files included, so that nothing is wrong with a sample that is
    met hours later. What is kept is packed in one buffer, which workers share.

    A sample is ``(image, target)``: float32 ``[3, H, W]`` in [0, 1], and a dict of

    - ``boxes`` float32 ``[N, 4]``: x0, y0, x1, y1 in pixels, clipped to the image;
    - ``labels`` int64 ``[N]``: from 1 without gaps, see ``categories``;
    - ``masks`` uint8 ``[N, H, W]``, unless switched off;
    - ``area`` float32 ``[N]``: the annotation's, in pixels; counted anew if ``max_side`` or ``augment`` is given;
    - ``iscrowd`` int64 ``[N]``: zeros. Regions of crowds are no target, they only count in ``ground_truth``;
    - ``image_id``: the json's.

    An image without an object has N = 0.

    Args:
        images_folder: where the ``file_name`` of images begin.
        annotation_file: json with images, annotations and categories.
        on_bad: ``"error"`` raises if an entry cannot be used; ``"drop"`` leaves it out, an image with its annotations,
            and warns. These are: files that are missing, empty, damaged, of more than 8 bits a channel or of another
            size than their entry says; boxes that are not finite or cover nothing of the image; segmentations that are
            absent, have fewer than three points or do not fit the image; unknown images and categories; ids that are
            not unique. An ``area`` that cannot be is counted anew, with a warning.
        masks: off, segmentations are neither needed nor decoded.
        keep_empty: off, images without a target are left out.
        images: names of the images to take, or patterns as in a shell, by ``file_name``; default: all. The json is
            checked as a whole.
        share: of these, from where to where, as parts of 1: with ``[0, 0.8]`` in one data set and ``[0.8, 1]`` in
            another no image is in both; see :func:`~efficient_attention.data.selection.selected`.
        max_side: images with a longer side are scaled down to it in the worker, with their masks. A network that scales
            images itself needs this only for very large ones: a mask is a byte a pixel, and float32 where it is scaled.
        augment: takes and returns ``(image, target)``, uint8 and with ``boxes`` and ``masks`` as torchvision's
            ``tv_tensors``, so that transforms of ``torchvision.transforms.v2`` do, ``RandomHorizontalFlip`` for one.
            Its random numbers, torch's, follow from the :class:`~efficient_attention.data.draws.Draw`. Objects of
            which it leaves nothing are dropped.

    Attributes:
        categories: by label, in the order of the json's ids.
        problems: entries that were left out.
        aspect_ratios: width / height of every image, float64: what
            :func:`~efficient_attention.data.batches.aspect_groups` takes.

    Raises:
        FileNotFoundError: there is no such folder or file.
        BadEntries: a ValueError that names the entries by file and id.
        ValueError: the json as a whole cannot be used, or nothing of it is left.

    Example:
        >>> from efficient_attention.data.generated_shapes import GeneratedShapes, write_coco
        >>> write_coco(GeneratedShapes(3, size=(64, 64)), Path(folder, "shapes"))
        >>> data = CocoInstances(Path(folder, "shapes/images"), Path(folder, "shapes/instances.json"))
        >>> image, target = data[0]
        >>> image.shape, target["masks"].shape[1:]
        (torch.Size([3, 64, 64]), torch.Size([64, 64]))
    """

    def __init__(
        self,
        images_folder: str | Path,
        annotation_file: str | Path,
        *,
        on_bad: Literal["error", "drop"] = "error",
        masks: bool = True,
        keep_empty: bool = True,
        images: Sequence[str] | None = None,
        share: tuple[float, float] | None = None,
        max_side: int | None = None,
        augment: Callable[[Any, Target], tuple[Any, Target]] | None = None,
    ) -> None:
        self.images_folder, self.annotation_file = Path(images_folder), Path(annotation_file)
        self.masks, self.max_side, self.augment = masks, max_side, augment
        if on_bad not in ("error", "drop"):
            raise ValueError(f"on_bad must be 'error' or 'drop'; got {on_bad!r}")
        if max_side is not None and max_side < 1:
            raise ValueError(f"max_side must be positive; got {max_side}")
        if not self.images_folder.is_dir():
            raise FileNotFoundError(
                f"images_folder must be a folder; there is no '{self.images_folder}'"
            )
        content = read_coco(self.annotation_file)
        checked = check_coco(content, self.images_folder, masks=masks)
        self.problems: tuple[Problem, ...] = tuple(checked.problems)
        self._report(on_bad, checked.recounted)
        self.categories = tuple(
            Category(label, category["id"], category["name"])
            for label, category in enumerate(_by_id(content["categories"]), 1)
        )
        # What follows is the only holder of what the json held, and gives it up image by image.
        del content
        sound = (image["file_name"] for image in checked.images.values())
        chosen = selected(sound, patterns=images, share=share)
        self._records, ratios = self._pack(checked, keep_empty, chosen)
        if not ratios:
            raise ValueError(f"{self.annotation_file} has no image that can be used")
        self.aspect_ratios = torch.tensor(ratios, dtype=torch.float64)

    @property
    def num_classes(self) -> int:
        """Labels of a network for this data, the background among them."""
        return len(self.categories) + 1

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Target]:
        draw = as_draw(key, len(self))
        record = self._records[draw.item]
        image, target = self._read(record)
        if self.augment is not None:
            with reproducibly(draw.seed, draw.item):
                image, target = _augmented(image, target, self.augment)
        if self.augment is not None or image.shape[1:] != (record.height, record.width):
            target["area"] = _areas(target)
        return image.float() / 255, target

    def ground_truth(self) -> dict[str, Any]:
        """What detections are judged against: a COCO dict with our labels, and crowds among its annotations.

        Raises:
            ValueError: samples are scaled or augmented, so that detections in them are not in these coordinates. Make
                a data set without ``max_side`` and ``augment``, of the training images too, to evaluate.
        """
        if self.max_side is not None or self.augment is not None:
            raise ValueError(
                "ground_truth is that of images as they are stored, but these are scaled or augmented: "
                "make another data set without max_side and augment to evaluate"
            )
        return {
            "images": [
                {"id": r.image_id, "height": r.height, "width": r.width, "file_name": r.file_name}
                for r in self._records
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": instance.label,
                    "bbox": list(instance.box),
                    "area": instance.area,
                    "iscrowd": int(instance.crowd),
                    **({"segmentation": instance.segmentation} if self.masks else {}),
                }
                for number, (image_id, instance) in enumerate(
                    ((r.image_id, instance) for r in self._records for instance in r.instances), 1
                )
            ],
            "categories": [{"id": c.label, "name": c.name} for c in self.categories],
        }

    def __repr__(self) -> str:
        crowds = [instance.crowd for record in self._records for instance in record.instances]
        return (
            f"CocoInstances({len(self)} images, {len(crowds) - sum(crowds)} objects of "
            f"{len(self.categories)} categories, {sum(crowds)} crowds: '{self.annotation_file}')"
        )

    def _pack(
        self, checked: Checked, keep_empty: bool, chosen: set[str]
    ) -> tuple[Packed[_Record], list[float]]:
        labels = {category.id: category.label for category in self.categories}
        ratios = []

        def records() -> Iterator[_Record]:
            for number, image in checked.images.items():
                annotations = checked.annotations.pop(number)
                if image["file_name"] not in chosen:
                    continue
                record = _record(image, annotations, labels, self.masks)
                if keep_empty or not all(instance.crowd for instance in record.instances):
                    ratios.append(record.width / record.height)
                    yield record

        return Packed(records()), ratios

    def _report(self, on_bad: str, recounted: int) -> None:
        if self.problems and on_bad == "error":
            advice = "on_bad='drop' leaves them out"
            raise BadEntries(self.annotation_file, self.problems, advice)
        if self.problems:
            left_out = BadEntries(self.annotation_file, self.problems, "they are left out")
            warnings.warn(str(left_out), stacklevel=3)
        if recounted:
            source = "masks" if self.masks else "boxes"
            warnings.warn(
                f"{self.annotation_file} has {recounted} annotations whose area is absent or more than "
                f"their box holds; it was counted from their {source}",
                stacklevel=3,
            )

    def _read(self, record: _Record) -> tuple[Tensor, Target]:
        """The image in uint8 and its targets, scaled to ``max_side``."""
        try:
            image = read_pixels(self.images_folder / record.file_name)
        except (OSError, ValueError) as error:
            raise InputError(f"image {record.image_id} can no longer be read: {error}") from error
        if image.shape[1:] != (record.height, record.width):
            raise InputError(
                f"image {record.image_id} must have {record.width} x {record.height} pixels as when it "
                f"was checked; '{record.file_name}' has {image.shape[2]} x {image.shape[1]}"
            )
        size = self._size(record)
        if size != (record.height, record.width):
            from torchvision.transforms.v2.functional import resize

            image = resize(image, list(size), antialias=True)
        instances = [instance for instance in record.instances if not instance.crowd]
        target: Target = {
            "image_id": record.image_id,
            "boxes": _boxes(instances, record, size),
            "labels": torch.tensor([i.label for i in instances], dtype=torch.int64),
            "area": torch.tensor([i.area for i in instances], dtype=torch.float32),
            "iscrowd": torch.zeros(len(instances), dtype=torch.int64),
        }
        if self.masks:
            outlines = [instance.segmentation for instance in instances]
            target["masks"] = decode_masks(outlines, record.height, record.width, size=size)
        return image, target

    def _size(self, record: _Record) -> tuple[int, int]:
        scale = min(1.0, (self.max_side or float("inf")) / max(record.height, record.width))
        return max(1, round(record.height * scale)), max(1, round(record.width * scale))


def _record(
    image: Mapping[str, Any],
    annotations: Iterable[Mapping[str, Any]],
    labels: Mapping[int, int],
    masks: bool,
) -> _Record:
    size = image["height"], image["width"]
    instances = tuple(
        _Instance(
            labels[annotation["category_id"]],
            tuple(annotation["bbox"]),
            float(annotation["area"]),
            bool(annotation.get("iscrowd", 0)),
            annotation["segmentation"] if masks else None,
        )
        for annotation in annotations
    )
    return _Record(image["id"], image["file_name"], *size, instances)


def _by_id(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(entries, key=lambda entry: entry["id"])


def _boxes(instances: list[_Instance], record: _Record, size: tuple[int, int]) -> Tensor:
    """Corners inside the image, scaled with it: ``[N, 4]``."""
    boxes = torch.tensor([i.box for i in instances], dtype=torch.float64).reshape(-1, 2, 2)
    corners = boxes.cumsum(1)  # x0, y0; x1, y1
    old, new = (
        torch.tensor([w, h], dtype=torch.float64) for h, w in ((record.height, record.width), size)
    )
    corners = corners.clamp(min=torch.zeros(2, dtype=torch.float64), max=old) * (new / old)
    return corners.flatten(1).float()


def _augmented(
    image: Tensor, target: Target, augment: Callable[[Any, Target], tuple[Any, Target]]
) -> tuple[Tensor, Target]:
    """What transforms of torchvision make of a sample, as plain tensors and without objects that were cut away."""
    from torchvision import tv_tensors

    size = tuple(image.shape[1:])
    target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    if "masks" in target:
        target["masks"] = tv_tensors.Mask(target["masks"])
    image, target = augment(tv_tensors.Image(image), target)
    low, high = target["boxes"].as_subclass(Tensor).split(2, 1)
    kept = (low < high).all(1)
    parts = {
        name: part.as_subclass(Tensor)[kept] if isinstance(part, Tensor) else part
        for name, part in target.items()
    }
    pixels = image.as_subclass(Tensor)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"augment must leave the image in uint8; got {pixels.dtype}")
    return pixels, parts


def _areas(target: Target) -> Tensor:
    if "masks" in target:
        return target["masks"].sum((1, 2)).float()
    low, high = target["boxes"].split(2, 1)
    return (high - low).prod(1)
