"""EA Mask R-CNN: torchvision's Mask R-CNN, with attention in its backbone and feature pyramid.

Sizes: B pictures of a batch, padded to the H x W of the largest; a feature map of stride s has H / s rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import mask_rcnn as torchvision_mask_rcnn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.resnet import ResNet as Body
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from ..modules import masked
from ..modules.masking import attention_over
from .network import Network, Place
from .norms import norm_layer
from .padding import inside, zero_outside
from .resnet import STAGES, body_layout, stage_channels

__all__ = ["MaskRCNN", "mask_rcnn"]

PADDING = ("independent", "masked", "visible")
# The masks of a batch are set on the modules while it runs.
_ONE_AT_A_TIME = threading.RLock()
_STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}


class MaskRCNN(Network, torchvision_mask_rcnn.MaskRCNN):
    """Mask R-CNN on a feature pyramid: boxes, classes and masks of objects; ``state_dict`` keys are torchvision's.

    ``forward(images, targets=None)`` is that of ``torchvision.models.detection``: a list of pictures ``[3, H, W]`` of
    any sizes, values in [0, 1]; in evaluation mode, for each a dict of ``boxes`` (``[N, 4]``, pixels, x1 y1 x2 y2),
    ``labels``, ``scores`` and ``masks`` (``[N, 1, H, W]``, probabilities); in training mode, with targets of the same
    form, a dict of losses.

    Pictures are padded to a batch. What is padded has no part in a picture's result, whoever its batch mates are:

    - ``padding="independent"``: each picture is computed as if it were alone (up to rounding). Attention gives padded
      positions no weight at any stride, convolutions see zeros behind a picture's edge, and in evaluation mode
      proposals and detections are found picture by picture. Pictures alone, or of one size, are computed as by
      torchvision, bit for bit.
    - ``"masked"``: attention gives padded positions no weight; all else is torchvision's, also for pictures of several
      sizes, whose results depend on each other at the edges and by the proposals.
    - ``"visible"``: attention attends to padding, too: the difference that the mask makes.

    Places: ``res2`` to ``res5``, the stages of the backbone (``res3`` feeds both ``res4`` and the pyramid); ``fpn1`` to
    ``fpn5``, the levels of the pyramid at strides 4 to 64. Level 5 is sampled from the attended level 4, then attended.

    Args:
        backbone: returns a dict of five feature maps, as :func:`mask_rcnn` builds it.
        padding: see above.
        options: those of torchvision's ``MaskRCNN``.

    Raises:
        ValueError: no pictures; training without targets, or with boxes that are no boxes.

    Example:
        >>> detector = create_model("mask_rcnn_small", num_classes=3).eval()
        >>> [found["masks"].shape[2:] for found in detector([torch.rand(3, 64, 80), torch.rand(3, 50, 40)])]
        [torch.Size([64, 80]), torch.Size([50, 40])]

    Paper: Shen et al. 2021, Sec. 4 (object detection and instance segmentation on MS-COCO); He et al. 2017.
    """

    paper_places = ("res3", "res4", "fpn1", "fpn2", "fpn3", "fpn4", "fpn5")

    # What torchvision's constructor makes.
    backbone: Any
    transform: Any
    rpn: Any
    roi_heads: Any

    def __init__(self, backbone: nn.Module, *, padding: str = "independent", **options: Any):
        super().__init__(backbone, **options)
        if padding not in PADDING:
            raise ValueError(f"padding must be one of {PADDING}; got {padding!r}")
        self.padding = padding
        # Otherwise inferred, once for all, from the first picture, and wrongly if it is thin.
        for pool in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            strides = [_STRIDES[level] for level in pool.featmap_names]
            pool.scales = [1 / stride for stride in strides]
            pool.map_levels = initLevelMapper(*(int(math.log2(strides[end])) for end in (0, -1)))

    @property
    def places(self) -> dict[str, Place]:
        """The stages of the backbone and the levels of the pyramid, named as in the paper."""
        backbone = self.backbone
        found = {
            place: Place(f"backbone.body.{stage}", 2, stage_channels(backbone.body, stage))
            for place, stage in STAGES.items()
        }
        levels = [f"layer_blocks.{i}" for i in range(4)] + ["extra_blocks.p6"]
        for i, level in enumerate(levels, 1):
            found[f"fpn{i}"] = Place(f"backbone.fpn.{level}", 2, backbone.out_channels)
        return found

    @property
    def configuration(self) -> dict[str, Any]:
        """The arguments of :func:`create_model`, with the padding as it is now."""
        return {**super().configuration, "padding": self.padding}

    @configuration.setter
    def configuration(self, arguments: dict[str, Any]) -> None:
        self._configuration = arguments

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training mode, detections in evaluation mode; see the class."""
        if not images:
            raise ValueError("images must be a list of pictures [3, H, W]; got none")
        if self.training:
            _check_targets(images, targets)
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self._features(batch)
        if self.training:
            proposals, losses = self.rpn(batch, features, targets)
            _, head_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
            return {**head_losses, **losses}
        detections = self._detections(batch, features)
        return self.transform.postprocess(detections, batch.image_sizes, sizes)

    def detect_small(
        self, images: Sequence[Tensor]
    ) -> tuple[list[dict[str, Tensor]], list[tuple[int, int]]]:
        """What evaluation finds, before masks are painted into pictures, which takes ``4 N H W`` bytes.

        Args:
            images: as :meth:`forward` takes them.

        Returns:
            For every picture a dict with boxes of its scaled form and masks ``[N, 1, 28, 28]``; and the sizes of the
            scaled pictures. ``transform.postprocess`` makes what :meth:`forward` returns, for all objects or some.
        """
        batch, _ = self.transform(images)
        return self._detections(batch, self._features(batch)), batch.image_sizes

    def _detections(self, batch: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        detections = []
        for part, part_features in self._parts(batch, features):
            proposals, _ = self.rpn(part, part_features)
            detections += self.roi_heads(part_features, proposals, part.image_sizes)[0]
        return detections

    def _features(self, batch: ImageList) -> dict[str, Tensor]:
        """The five maps of the pyramid, ``[B, C, H / s, W / s]``."""
        tensors = batch.tensors
        canvas, device = tuple(tensors.shape[-2:]), tensors.device
        pictures = extents = None
        if self.padding != "visible" and self._attends():
            pictures = inside(batch.image_sizes, canvas, device)
        if self.padding == "independent":
            extents = inside([self._extent(size) for size in batch.image_sizes], canvas, device)
        with _ONE_AT_A_TIME, masked(self.backbone, pictures), zero_outside(self.backbone, extents):
            return self.backbone(tensors)

    def _parts(
        self, batch: ImageList, features: dict[str, Tensor]
    ) -> Iterator[tuple[ImageList, dict[str, Tensor]]]:
        """What is detected in together: each picture as it would be alone, or the batch."""
        if self.padding != "independent":
            yield batch, features
            return
        for i, size in enumerate(batch.image_sizes):
            height, width = self._extent(size)
            levels = {
                name: level[i : i + 1, :, : -(-height // s), : -(-width // s)]
                for (name, level), s in zip(features.items(), _STRIDES.values(), strict=True)
            }
            yield ImageList(batch.tensors[i : i + 1, :, :height, :width], [size]), levels

    def _extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size to which a picture is padded when it is alone."""
        divisor = self.transform.size_divisible
        height, width = (-(-length // divisor) * divisor for length in size)
        return height, width

    def _attends(self) -> bool:
        return bool(attention_over(self.backbone, 2))


class AttendedPool(LastLevelMaxPool):
    """The fifth level of the pyramid, sampled from the fourth; and a place for attention behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.p6 = nn.Sequential()

    def forward(
        self, x: list[Tensor], y: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The levels and their names, with one more of each."""
        levels, names = super().forward(x, y, names)
        return [*levels[:-1], self.p6(levels[-1])], names


def mask_rcnn(
    *,
    body: str,
    heads: str = "v1",
    num_classes: int = 91,
    norm: str = "batch",
    norm_eps: float = 1e-5,
    trainable_layers: int = 5,
    padding: str = "independent",
    min_size: int = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_test: int = 1000,
) -> MaskRCNN:
    """Mask R-CNN as torchvision builds it, without attention as yet.

    Weights of torchvision's ``maskrcnn_resnet50_fpn`` (``COCO_V1``: with ``norm="frozen"``, ``norm_eps=0.0``) and
    ``maskrcnn_resnet50_fpn_v2`` load, see :func:`load_checkpoint`.

    Args:
        body: ``"resnet50"``, ``"resnet101"``, ``"resnext101_32x8d"``, or ``"resnet10"`` with thin heads.
        heads: ``"v1"``; ``"v2"``, with batch normalization in pyramid and heads; ``"thin"``, for small machines.
        num_classes: background included: 91 is COCO's.
        norm: of the body, see :func:`~efficient_attention.models.norms.norm_layer`; ``"frozen"`` to fine-tune.
        norm_eps: added to variances in the body.
        trainable_layers: stages of the body that train, from the last; 5: all. 3 is usual for pretrained weights.
        padding: see :class:`MaskRCNN`.
        min_size: to which the shorter side of a picture is scaled, pixels.
        max_size: which the longer side does not exceed, pixels.
        image_mean: of the normalization; default: ImageNet's.
        image_std: of the normalization; default: ImageNet's.
        box_score_thresh: below which detections are dropped.
        box_nms_thresh: overlap above which the weaker of two boxes is dropped.
        box_detections_per_img: the most that are kept.
        rpn_post_nms_top_n_train: proposals that reach the heads, for each picture.
        rpn_post_nms_top_n_test: the same in evaluation mode.

    Raises:
        ValueError: unknown names, ``trainable_layers`` outside 0 to 5.
    """
    if heads not in _HEADS:
        raise ValueError(f"heads must be one of {tuple(_HEADS)}; got {heads!r}")
    network = Body(**body_layout(body), norm_layer=norm_layer(norm, norm_eps))
    _freeze(network, trainable_layers)
    channels = 64 if heads == "thin" else 256
    backbone = BackboneWithFPN(
        network,
        return_layers={stage: str(i) for i, stage in enumerate(STAGES.values())},
        in_channels_list=[stage_channels(network, stage) for stage in STAGES.values()],
        out_channels=channels,
        extra_blocks=AttendedPool(),
        norm_layer=nn.BatchNorm2d if heads == "v2" else None,
    )
    return MaskRCNN(
        backbone,
        padding=padding,
        min_size=min_size,
        max_size=max_size,
        image_mean=image_mean,
        image_std=image_std,
        box_score_thresh=box_score_thresh,
        box_nms_thresh=box_nms_thresh,
        box_detections_per_img=box_detections_per_img,
        rpn_post_nms_top_n_train=rpn_post_nms_top_n_train,
        rpn_post_nms_top_n_test=rpn_post_nms_top_n_test,
        **_HEADS[heads](channels, num_classes),
    )


def _plain_heads(_channels: int, num_classes: int) -> dict[str, Any]:
    return {"num_classes": num_classes}


def _normalized_heads(channels: int, num_classes: int) -> dict[str, Any]:
    norm: Any = nn.BatchNorm2d
    return {
        "num_classes": num_classes,
        "rpn_head": RPNHead(channels, 3, conv_depth=2),
        "box_head": FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], norm_layer=norm),
        "mask_head": MaskRCNNHeads(channels, [256] * 4, 1, norm_layer=norm),
    }


def _thin_heads(channels: int, num_classes: int) -> dict[str, Any]:
    sizes = tuple((size,) for size in (16, 32, 64, 128, 256))
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_head": TwoMLPHead(channels * 7 * 7, 128),
        "box_predictor": FastRCNNPredictor(128, num_classes),
        "mask_head": MaskRCNNHeads(channels, [64, 64], 1),
        "mask_predictor": MaskRCNNPredictor(64, 64, num_classes),
    }


_HEADS = {"v1": _plain_heads, "v2": _normalized_heads, "thin": _thin_heads}


def _freeze(body: nn.Module, trainable_layers: int) -> None:
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be from 0 to 5; got {trainable_layers}")
    stages = [("conv1", "bn1"), *((stage,) for stage in STAGES.values())]
    for names in stages[: 5 - trainable_layers]:
        for name in names:
            body.get_submodule(name).requires_grad_(False)


def _check_targets(
    images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None
) -> None:
    if targets is None or len(targets) != len(images):
        count = "none" if targets is None else len(targets)
        raise ValueError(
            f"targets must be given for all {len(images)} images to train; got {count}"
        )
    for i, target in enumerate(targets):
        name, boxes = f"targets[{i}]['boxes']", target.get("boxes")
        if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4:
            got = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise ValueError(f"{name} must be a tensor [N, 4]; got {got}")
        absent = [key for key in ("labels", "masks") if key not in target]
        if absent:
            raise ValueError(f"targets[{i}] must have boxes, labels and masks; it lacks {absent}")
        # NaN is neither more nor less.
        flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
        if flat.any():
            raise ValueError(f"{name} must have x1 < x2 and y1 < y2; got {boxes[flat][0].tolist()}")
