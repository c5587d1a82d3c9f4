"""Pictures of figures that cover one another, with the exact truth of every pixel: detection without a download."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .coco import Category
from .draws import Draw, as_draw, generator
from .outlines import OUTLINES, Patch, figure
from .segmentations import encode_masks
from .textures import camera, clouds, distinct_colour, stripes, uniform

__all__ = ["GeneratedShapes", "coco_of", "write_coco"]

# Of an object this much of what is in the picture can be seen, in pixels and as a share.
_VISIBLE_PIXELS, _VISIBLE_SHARE = 24, 0.4
_TRIES = 20


class GeneratedShapes(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Ellipses, rectangles, triangles, stars, rings and crosses, before one another and a cloudy ground.

    Samples are those of :class:`~efficient_attention.data.coco.CocoInstances`. What the objects are follows from their
    outlines alone: colours, textures, positions, sizes and angles are drawn alike for all. Masks are what is seen, by
    the pixels' centres, and boxes are the masks'. Of every object 24 pixels are seen at least, and 40 % of those inside
    the picture: there is nothing in it that is not annotated.

    Sample ``i`` follows from ``(seed, i)`` and the options.

    Args:
        length: samples.
        size: ``(H, W)`` of every picture, at least 32 x 32.
        seed: of the data set.
        min_objects: in a picture; 0 gives empty pictures too.
        max_objects: in a picture. Where no room is found there are fewer, yet one at least if ``min_objects`` is not 0.

    Attributes:
        categories: by label, from 1.
        aspect_ratios: width / height of every picture.

    Raises:
        ValueError: options that cannot be.

    Example:
        >>> image, target = GeneratedShapes(10, size=(64, 96), seed=1)[3]
        >>> image.shape, bool((target["masks"].sum(0) <= 1).all())
        (torch.Size([3, 64, 96]), True)
    """

    categories = tuple(Category(label, label, name) for label, name in enumerate(OUTLINES, 1))
    num_classes = len(categories) + 1

    def __init__(
        self,
        length: int,
        *,
        size: tuple[int, int] = (256, 256),
        seed: int = 0,
        min_objects: int = 1,
        max_objects: int = 8,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be positive; got {length}")
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size must be (H, W) of at least 32 pixels; got {size}")
        if not 0 <= min_objects <= max_objects or max_objects < 1:
            raise ValueError(
                "max_objects must be positive and min_objects from 0 to max_objects; "
                f"got {max_objects} and {min_objects}"
            )
        self.length, self.size, self.seed = length, (size[0], size[1]), seed
        self.min_objects, self.max_objects = min_objects, max_objects
        self.aspect_ratios = torch.full((length,), size[1] / size[0], dtype=torch.float64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, dict[str, Any]]:
        index = as_draw(key, len(self)).item
        image, owner, labels = self._scene(generator(self.seed, index))
        numbers = torch.arange(1, len(labels) + 1)
        masks = (owner == numbers[:, None, None]).view(torch.uint8)  # [N, H, W]
        areas = torch.bincount(owner.flatten(), minlength=len(labels) + 1)[1:]
        return image.float() / 255, {
            "image_id": index,
            "boxes": _boxes_of(masks),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "area": areas.float(),
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
            "masks": masks,
        }

    def ground_truth(self) -> dict[str, Any]:
        """What detections are judged against, see :func:`coco_of`."""
        return coco_of(self)

    def __repr__(self) -> str:
        return (
            f"GeneratedShapes({self.length}, size={self.size}, seed={self.seed}, "
            f"min_objects={self.min_objects}, max_objects={self.max_objects})"
        )

    def _scene(self, random: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
        """A picture, the number of the object seen at every pixel, 0 for none, and the objects' labels."""
        ground = distinct_colour([], random)
        shades = (clouds(self.size, random) - 0.5) * uniform(random, 0.2, 0.8)
        picture = ground[:, None, None] + shades
        owner = torch.zeros(self.size, dtype=torch.int64)
        labels, used, objects = [], [ground], [_Pixels(owner.numel(), 0)]
        number = torch.randint(self.min_objects, self.max_objects + 1, (), generator=random)
        for _ in range(int(number)):
            label = int(torch.randint(len(OUTLINES), (), generator=random)) + 1
            patch = self._place(label, owner, objects, random)
            if patch is None:
                continue
            rows, columns, inside = patch
            labels.append(label)
            owner[rows, columns][inside] = len(labels)
            used.append(distinct_colour(used, random))
            part = picture[:, rows, columns]
            part.copy_(torch.where(inside, _surface(used[-1], inside, random), part))
        return camera(picture, random), owner, labels

    def _place(
        self, label: int, owner: Tensor, objects: list[_Pixels], random: torch.Generator
    ) -> Patch | None:
        """Pixels for one more of the objects that leave enough of all others; None if no try finds any."""
        height, width = self.size
        least, most = 5.0, min(height, width) / 3
        for _ in range(_TRIES):
            patch = figure(
                list(OUTLINES.values())[label - 1],
                self.size,
                centre=(uniform(random, 0, height), uniform(random, 0, width)),
                radius=least * (most / least) ** uniform(random, 0, 1),
                angle=uniform(random, 0, 2 * math.pi),
                slim=uniform(random, 0.6, 1.0),
            )
            rows, columns, inside = patch
            covered = torch.bincount(owner[rows, columns][inside], minlength=len(objects)).tolist()
            own = sum(covered)
            after = [
                *(_Pixels(o.all, o.seen - n) for o, n in zip(objects, covered, strict=True)),
                _Pixels(own, own),
            ]
            if all(o.seen >= max(_VISIBLE_PIXELS, _VISIBLE_SHARE * o.all) for o in after[1:]):
                objects[:] = after
                return patch
        return None


class _Pixels(NamedTuple):
    """How many an object has in the picture, and how many of them are seen."""

    all: int
    seen: int


def _surface(colour: Tensor, inside: Tensor, random: torch.Generator) -> Tensor:
    """Colours around one, ``[3, H, W]``."""
    if uniform(random, 0, 1) < 0.5:
        pattern = stripes(inside.shape, random, period=uniform(random, 4, 16))
    else:
        pattern = clouds(inside.shape, random)
    return colour[:, None, None] + (pattern - 0.5) * uniform(random, 0.0, 0.4)


class _Detections(Protocol):
    categories: tuple[Category, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, key: int) -> tuple[Tensor, dict[str, Any]]: ...


def coco_of(data: _Detections) -> dict[str, Any]:
    """The COCO dict of samples with masks, labels as category ids; files are ``images/000000.png`` and so on.

    Args:
        data: samples as those of :class:`~efficient_attention.data.coco.CocoInstances`, and their ``categories``.

    Example:
        >>> coco_of(GeneratedShapes(2, size=(32, 32)))["images"][1]
        {'id': 1, 'file_name': '000001.png', 'height': 32, 'width': 32}
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(len(data)):
        image, target = data[i]
        height, width = image.shape[1:]
        number = target["image_id"]
        images.append({"id": number, "file_name": f"{i:06}.png", "height": height, "width": width})
        for j, outline in enumerate(encode_masks(target["masks"])):
            x0, y0, x1, y1 = target["boxes"][j].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(target["labels"][j]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(target["area"][j]),
                    "iscrowd": int(target["iscrowd"][j]),
                    "segmentation": outline,
                }
            )
    categories = [{"id": c.label, "name": c.name} for c in data.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(data: _Detections, folder: str | Path) -> None:
    """Write samples as a COCO folder, which :class:`~efficient_attention.data.coco.CocoInstances` reads back equal.

    ::

        folder/
          images/000000.png ...
          instances.json

    The folder appears when it is complete, or not at all.

    Args:
        data: see :func:`coco_of`.
        folder: which must not exist as yet.

    Raises:
        FileExistsError: it does.
    """
    from PIL import Image

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder must be a new one; '{folder}' exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (unfinished / "images").mkdir()
        for i in range(len(data)):
            pixels = (data[i][0] * 255).round().to(torch.uint8).movedim(0, 2)
            path = unfinished / "images" / f"{i:06}.png"
            Image.fromarray(pixels.contiguous().numpy()).save(path)
        description = {"info": {"description": repr(data)}, **coco_of(data)}
        (unfinished / "instances.json").write_text(json.dumps(description))
        # Temporary folders are for their owner's eyes; this one is a folder like others.
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _boxes_of(masks: Tensor) -> Tensor:
    """The smallest boxes around uint8 masks ``[N, H, W]``, none of them empty: ``[N, 4]`` float32."""
    ends = []
    for dim in (1, 2):  # over rows for x, over columns for y
        seen = masks.amax(dim)
        ends.append((seen.argmax(1), seen.shape[1] - seen.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1).float()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
