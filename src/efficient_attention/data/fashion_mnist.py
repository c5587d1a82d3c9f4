"""Fashion-MNIST: small grey pictures of clothes, real data that fits anywhere."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draw, as_draw, reproducibly

__all__ = ["FashionMnist"]

_PREFIX = {"train": "train", "test": "t10k"}
# Of the first word of a file of bytes the last byte is the number of dimensions.
_BYTES = 0x08


class FashionMnist(Dataset[tuple[Tensor, int]]):
    """70,000 pictures of ten kinds of clothes, as Zalando published them: 60,000 to train and 10,000 to test.

    ::

        folder/                     or folder/FashionMNIST/raw/, as torchvision has it
          train-images-idx3-ubyte   each of the four packed as .gz or not
          train-labels-idx1-ubyte
          t10k-images-idx3-ubyte
          t10k-labels-idx1-ubyte

    Debian's package ``dataset-fashion-mnist`` has them in ``/usr/share/datasets/fashion-mnist``.

    A sample is ``(image, label)``: float32 ``[3, 28, 28]`` in [0, 1] of equal channels, and an integer.

    Args:
        folder: where they are.
        split: ``"train"`` or ``"test"``.
        augment: a transform of uint8 ``[3, 28, 28]`` such as those of ``torchvision.transforms.v2``, whose random
            numbers, torch's, follow from the :class:`~efficient_attention.data.draws.Draw`.
        download: fetch them from Zalando into ``folder`` with torchvision, if they are not there.

    Attributes:
        classes: names by label.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: another split, or damaged files.
    """

    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    num_classes = len(classes)

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Literal["train", "test"] = "train",
        augment: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        if split not in _PREFIX:
            raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
        self.folder, self.split, self._augment = Path(folder), split, augment
        if download:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(folder), download=True)
        self._pixels = _read_bytes(self._find("images-idx3-ubyte"), (28, 28))
        self._labels = _read_bytes(self._find("labels-idx1-ubyte"), ())
        highest = max(self._labels.tolist(), default=-1)
        if len(self._pixels) != len(self._labels) or not 0 <= highest < self.num_classes:
            raise ValueError(
                f"folder must have pictures, and a label from 0 to 9 for every one; '{self.folder}' has "
                f"{len(self._pixels)} pictures and {len(self._labels)} labels of up to {highest}"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        draw = as_draw(key, len(self))
        pixels = self._pixels[draw.item].repeat(3, 1, 1)
        if self._augment is not None:
            with reproducibly(draw.seed, draw.item):
                pixels = self._augment(pixels)
        return pixels.float() / 255, int(self._labels[draw.item])

    def __repr__(self) -> str:
        return f"FashionMnist({len(self)} pictures, split={self.split!r}: '{self.folder}')"

    def _find(self, name: str) -> Path:
        name = f"{_PREFIX[self.split]}-{name}"
        for folder in (self.folder, self.folder / "FashionMNIST" / "raw"):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        raise FileNotFoundError(
            f"folder must have {name}, packed as .gz or not; '{self.folder}' has none. download=True fetches it, and "
            "Debian's package dataset-fashion-mnist has it in /usr/share/datasets/fashion-mnist"
        )


def _read_bytes(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file of the IDX format: a word that says type and dimensions, a word for every size, and the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"'{path}' must be a whole file of gzip: {error}") from error
    dimensions = len(shape) + 1
    head = np.frombuffer(data[: 4 * (dimensions + 1)].ljust(4 * (dimensions + 1)), dtype=">u4")
    count = int(head[1])
    sizes = tuple(int(size) for size in head[2:])
    body = np.frombuffer(data[head.nbytes :], dtype=np.uint8)
    if (
        head[0] != (_BYTES << 8 | dimensions)
        or sizes != shape
        or body.size != count * np.prod(shape)
    ):
        raise ValueError(
            f"'{path}' must hold bytes in {dimensions} dimensions (IDX), sized {shape} each; it is damaged or another"
        )
    return torch.from_numpy(body.copy()).view(count, *shape)
