"""Pictures and what they show, from a folder for every class: ImageNet, and what people have of their own.

Paper: Sec. 4 trains and evaluates on ImageNet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .draws import Draw, as_draw, reproducibly
from .images import read_pixels
from .packing import Packed

__all__ = ["ImageFolders", "imagenet", "view"]

_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What ImageNet calls its classes: numbers of WordNet.
_SYNSET = re.compile(r"n\d{8}")


class ImageFolders(Dataset[tuple[Tensor, int]]):
    """Pictures of one size with the number of their class.

    ::

        folder/
          cat/ 1.jpg 2.png more/3.jpg ...
          dog/ 1.jpg ...

    A sample is ``(image, label)``: float32 ``[3, size, size]`` in [0, 1], and an integer.

    Args:
        folder: with a folder for every class. Files that are no pictures by their name are passed over, and so is what
            is hidden.
        size: of the pictures, in pixels.
        training: a part of each picture, drawn anew with every
            :class:`~efficient_attention.data.draws.Draw` and flipped or not; otherwise the middle, see :func:`view`.
        augment: more to do with a picture after that, uint8 ``[3, size, size]``, such as
            ``torchvision.transforms.v2.TrivialAugmentWide``; its random numbers, torch's, follow from the draw too.

    Attributes:
        classes: names by label, sorted.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no folders, or one without a picture. A picture that cannot be read is named when it is met.

    Example:
        >>> from PIL import Image
        >>> for name in ("cat", "dog"):
        ...     Path(folder, name).mkdir()
        ...     Image.new("RGB", (40, 30), "white").save(Path(folder, name, "1.png"))
        >>> data = ImageFolders(folder, size=16)
        >>> data.classes, len(data), data[1][0].shape, data[1][1]
        (('cat', 'dog'), 2, torch.Size([3, 16, 16]), 1)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 224,
        training: bool = False,
        augment: Callable[[Any], Any] | None = None,
    ) -> None:
        self.folder, self.size, self.training = Path(folder), size, training
        if size < 1:
            raise ValueError(f"size must be positive; got {size}")
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"folder must hold a folder for every class; there is no '{self.folder}'"
            )
        self._view, self._augment = view(size, training=training), augment
        self.classes = tuple(_visible(entry.name for entry in os.scandir(folder) if entry.is_dir()))
        if not self.classes:
            raise ValueError(f"folder must hold a folder for every class; '{self.folder}' has none")
        files = [_pictures(self.folder / name) for name in self.classes]
        empty = [name for name, found in zip(self.classes, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"folder must have pictures ({', '.join(_ENDINGS)}) of every class; '{self.folder}' has none "
                f"of {len(empty)}, the first of which is {empty[0]!r}"
            )
        self._files = Packed((path, label) for label, found in enumerate(files) for path in found)

    @property
    def num_classes(self) -> int:
        """Outputs of a network for this data."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        draw = as_draw(key, len(self))
        path, label = self._files[draw.item]
        try:
            pixels = read_pixels(path)
        except OSError as error:
            raise InputError(f"{path} must be a picture: {error}") from error
        with reproducibly(draw.seed, draw.item):
            pixels = self._view(pixels)
            if self._augment is not None:
                pixels = self._augment(pixels)
        return pixels.float() / 255, label

    def __repr__(self) -> str:
        return (
            f"ImageFolders({len(self)} pictures of {len(self.classes)} classes, size={self.size}, "
            f"training={self.training}: '{self.folder}')"
        )


def imagenet(
    folder: str | Path,
    *,
    split: Literal["train", "val"] = "val",
    size: int = 224,
    training: bool = False,
    augment: Callable[[Any], Any] | None = None,
) -> ImageFolders:
    """ImageNet's thousand classes (ILSVRC 2012).

    ::

        folder/
          train/ n01440764/ n01440764_10026.JPEG ...
          val/   n01440764/ ILSVRC2012_val_00000293.JPEG ...

    It is not to be downloaded without an account at image-net.org. The archive of the validation set has no folders;
    its pictures have to be put into those of their classes, of which the development kit has the list.

    Args:
        folder: with the two.
        split: ``"train"`` or ``"val"``.
        size: see :class:`ImageFolders`.
        training: see there.
        augment: see there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: another split, or other folders than those of the classes.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
    data = ImageFolders(Path(folder) / split, size=size, training=training, augment=augment)
    others = [name for name in data.classes if not _SYNSET.fullmatch(name)]
    if others or len(data.classes) != 1000:
        example = f", {others[0]!r} among them" if others else ""
        raise ValueError(
            f"folder must have the 1000 classes of ImageNet, n01440764 to n15075141, in '{data.folder}'; "
            f"got {len(data.classes)} folders{example}"
        )
    return data


def view(size: int, *, training: bool) -> Callable[[Tensor], Tensor]:
    """The usual way from a picture of any size to a square.

    Args:
        size: of the square.
        training: a part of 8 to 100 % of the picture's area, of a shape from 3:4 to 4:3, scaled and in half of all
            cases flipped; otherwise the middle of the picture, whose shorter side is scaled to 8/7 of ``size``
            (256 for 224).

    Returns:
        A transform of ``[3, H, W]`` uint8, with random numbers of torch.

    Example:
        >>> view(224, training=False)(torch.zeros(3, 300, 500, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """
    from torchvision.transforms import v2

    if training:
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return v2.Compose([v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size)])


def _pictures(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = _visible(folders)
        pictures = (name for name in _visible(names) if name.lower().endswith(_ENDINGS))
        found += [os.path.join(parent, name) for name in pictures]  # noqa: PTH118 - a million paths
    return found


def _visible(names: Any) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))
