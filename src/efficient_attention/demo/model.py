"""One efficient attention over every pixel of one photograph, fitted to that photograph.

There are no labels and no pretrained weights. A pixel is described by its appearance: its colour,
the mean colours around it, and its place. Every pixel attends to all pixels, and what it gets must
be its own appearance; all that it can get are T means over the photograph, one for each template
(key channel). So the templates have to become the photograph's parts.

Shapes: T templates, A = 11 channels of appearance, F of features, [h, w] thumbnail, [H, W]
photograph, N pixels. Pixels are sRGB in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import EfficientAttention2d
from ..modules.features import Projection
from .colour import from_oklab, to_oklab
from .photo import pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Bands", "PhotoAttention", "fit"]

# Material shows in hue more than in lightness, which shading changes.
_CHROMA = 4.5
# Two scales of mean colours around a pixel: cells per side of a square photograph, and a weight
# each.
_SURROUNDINGS = ((40, 0.5), (16, 0.3))
# Of the place: two like-coloured things in different corners are two things.
_PLACE = 0.8
_APPEARANCE = 3 + 3 * len(_SURROUNDINGS) + 2

# Weights of what the fit wants beside a good reconstruction; see _losses.
_AGREEMENT = 1.0
_DECISION = 0.1
_USE = 0.1


class PhotoAttention(nn.Module):
    """One :class:`EfficientAttention2d` on the appearance of a photograph's pixels.

    Keys and queries are 1x1 convolutions of the appearance and of a learned nonlinear expansion of
    it. The values are the appearance itself and the reprojection hands it back: both are constants,
    so that a template's context vector *is* the mean appearance of what its map attends to, and the
    maps can be taken at face value.

    Nothing depends on the resolution: fitted to a thumbnail, it runs on the photograph at any size.

    Args:
        thumbnail: ``[1, 3, h, w]``, the photograph at low resolution.
        templates: T, the number of key channels.
        hidden: width of the nonlinear expansion.
        seed: of the initial weights; the global random state is left alone.

    ``forward(pixels)``: ``[1, 3, H, W]`` to its reconstruction, of the same shape.

    Example:
        >>> thumbnail, photograph = torch.rand(1, 3, 32, 48), torch.rand(1, 3, 320, 480)
        >>> PhotoAttention(thumbnail)(photograph).shape
        torch.Size([1, 3, 320, 480])

    Paper: Shen et al. 2021, Sec. 3.2 (the module) and 3.4 (templates).
    """

    mean: Tensor
    contrast: Tensor

    def __init__(self, thumbnail: Tensor, *, templates: int = 12, hidden: int = 48, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.expansion = nn.Conv2d(_APPEARANCE, hidden, kernel_size=1)
            self.attention = EfficientAttention2d(
                _APPEARANCE + hidden, templates, _APPEARANCE, residual=False, init="official"
            )
        _pass_through(self.attention.values, _APPEARANCE)
        _pass_through(self.attention.reprojection, _APPEARANCE)

        colour = _weighted_colour(thumbnail)
        self.register_buffer("mean", colour.mean((2, 3), keepdim=True))
        # At least a just noticeable difference, so that a blank picture is no division by zero.
        self.register_buffer("contrast", colour.var((2, 3)).mean().sqrt().clamp(min=0.01))
        for cells, _ in _SURROUNDINGS:
            self.register_buffer(f"means_{cells}", _cell_means(colour, cells))

    def appearance(self, pixels: Tensor, top: int = 0, height: int | None = None) -> Tensor:
        """For every pixel its colour, the mean colours around it, its place: ``[1, A, rows, W]``.

        Args:
            pixels: ``[1, 3, rows, W]``, rows of the photograph.
            top: the first of them.
            height: H of the photograph; default: ``pixels`` is all of it.
        """
        rows, width = pixels.shape[2:]
        height = rows if height is None else height
        place = _places(top, rows, height, width)  # [1, rows, W, 2]
        parts = [self._normalize(_weighted_colour(pixels))]
        for cells, weight in _SURROUNDINGS:
            means = self.get_buffer(f"means_{cells}")
            around = F.grid_sample(means, place, "bicubic", "border", align_corners=False)
            parts.append(weight * self._normalize(around))
        # As far to the side as up: places fill a rectangle of the photograph's shape and of one
        # area.
        aspect = place.new_tensor([width, height]) / math.sqrt(width * height)
        parts.append((_PLACE * aspect * place).permute(0, 3, 1, 2))
        return torch.cat(parts, dim=1)

    def features(self, pixels: Tensor, top: int = 0, height: int | None = None) -> Tensor:
        """The input of the attention, ``[1, F, rows, W]``; arguments as in :meth:`appearance`."""
        appearance = self.appearance(pixels, top, height)
        return torch.cat([appearance, F.gelu(self.expansion(appearance))], dim=1)

    def colours(self, output: Tensor) -> Tensor:
        """The pixels ``[1, 3, H, W]`` that the attention's output ``[1, F, H, W]`` stands for."""
        colour = output[:, :3] * self.contrast + self.mean
        return from_oklab(colour / _colour_weights(colour))

    def forward(self, pixels: Tensor) -> Tensor:
        """Rebuild ``pixels [1, 3, H, W]`` from the context of all of them; see the class."""
        return self.colours(self.attention(self.features(pixels)))

    def _normalize(self, colour: Tensor) -> Tensor:
        return (colour - self.mean) / self.contrast


class Bands:
    """The features of a photograph, a band of rows at a time: tiles for ``attend_tiles``.

    Only one band is in memory, whatever the size of the photograph.

    Args:
        model: whose features.
        image: the photograph, RGB.
        pixels: in one band, about.
    """

    def __init__(self, model: PhotoAttention, image: Image, pixels: int = 1 << 16):
        self.model = model
        self.image = image
        self.rows = max(1, pixels // image.width)

    def __iter__(self) -> Iterator[Tensor]:
        height = self.image.height
        for top in range(0, height, self.rows):
            pixels = pixels_of(self.image, top, min(top + self.rows, height))
            yield self.model.features(pixels, top, height)


def fit(
    model: PhotoAttention,
    thumbnail: Tensor,
    steps: int,
    *,
    learning_rate: float = 0.015,
    report: Callable[[int, float], None] = lambda step, error: None,
) -> list[float]:
    """Fit the attention to the photograph: Adam, on all pixels of the thumbnail at every step.

    Args:
        model: changed in place.
        thumbnail: ``[1, 3, h, w]``.
        steps: how many.
        learning_rate: the highest; it rises and falls over the steps.
        report: called after each step with its number, from 1, and its error.

    Returns:
        The error before each step: the share of the appearance's variance that the reconstruction
        misses.

    Example:
        >>> thumbnail = torch.rand(1, 3, 32, 32)
        >>> errors = fit(PhotoAttention(thumbnail), thumbnail, steps=50)
        >>> errors[-1] < errors[0]
        True
    """
    appearance = model.appearance(thumbnail)
    variance = float(appearance.var((2, 3), correction=0).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    errors = []
    for step in range(1, steps + 1):
        error, regularization = _losses(model.attention, model.features(thumbnail), appearance)
        optimizer.zero_grad()
        (error + regularization).backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach()) / variance)
        report(step, errors[-1])
    return errors


def _losses(
    attention: EfficientAttention2d, features: Tensor, appearance: Tensor
) -> tuple[Tensor, Tensor]:
    """The squared error of the reconstruction, and what makes the maps worth looking at."""
    rebuilt = attention(features)[:, :_APPEARANCE]
    error = (rebuilt - appearance).square().sum(1).mean()

    log_shares = attention.queries(features).flatten(2).log_softmax(1)  # log rho_q(Q)  [1, T, N]
    log_maps = attention.keys(features).flatten(2).log_softmax(2)  # log rho_k(K)  [1, T, N]
    shares = log_shares.exp()

    # A template is read by the pixels that ask for it, so they are what it should attend to: the
    # divergence of its map from that of who asks. Without this a map shrinks to a few extreme
    # pixels, of which any appearance can be mixed.
    log_askers = log_shares - log_shares.logsumexp(2, keepdim=True)
    disagreement = (log_askers.exp() * (log_askers - log_maps)).sum(2).mean()
    # A pixel belongs to one part: the entropy of its shares.
    indecision = -(shares * log_shares).sum(1).mean()
    # Every template is asked for by some: one that nobody asks for would never get a gradient
    # again.
    idleness = -shares.mean(2).log().mean()
    return error, _AGREEMENT * disagreement + _DECISION * indecision + _USE * idleness


def _weighted_colour(pixels: Tensor) -> Tensor:
    return to_oklab(pixels) * _colour_weights(pixels)


def _colour_weights(like: Tensor) -> Tensor:
    return like.new_tensor([1, _CHROMA, _CHROMA]).view(1, 3, 1, 1)


def _cell_means(colour: Tensor, cells: int) -> Tensor:
    """Means over cells: ``cells x cells`` in a square picture, about as many in any other."""
    height, width = colour.shape[2:]
    side = math.sqrt(height * width) / cells
    counts = (max(1, round(height / side)), max(1, round(width / side)))
    return F.adaptive_avg_pool2d(colour, counts)


def _places(top: int, rows: int, height: int, width: int) -> Tensor:
    """Where the pixels of some rows are, ``[1, rows, W, 2]``: x and y, -1 to 1 over the photo."""
    x = (2 * torch.arange(width) + 1) / width - 1
    y = (2 * torch.arange(top, top + rows) + 1) / height - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).unsqueeze(0)


def _pass_through(projection: Projection, channels: int) -> None:
    """Make a 1x1 convolution the constant that hands the first channels on."""
    projection.requires_grad_(False)
    nn.init.zeros_(projection.weight)
    nn.init.eye_(projection.weight[:channels, :channels, 0, 0])
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
