"""What is compared at a place: efficient attention, and dot-product attention with and without its map in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import modules
from ..modules.dot_product import DotProductModule
from ..modules.features import FeatureMaps, Tokens

#: Kinds and how tables call them.
KINDS = {
    "efficient": "efficient",
    "explicit": "dot-product, N x M",
    "fused": "dot-product, fused",
}


def build(
    kind: str, dimensions: int | str, channels: int, options: Mapping[str, Any]
) -> nn.Module | None:
    """Attention of a kind, as :func:`insert` would put it at a place; ``None`` if there is none with these options.

    Args:
        kind: one of :data:`KINDS`.
        dimensions: 1, 2, 3, ``"tokens"`` or ``"channels_last"``.
        channels: at the place.
        options: of the module, with its ``device`` and ``dtype``.
    """
    efficient = _EFFICIENT[dimensions](channels, residual=True, init="zero", **options)
    if kind == "efficient":
        return efficient
    scaling = efficient.normalization == "scaling"
    if kind == "fused" and scaling:
        # PyTorch fuses a softmax, and nothing else.
        return None
    return (_Fused if kind == "fused" or scaling else _Explicit)(
        FeatureMaps(dimensions) if isinstance(dimensions, int) else Tokens(),
        channels,
        efficient.key_channels,
        efficient.value_channels,
        num_heads=efficient.num_heads,
        normalization=efficient.normalization,
        residual=True,
        init="zero",
        device=options["device"],
        dtype=options["dtype"],
    )


_EFFICIENT: dict[Any, Any] = {n: getattr(modules, f"EfficientAttention{n}d") for n in (1, 2, 3)}
_EFFICIENT["tokens"] = modules.EfficientAttention
_EFFICIENT["channels_last"] = modules.EfficientAttentionChannelsLast


class _Fused(DotProductModule):
    """Dot-product attention of this package: fused under softmax, with the map in memory under scaling."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self._features, Tokens):
            return self._run(x.flatten(1, -2), None).view_as(x)
        return self._run(x, None)


class _Explicit(_Fused):
    """Dot-product attention as its equation has it: scores and weights of all pairs are in memory."""

    def _run(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        features = self._features
        query, key, value = (
            features.split(project(x), self.num_heads)
            for project in (self.queries, self.keys, self.values)
        )  # [B, h, N, c / h]
        attended = (query @ key.mT).softmax(-1) @ value
        return self._with_residual(x, self.reprojection(features.join(attended, like=x)))
