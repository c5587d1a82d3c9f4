"""Some of the images of one annotation file: those to train on, and those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["selected"]


def selected(
    names: Iterable[str],
    *,
    patterns: Sequence[str] | None = None,
    share: tuple[float, float] | None = None,
) -> set[str]:
    """Names that match a pattern, and of these the ones of a share.

    For shares, names are put in an order that follows from nothing but themselves and has nothing to do with the
    alphabet: neither a seed nor the machine, nor who asks. So shares that meet, as (0, 0.8) and (0.8, 1) do, have no
    name in common and together have all.

    Args:
        names: of files.
        patterns: as in a shell, ``site3/*.png``, or names; default: all.
        share: from where to where in that order, from 0 to 1; default: all.

    Raises:
        ValueError: a pattern that nothing matches; a share that is none, or has nothing in it.

    Example:
        >>> names = [f"{i}.png" for i in range(10)]
        >>> train, held_out = selected(names, share=(0, 0.8)), selected(names, share=(0.8, 1))
        >>> len(train), sorted(held_out), train & held_out
        (8, ['0.png', '1.png'], set())
    """
    found = set(names)
    if not found:
        return found
    if patterns is not None:
        matches = [{name for name in found if fnmatchcase(name, p)} for p in patterns]
        for pattern, matched in zip(patterns, matches, strict=True):
            if not matched:
                raise ValueError(f"images must be names or patterns of images; none is {pattern!r}")
        found = set().union(*matches)
    if share is not None:
        low, high = share
        if not 0 <= low < high <= 1:
            raise ValueError(f"share must be from 0 to 1, the first below the second; got {share}")
        order = sorted(found, key=lambda name: hashlib.blake2b(name.encode()).digest())
        found = set(order[round(low * len(order)) : round(high * len(order))])
    if not found:
        raise ValueError(f"images and share must leave an image; got {patterns} and {share}")
    return found
