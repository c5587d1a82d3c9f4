"""Generated stereo pairs as a data set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..draws import Draw, as_draw, seed_of
from ..stereo import StereoSample
from .cameras import Camera, random_cameras
from .choices import pick
from .photographs import photograph_tile
from .rendering import render
from .scenes import random_scene

__all__ = ["GeneratedStereo"]

# Keeps the seeds of scenes apart from those of textures.
_SCENE = 2


class GeneratedStereo(Dataset[StereoSample]):
    """Random scenes with exact disparities, to train a network that will see real pairs.

    Rooms, streets and hung cloth, filled with things that are flat, tilted, round, boxy, thin or full of holes, in
    textures that are rough, smooth, repeated or hardly there. What is hidden from the right camera is known, and all
    disparities are, to a hundredth of a pixel. Pictures are taken by two cameras that differ in exposure, colour, noise
    and, in some pairs, by a row; highlights lie elsewhere in either.

    What real pairs have and these have not: glass and mirrors, fur, things out of focus, textures that shrink with
    distance, and the roll of a camera.

    Sample i follows from ``seed`` and i alone, whoever asks for it and in whichever order; the same bits on the same
    machine. It is another for another size or range, and the seed of a :class:`Draw` does not change it: a data set of
    more samples than a run takes never repeats.

    Args:
        size: height and width of the images in pixels.
        max_disparity: all disparities are below, in pixels; nor do they exceed 45 % of the width.
        length: how many samples.
        seed: of everything; another one for data to validate with.
        photographs: files of pictures which half of the surfaces then show, :func:`installed_photographs` for some.
            Default: none; all textures are computed.
        ideal_cameras: leaves out all by which two cameras differ, and blur and noise.

    Raises:
        ValueError: a size below 32 pixels, no room for disparities, no sample, or a negative seed.
        FileNotFoundError: a photograph does not exist.

    Example:
        >>> sample = GeneratedStereo((64, 128), max_disparity=32)[0]
        >>> list(sample)
        ['left', 'right', 'name', 'disparity', 'valid', 'visible']
        >>> bool((sample["disparity"] > 0).all() and (sample["disparity"] < 32).all())
        True
    """

    def __init__(
        self,
        size: tuple[int, int] = (256, 512),
        *,
        max_disparity: float = 192,
        length: int = 1_000_000,
        seed: int = 0,
        photographs: Sequence[str | Path] = (),
        ideal_cameras: bool = False,
    ) -> None:
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size must be a height and a width of at least 32; got {tuple(size)}")
        if not max_disparity >= 4:
            raise ValueError(f"max_disparity must be at least 4 pixels; got {max_disparity}")
        if length < 1 or seed < 0:
            raise ValueError(f"length must be positive and seed not negative; got {length}, {seed}")
        self.size, self.max_disparity = (int(size[0]), int(size[1])), float(max_disparity)
        self.length, self.seed, self.ideal_cameras = length, seed, ideal_cameras
        self.photographs = tuple(Path(path) for path in photographs)
        for path in self.photographs:
            if not path.is_file():
                raise FileNotFoundError(f"photographs must be files; got {path}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | Draw) -> StereoSample:
        number = as_draw(key, self.length).item
        random = np.random.default_rng(seed_of(self.seed, _SCENE, number))
        tiles = partial(photograph_tile, self.photographs, self.seed) if self.photographs else None
        scene = random_scene(
            random, self.size, self.max_disparity, seed=self.seed, photographs=tiles
        )
        # In some rigs a camera looks a little higher, and highlights are elsewhere for another eye.
        drop = pick(random, ((0.0, 0.9), (random.uniform(-1, 1), 0.1)))
        wander = random.normal(0, 4)
        if self.ideal_cameras:
            drop = wander = 0.0
        view = render(scene, self.size, drop=drop, wander=wander)
        cameras = random_cameras(random, view.left)
        left, right = (Camera(), Camera()) if self.ideal_cameras else cameras
        return StereoSample(
            left=left.photograph(view.left, random),
            right=right.photograph(view.right, random),
            name=f"generated-{self.seed}-{number}",
            disparity=view.disparity,
            valid=view.disparity > 0,
            visible=view.visible,
        )
