"""All that can be wrong with a COCO folder, looked for before the first epoch instead of met in it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .images import check_pixels
from .segmentations import decode_masks, segmentation_fault

__all__ = ["BadEntries", "Checked", "Problem", "check_coco", "read_coco"]

# Reading the head of a file is waiting for the disk.
_READERS = 16
_SHOWN = 10


class Problem(NamedTuple):
    """An entry that cannot be used, and why.

    ``image`` and ``annotation`` are ids as the json has them; ``annotation`` is None if the image itself is bad.
    """

    file_name: str | None
    image: Any
    annotation: Any
    fault: str

    def __str__(self) -> str:
        name = "no image" if self.file_name is None else f"{self.file_name} (image {self.image})"
        entry = "" if self.annotation is None else f", annotation {self.annotation}"
        return f"{name}{entry}: {self.fault}"


class BadEntries(ValueError):
    """Entries that cannot be used: ``problems`` has them all, the message the first few, its first line the first."""

    def __init__(self, annotation_file: Path, problems: Sequence[Problem], advice: str) -> None:
        self.problems = tuple(problems)
        images = sum(p.annotation is None for p in problems)
        counts = [_count(images, "image"), _count(len(problems) - images, "annotation")]
        first, *others = (str(problem) for problem in problems[:_SHOWN])
        found = " and ".join(filter(None, counts)) + (", the first" if others else "")
        head = f"{annotation_file} has {found}: {first}; {advice}"
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        super().__init__("\n  ".join([head, *others, *more]))

    def __reduce__(self) -> Any:
        # As the arguments of __init__ are not those of ValueError, by which it would be pickled.
        return _restore, (str(self), self.problems)


class Checked(NamedTuple):
    """What can be used: images by id, their annotations by the same ids; and what cannot.

    ``recounted`` is the number of annotations of which the area was wrong, and is now right.
    """

    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    problems: list[Problem]
    recounted: int


def read_coco(annotation_file: Path) -> dict[str, Any]:
    """The content of a json of instances, of which the outermost form is as it should be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no json, or has no lists of images, annotations and categories, or no image, or categories
            without an id and a name of their own. Nothing of such a file can be used.
    """
    if not annotation_file.is_file():
        raise FileNotFoundError(
            f"annotation_file must be a json file; there is no '{annotation_file}'"
        )
    try:
        content = json.loads(annotation_file.read_text("utf-8-sig"))
    # A file of brackets alone is nested too deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"annotation_file must be json; '{annotation_file}' is not: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"annotation_file must hold images, annotations and categories; "
            f"'{annotation_file}' holds a {type(content).__name__}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(
                f"annotation_file must have a list of {key}; '{annotation_file}' has none"
            )
    if not content["images"]:
        raise ValueError(f"annotation_file must have images; '{annotation_file}' has an empty list")
    _check_categories(content["categories"], annotation_file)
    return content


def check_coco(content: Mapping[str, Any], images_folder: Path, *, masks: bool) -> Checked:
    """Look at every image and annotation.

    Of an image file the head is read, and its end looked for; a JPEG or PNG without an end is decoded to see.

    Args:
        content: of :func:`read_coco`.
        images_folder: where the ``file_name`` of images begin.
        masks: whether segmentations are needed.
    """
    images: dict[int, dict[str, Any]] = {}
    problems = list(_check_images(content["images"], images_folder, images))
    named = {_get(image, "id", None): image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    annotations: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    seen: set[Any] = set()
    recounted = 0
    for i, annotation in enumerate(content["annotations"]):
        image = _get(annotation, "image_id", None)
        fault = _id_fault(annotation)
        if fault is None and annotation["id"] in seen:
            fault = f"id must be its own; another annotation has {annotation['id']} too"
        if fault is None and image in annotations:
            size = images[image]["width"], images[image]["height"]
            fault = _annotation_fault(annotation, *size, categories, masks)
        elif fault is None and image not in named:
            fault = f"image_id must be that of an image; got {image!r}"
        seen.add(_get(annotation, "id", None))
        if fault is not None:
            name = _get(named.get(image), "file_name", None)
            problems.append(Problem(name, image, _get(annotation, "id", f"#{i}"), fault))
        elif image in annotations:
            annotations[image].append(annotation)
            recounted += _recount(annotation, images[image], masks)
    return Checked(images, annotations, problems, recounted)


def _check_categories(categories: list[Any], annotation_file: Path) -> None:
    ids = set()
    for category in categories:
        number, name = _get(category, "id", None), _get(category, "name", None)
        if type(number) is not int or not isinstance(name, str) or number in ids:
            raise ValueError(
                "categories must each have an integer id of their own and a name; "
                f"'{annotation_file}' has {category!r}"
            )
        ids.add(number)


def _check_images(
    entries: list[Any], folder: Path, sound: dict[int, dict[str, Any]]
) -> Iterator[Problem]:
    """Problems of images; the others are added to ``sound``."""
    numbers = Counter(_get(entry, "id", None) for entry in entries)
    faults = [_id_fault(entry) or _image_fault(entry, numbers) for entry in entries]
    readable = [entry for entry, fault in zip(entries, faults, strict=True) if fault is None]
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda image: _file_fault(folder, image), readable)
        for i, (entry, fault) in enumerate(zip(entries, faults, strict=True)):
            fault = fault if fault is not None else next(found)
            if fault is None:
                sound[entry["id"]] = entry
            else:
                name = _get(entry, "file_name", f"images[{i}]")
                yield Problem(str(name), _get(entry, "id", None), None, fault)


def _id_fault(entry: Any) -> str | None:
    number = _get(entry, "id", None)
    return None if type(number) is int else f"id must be an integer; got {number!r}"


def _image_fault(image: Mapping[str, Any], numbers: Mapping[int, int]) -> str | None:
    if numbers[image["id"]] > 1:
        # Of none of them can be said which annotations are its own.
        return f"id must be its own; {numbers[image['id']]} images have {image['id']}"
    size = image.get("width"), image.get("height")
    if not all(type(length) is int and length > 0 for length in size):
        return f"width and height must be positive integers; got {size[0]!r} and {size[1]!r}"
    if not isinstance(image.get("file_name"), str):
        return f"file_name must be a string; got {image.get('file_name')!r}"
    return None


def _file_fault(folder: Path, image: Mapping[str, Any]) -> str | None:
    try:
        size = check_pixels(folder / image["file_name"])
    except FileNotFoundError:
        return "no such file"
    # A name that no file can have is a ValueError, a folder or a file of others' an OSError.
    except (OSError, ValueError) as error:
        return str(error)
    entry = image["height"], image["width"]
    if size != entry:
        return f"the file has {size[1]} x {size[0]} pixels, its entry says {entry[1]} x {entry[0]}"
    return None


def _annotation_fault(
    annotation: Mapping[str, Any], width: int, height: int, categories: Iterable[int], masks: bool
) -> str | None:
    category, crowd = annotation.get("category_id"), annotation.get("iscrowd", 0)
    if type(category) is not int or category not in categories:
        return f"category_id must be that of a category; got {category!r}"
    if crowd not in (0, 1):
        return f"iscrowd must be 0 or 1; got {crowd!r}"
    box = annotation.get("bbox")
    if not _covers(box, width, height):
        return f"bbox must be [x, y, width, height] of positive size in the image of {width} x {height}; got {box}"
    return segmentation_fault(annotation.get("segmentation"), height, width) if masks else None


def _recount(annotation: dict[str, Any], image: Mapping[str, Any], masks: bool) -> bool:
    """Give an annotation its area, if it has none or that of something else; whether it was so."""
    area, (_, _, width, height) = annotation.get("area"), annotation["bbox"]
    # A border of a pixel for boxes that end at the centres of pixels.
    if isinstance(area, int | float) and 0 <= area <= (width + 1) * (height + 1):
        return False
    if masks:
        outlines = [annotation["segmentation"]]
        annotation["area"] = int(decode_masks(outlines, image["height"], image["width"]).sum())
    else:
        annotation["area"] = width * height
    return True


def _covers(box: Any, width: int, height: int) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    try:
        if not math.isfinite(sum(box)):
            return False
    # What is no number, and an integer beyond all floats.
    except (TypeError, OverflowError):
        return False
    x, y, w, h = box
    return _is_long(x, x + w, width) and _is_long(y, y + h, height)


def _is_long(start: float, end: float, length: int) -> bool:
    """Whether something of a span is inside; also in float32, in which targets hold its ends."""
    start, end = max(start, 0), min(end, length)
    return start < end and bool(np.float32(start) < np.float32(end))


def _count(number: int, what: str) -> str:
    return f"{number} bad {what}{'s' if number > 1 else ''}" if number else ""


def _get(entry: Any, key: str, default: Any) -> Any:
    value = entry.get(key, default) if isinstance(entry, Mapping) else default
    # What cannot be looked up in a table is as good as absent.
    return value if value.__hash__ is not None else default


def _restore(message: str, problems: tuple[Problem, ...]) -> BadEntries:
    error = BadEntries.__new__(BadEntries, message)
    error.problems = problems
    return error
