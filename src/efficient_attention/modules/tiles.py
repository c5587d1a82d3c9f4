"""Inputs larger than memory: the exact result for the whole from its tiles, in two passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..ops import Context
from .projected import EfficientModule

__all__ = ["attend_tiles"]

_SPENT: Any = object()


def attend_tiles(
    module: EfficientModule,
    tiles: Iterable[Tensor],
    *,
    key_masks: Iterable[Tensor | None] | None = None,
) -> Iterator[Tensor]:
    """Apply a module to a whole that is given in tiles: the first pass summarizes, the second attends.

    Every position of every tile attends to all positions of all tiles, exactly as if they were one input: contexts
    merge. Only one tile is in memory at a time, beside a context of fixed size. Tiles may differ in shape and must
    not overlap; a halo is hidden from the first pass by ``key_masks``.

    Args:
        module: an ``EfficientAttention1d``, ``2d``, ``3d`` or ``EfficientAttention``.
        tiles: inputs of the module; iterated over twice, so a list or an object that reads tiles anew, not a
            generator that is spent after one pass.
        key_masks: for every tile the ``key_mask`` of ``module.summarize``, or ``None``.

    Yields:
        The module's output for each tile, in order.

    Raises:
        TypeError: ``tiles`` can be iterated over only once, or the module has no context.
        ValueError: there are no tiles, or not as many ``key_masks``.

    Example:
        >>> attention = efficient_attention.EfficientAttention2d(16)
        >>> image = torch.randn(1, 16, 64, 96)
        >>> parts = list(efficient_attention.attend_tiles(attention, image.split(40, dim=3)))
        >>> torch.allclose(torch.cat(parts, dim=3), attention(image), atol=1e-6)
        True

    Paper: Shen et al. 2021, Sec. 3.2: the context is all that a query needs to know of the keys.
    """
    if not isinstance(module, EfficientModule):
        raise TypeError(
            f"module must be an EfficientAttention, or 1d, 2d or 3d; got {type(module).__name__}"
        )
    if isinstance(tiles, Iterator):
        raise TypeError(
            "tiles must be iterable twice, like a list or an object with __iter__ that starts anew; "
            f"got a {type(tiles).__name__}"
        )
    return _attend_tiles(module, tiles, key_masks)


def _attend_tiles(
    module: EfficientModule,
    tiles: Iterable[Tensor],
    key_masks: Iterable[Tensor | None] | None,
) -> Iterator[Tensor]:
    masks = itertools.repeat(None) if key_masks is None else iter(key_masks)
    parts: list[tuple[int, Context]] = []
    for tile in tiles:
        mask = next(masks, _SPENT)
        if mask is _SPENT:
            raise ValueError("key_masks must be as many as tiles; got fewer")
        parts.append((1, module.summarize(tile, key_mask=mask)))
        # Equals merge with equals, like the digits of a counter: a balanced tree, whose rounding grows with the
        # logarithm of the number of tiles.
        while len(parts) > 1 and parts[-1][0] == parts[-2][0]:
            (size, last), (_, before) = parts.pop(), parts.pop()
            parts.append((2 * size, before.merge(last)))
    if key_masks is not None and next(masks, _SPENT) is not _SPENT:
        raise ValueError("key_masks must be as many as tiles; got more")
    if not parts:
        raise ValueError("tiles must hold at least one tile; got none")
    first, *rest = (context for _, context in parts)
    context = first.merge(*rest)
    for tile in tiles:
        yield module.attend(tile, context)
