"""EA-PSMNet: disparity from two rectified views by a cost volume that attention sees as a whole.

Written from the paper of Chang and Chen 2018, "Pyramid Stereo Matching Network" (arXiv 1803.08669); names and shapes in
the state_dict are those of its authors' code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .disparity import cost_volume, soft_argmin
from .network import Network, Place
from .psmnet_layers import Features, Hourglass, convolution, initialize

__all__ = ["PSMNet", "psmnet_small"]

_HEADS = ("stacked_hourglass", "basic")
_NORMS = ("batch", "group")
# Features are at a quarter of the size, and the hourglass halves the volume twice.
_STRIDE = 16
_LEAST_WIDTH = 4


class PSMNet(Network):
    """Disparity of every pixel of the left view, from a volume of features of both views at every shift between them.

    Features at a quarter of the size, with means over regions; the features of both views at ``max_disparity / 4``
    shifts, a volume that 3-D convolutions turn into scores; the expected disparity under the scores' softmax.

    ``forward(left, right)``: two rectified views ``[B, 3, H, W]`` of any size, floating-point, normalized by the caller
    with ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225) of colours in [0, 1]. Zeros, which
    are the mean colour, pad them at the top and right to multiples of 16, and are cropped from the result. Returns
    disparities ``[B, H, W]`` in pixels, float32 or float64: what is at column x on the left is at ``x - disparity`` on
    the right. In training mode, a tuple of those of every head, from coarse to fine: three, or one for ``"basic"``,
    weighted in the loss by ``loss_weights``. The last of them is what evaluation returns.

    Places: ``volume``, 3-D, the paper's, C channels at a quarter of disparities, rows and columns: the cost volume
    behind the residual sum before the hourglasses, 393,216 positions for 256 x 512 views and 192 disparities;
    ``features``, 2-D, what the volume is built from; ``hourglass1`` to ``hourglass3``, 3-D, 2C channels, where the
    hourglasses are narrowest, at a sixteenth. Attention there takes the padding's positions as any others.

    The authors' checkpoints load, through :func:`load_checkpoint`, into ``align_corners=True`` where they are of
    PyTorch 0.4 or before and False where they are of 2021. A Scene Flow file of the first kind is known to give
    disparities that are 1.17 times too small; networks that others trained do not.

    For speed on a CPU: ``torch.nn.utils.convert_conv3d_weight_memory_format(network, torch.channels_last_3d)``;
    ``torch.autocast("cpu", torch.bfloat16)`` where it has instructions for that, and not elsewhere, nor to train on
    views so small that an hourglass is two levels deep, where PyTorch 2.14 gives weights gradients of NaN; in float32,
    batches of two pairs or more: PyTorch runs 3-D convolutions of one small volume without oneDNN, up to eight times
    slower.

    Args:
        max_disparity: in pixels, a multiple of 16; disparities are in ``[0, max_disparity - 1]``.
        head: ``"stacked_hourglass"``, three hourglasses with a prediction each, or ``"basic"``, three residual units.
        width: C, channels of features; other layers have multiples of it.
        norm: ``"batch"``, or ``"group"``, for batches of one or two.
        align_corners: of upsampling, as in ``torch.nn.functional.interpolate``; to be what weights were trained with.

    Raises:
        ValueError: sizes or names that are not these; views that are no pair; batch normalization to be trained on
            one value per channel, which is what pools of 64 leave of a single pair with both sides below 512.
        TypeError: views that are not floating-point.

    Example:
        >>> network = efficient_attention.create_model("psmnet_small", at={"volume": {"num_heads": 2}}).eval()
        >>> left, right = torch.randn(2, 1, 3, 60, 100)
        >>> network(left, right).shape
        torch.Size([1, 60, 100])

    Paper: Shen et al. 2021, Sec. 4 (EA-PSMNet on Scene Flow); Chang and Chen 2018.
    """

    paper_places = ("volume",)

    # Hourglasses, or residual units.
    dres2: nn.Module
    dres3: nn.Module
    dres4: nn.Module

    def __init__(
        self,
        *,
        max_disparity: int = 192,
        head: str = "stacked_hourglass",
        width: int = 32,
        norm: str = "batch",
        align_corners: bool = False,
    ):
        super().__init__()
        _check_options(max_disparity, head, width, norm)
        self.max_disparity = max_disparity
        self.head = head
        self.width = width
        self.align_corners = align_corners
        self.feature_extraction = Features(width, norm=norm, align_corners=align_corners)
        self.dres0 = nn.Sequential(
            convolution(3, 2 * width, width, norm=norm),
            nn.ReLU(inplace=True),
            convolution(3, width, width, norm=norm),
            nn.ReLU(inplace=True),
        )
        self.dres1 = _residual(width, norm)
        # Nothing, and so without keys: a place for attention, as the sum is no module's output.
        self.volume = nn.Sequential()
        if head == "basic":
            self.dres2, self.dres3, self.dres4 = (_residual(width, norm) for _ in range(3))
            self.classify = _classifier(width, norm)
        else:
            self.dres2, self.dres3, self.dres4 = (Hourglass(width, norm=norm) for _ in range(3))
            self.classif1, self.classif2, self.classif3 = (
                _classifier(width, norm) for _ in range(3)
            )
        initialize(self)

    @property
    def places(self) -> dict[str, Place]:
        """Where attention fits; see the class."""
        places = {
            "volume": Place("volume", 3, self.width),
            "features": Place("feature_extraction.lastconv", 2, self.width),
        }
        if self.head == "stacked_hourglass":
            for number in (1, 2, 3):
                narrowest = Place(f"dres{number + 1}.conv4", 3, 2 * self.width)
                places[f"hourglass{number}"] = narrowest
        return places

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weights of the losses of what training mode returns, in its order (Chang and Chen 2018, Sec. 4.2)."""
        return (1.0,) if self.head == "basic" else (0.5, 0.7, 1.0)

    def forward(self, left: Tensor, right: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The disparities of two views; see the class."""
        _check_views(left, right)
        height, width = left.shape[-2:]
        # Rounded up without a remainder, which the compiler has no tensors for.
        tall, wide = (-(-side // _STRIDE) * _STRIDE for side in (height, width))
        left, right = (F.pad(view, (0, wide - width, tall - height, 0)) for view in (left, right))
        self._check_pooled(left)
        scores = self._scores(self.feature_extraction(left), self.feature_extraction(right))
        size = (self.max_disparity, tall, wide)
        disparities = tuple(
            soft_argmin(score, size, align_corners=self.align_corners)[:, tall - height :, :width]
            for score in (scores if self.training else scores[-1:])
        )
        return disparities if self.training else disparities[0]

    def extra_repr(self) -> str:
        """What is not seen from the children."""
        return f"max_disparity={self.max_disparity}, align_corners={self.align_corners}"

    def _scores(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """How well the views match, coarse to fine: each ``[B, D / 4, H / 4, W / 4]``."""
        volume = self.dres0(cost_volume(left, right, self.max_disparity // 4))  # [B, C, D/4, ...]
        volume = self.volume(self.dres1(volume) + volume)
        if self.head == "basic":
            for residual in (self.dres2, self.dres3, self.dres4):
                volume = residual(volume) + volume
            return [self.classify(volume).squeeze(1)]
        out, first = self.dres2(volume)
        out = out + volume
        scores = [self.classif1(out)]
        out, second = self.dres3(out, first.down, first.up)
        out = out + volume
        scores.append(self.classif2(out) + scores[-1])
        # The way down of the first hourglass, not of the second: so in the authors' code.
        out, _ = self.dres4(out, first.down, second.up)
        scores.append(self.classif3(out + volume) + scores[-1])
        return [score.squeeze(1) for score in scores]

    def _check_pooled(self, view: Tensor) -> None:
        norm = self.feature_extraction.get_submodule("branch1.1.1")
        cells = [max(1, side // 256) for side in view.shape[-2:]]
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.training
            and len(view) * cells[0] * cells[1] == 1
        ):
            got = " x ".join(map(str, view.shape[-2:]))
            raise ValueError(
                "left and right must leave norm='batch' more than one value per channel to train on; got one pair "
                f"of {got}, which pooling makes one. Take two pairs, a side of 512 or norm='group'"
            )


def psmnet_small(
    *,
    max_disparity: int = 64,
    head: str = "stacked_hourglass",
    width: int = 8,
    norm: str = "group",
    align_corners: bool = False,
) -> PSMNet:
    """PSMNet for small machines and single pairs, 0.33 million parameters, without attention as yet.

    Args:
        max_disparity: see :class:`PSMNet`, as the others.
        head: what turns the volume into scores.
        width: of features.
        norm: of layers.
        align_corners: of upsampling.
    """
    return PSMNet(
        max_disparity=max_disparity,
        head=head,
        width=width,
        norm=norm,
        align_corners=align_corners,
    )


def _residual(width: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        convolution(3, width, width, norm=norm),
        nn.ReLU(inplace=True),
        convolution(3, width, width, norm=norm),
    )


def _classifier(width: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        convolution(3, width, width, norm=norm),
        nn.ReLU(inplace=True),
        nn.Conv3d(width, 1, 3, padding=1, bias=False),
    )


def _check_options(max_disparity: int, head: str, width: int, norm: str) -> None:
    if not isinstance(max_disparity, int) or max_disparity < _STRIDE or max_disparity % _STRIDE:
        raise ValueError(
            f"max_disparity must be a positive multiple of {_STRIDE}; got {max_disparity}"
        )
    if head not in _HEADS:
        raise ValueError(f"head must be one of {_HEADS}; got {head!r}")
    if width < _LEAST_WIDTH:
        raise ValueError(f"width must be at least {_LEAST_WIDTH}; got {width}")
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {_NORMS}; got {norm!r}")


def _check_views(left: Tensor, right: Tensor) -> None:
    for name, view in (("left", left), ("right", right)):
        if not view.is_floating_point():
            raise TypeError(
                f"{name} must be floating-point, normalized with ImageNet's mean and deviation; got {view.dtype}"
            )
        if view.ndim != 4 or view.shape[1] != 3 or 0 in view.shape:
            raise ValueError(
                f"{name} must have shape [B, 3, H, W], none of them 0; got {tuple(view.shape)}"
            )
    if left.shape != right.shape:
        raise ValueError(
            f"right must have the shape of left, {tuple(left.shape)}; got {tuple(right.shape)}"
        )
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"right must be {left.dtype} on {left.device}, as left; got {right.dtype} on {right.device}"
        )
