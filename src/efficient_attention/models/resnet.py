"""EA ResNet: torchvision's ResNet, with attention behind the stages where the paper has it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

from .network import Network, Place
from .norms import norm_layer

__all__ = ["ResNet", "resnet"]

# The paper counts stages from conv1 = res1; torchvision counts behind it.
STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}

_LAYOUTS: dict[str, dict[str, Any]] = {
    "resnet10": {"block": BasicBlock, "layers": [1, 1, 1, 1]},
    "resnet50": {"block": Bottleneck, "layers": [3, 4, 6, 3]},
    "resnet101": {"block": Bottleneck, "layers": [3, 4, 23, 3]},
    "resnext101_32x8d": {
        "block": Bottleneck,
        "layers": [3, 4, 23, 3],
        "groups": 32,
        "width_per_group": 8,
    },
}


class ResNet(Network, torchvision_resnet.ResNet):
    """A residual network that classifies pictures; ``state_dict`` keys are torchvision's.

    ``forward(pictures)``: ``[B, 3, H, W]``, normalized with ImageNet's mean and deviation, to logits
    ``[B, num_classes]``. Places: ``res2`` to ``res5``, the outputs of the stages, at strides 4 to 32.

    Args:
        block: ``BasicBlock`` or ``Bottleneck`` of ``torchvision.models.resnet``.
        layers: blocks in each of the four stages.
        options: those of torchvision's ``ResNet``.

    Example:
        >>> sorted(create_model("resnet_small", attention="none").places)
        ['res2', 'res3', 'res4', 'res5']

    Paper: Shen et al. 2021, Sec. 4 (ImageNet, one module and two); He et al. 2016.
    """

    paper_places = ("res3", "res4")

    @property
    def places(self) -> dict[str, Place]:
        """The outputs of the stages, named as in the paper."""
        return {
            place: Place(stage, 2, stage_channels(self, stage)) for place, stage in STAGES.items()
        }


def stage_channels(body: nn.Module, stage: str) -> int:
    """Channels that a stage of a torchvision ResNet returns."""
    blocks: Any = body.get_submodule(stage)
    last = blocks[max(i for i, b in enumerate(blocks) if isinstance(b, BasicBlock | Bottleneck))]
    return last.conv3.out_channels if isinstance(last, Bottleneck) else last.conv2.out_channels


def resnet(*, body: str, num_classes: int = 1000, norm: str = "batch") -> ResNet:
    """A ResNet as torchvision builds it, without attention as yet; torchvision's weights load.

    Args:
        body: ``"resnet50"``, ``"resnet101"``, or ``"resnet10"``, one basic block a stage.
        num_classes: logits.
        norm: see :func:`~efficient_attention.models.norms.norm_layer`.

    Raises:
        ValueError: an unknown body or norm.
    """
    return ResNet(**body_layout(body), num_classes=num_classes, norm_layer=norm_layer(norm))


def body_layout(name: str) -> dict[str, Any]:
    """The arguments of torchvision's ``ResNet`` that make one of a name.

    Args:
        name: ``"resnet10"``, ``"resnet50"``, ``"resnet101"`` or ``"resnext101_32x8d"``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"body must be one of {tuple(_LAYOUTS)}; got {name!r}")
    return _LAYOUTS[name]
