"""The objects in a picture: boxes, classes, scores and outlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.segmentations import encode_masks
from .forward import device_of, inference

__all__ = ["FoundObjects", "coco_results", "predict_objects"]

# Of masks at the picture's size that are there at a time, twice over.
_MASK_BYTES = 2**26


class FoundObjects(NamedTuple):
    """Objects in a picture of ``H x W`` pixels, from the highest score down.

    Attributes:
        boxes: ``[N, 4]`` float32: x0, y0, x1, y1 in pixels.
        labels: ``[N]`` int64.
        scores: ``[N]`` float32 in [0, 1].
        outlines: N run lengths of masks, as COCO has them: ``{"size": [H, W], "counts": "..."}``.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    outlines: list[dict[str, Any]]


def predict_objects(
    network: Any, picture: Tensor, *, dtype: torch.dtype = torch.float32
) -> FoundObjects:
    """What a detector finds in a picture.

    The same as ``network([picture])``, with masks where they exceed 0.5; but these are painted a few at a time, since a
    hundred of them in a picture of 3840 x 2160 pixels would take 3 GB, twice.

    Args:
        network: a :class:`~efficient_attention.models.mask_rcnn.MaskRCNN` in evaluation mode.
        picture: ``[3, H, W]``, uint8, or floating-point in [0, 1]. The network scales it as it is used to.
        dtype: float32, or bfloat16 for autocast.

    Returns:
        The objects, on the CPU: all whose score reaches the network's own threshold.

    Raises:
        ValueError: another shape, or a network in training mode.

    Example:
        >>> import efficient_attention
        >>> network = efficient_attention.create_model("mask_rcnn_small", num_classes=3, min_size=64).eval()
        >>> predict_objects(network, torch.rand(3, 64, 80)).boxes.shape[1]
        4

    Paper: Shen et al. 2021, Sec. 4 (MS-COCO).
    """
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise ValueError(f"picture must have shape [3, H, W]; got {tuple(picture.shape)}")
    height, width = picture.shape[1:]
    with inference(network, dtype):
        colours = picture.to(device_of(network)).float()
        colours = colours / 255 if picture.dtype == torch.uint8 else colours
        (found,), scaled = network.detect_small([colours])
        found = {key: x.float() if x.is_floating_point() else x for key, x in found.items()}
        rows = max(1, _MASK_BYTES // (4 * height * width))
        boxes, outlines = [torch.zeros(0, 4)], []
        for start in range(0, len(found["boxes"]), rows):
            part = {key: x[start : start + rows] for key, x in found.items()}
            (painted,) = network.transform.postprocess([part], scaled, [(height, width)])
            boxes.append(painted["boxes"].cpu())
            outlines += encode_masks(painted["masks"][:, 0] > 0.5)
    labels, scores = found["labels"].cpu(), found["scores"].cpu()
    return FoundObjects(torch.cat(boxes), labels.clone(), scores.clone(), outlines)


def coco_results(
    found: FoundObjects,
    image_id: int,
    file_name: str,
    ids: Mapping[int, int],
    names: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Objects as COCO's results have them, and with the names of picture and class.

    Args:
        found: the objects.
        image_id: of the picture.
        file_name: of the picture.
        ids: the category of each label; a label without one is its own.
        names: the name of each label, where it has one.
    """
    low, high = found.boxes.double().split(2, 1)
    columns = (
        found.labels.tolist(),
        found.scores.tolist(),
        low.tolist(),
        (high - low).tolist(),
        found.outlines,
    )
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": ids.get(label, label),
            **({"category": names[label]} if label in names else {}),
            "score": score,
            "bbox": [*corner, *extent],
            "segmentation": outline,
        }
        for label, score, corner, extent, outline in zip(*columns, strict=True)
    ]
