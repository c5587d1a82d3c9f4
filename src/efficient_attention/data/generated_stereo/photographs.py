"""Photographs as tiles of texture.

scikit-image and scikit-learn bring a few; none of them is part of this package, and none is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..draws import seed_of
from ..images import read_image
from .textures import TILE_SIZE, closed

__all__ = ["installed_photographs", "photograph_tile"]

# Those with detail all over. Not the stereo pair: a picture to test with is none to learn from.
_INSTALLED = {
    "skimage": (
        "data",
        ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "rocket"),
    ),
    "sklearn": ("datasets/images", ("china", "flower")),
}


def installed_photographs() -> list[Path]:
    """The photographs that ship inside scikit-image and scikit-learn, neither of which is imported.

    Raises:
        ImportError: neither is installed.

    Example:
        >>> [path.name for path in installed_photographs()][0]
        'astronaut.png'
    """
    paths = []
    for package, (folder, names) in _INSTALLED.items():
        found = find_spec(package)
        for place in (found.submodule_search_locations if found else None) or ():
            files = (Path(place, folder, f"{n}{end}") for n in names for end in (".png", ".jpg"))
            paths += [path for path in files if path.is_file()]
    if not paths:
        raise ImportError(
            "photographs come with scikit-image: pip install 'efficient-attention[plot]', "
            "or name files of your own"
        )
    return paths


@lru_cache(maxsize=512)
def photograph_tile(paths: Sequence[Path], seed: int, number: int) -> Tensor:
    """A part of some photograph, with its mirror images, so that it can be repeated.

    Args:
        paths: a tuple of the files to choose from.
        seed: of the data set.
        number: of the tile; each another part.

    Returns:
        ``[3, TILE_SIZE + 1, TILE_SIZE + 1]`` in [0, 1]; shared, not to be changed.
    """
    random = np.random.default_rng(seed_of(seed, 1, number))
    image = _photograph(paths[int(random.integers(len(paths)))])
    half = TILE_SIZE // 2
    # From every texel a pixel to the whole picture in one tile.
    side = int(random.uniform(half, max(half, min(image.shape[1:])) + 1))
    top, left = (int(random.integers(0, max(1, length - side + 1))) for length in image.shape[1:])
    part = image[:, top : top + side, left : left + side].unsqueeze(0)
    part = F.interpolate(part, (half, half), mode="bilinear", antialias=True)[0]
    part = torch.cat([part, part.flip(1)], dim=1)
    return closed(torch.cat([part, part.flip(2)], dim=2))


@lru_cache(maxsize=32)
def _photograph(path: Path) -> Tensor:
    return read_image(path)
