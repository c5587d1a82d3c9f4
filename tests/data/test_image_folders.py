"""Folders of pictures by class, and Fashion-MNIST: what is read, and what is told when it is not there."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from efficient_attention.data.draws import Draw
from efficient_attention.data.fashion_mnist import FashionMnist
from efficient_attention.data.image_folders import ImageFolders, imagenet, view
from efficient_attention.errors import InputError

FASHION = os.environ.get("EFFICIENT_ATTENTION_FASHION_MNIST", "/usr/share/datasets/fashion-mnist")


def picture(path, size=(40, 30), colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "dog" / "b.png", colour=(0, 255, 0))
    picture(tmp_path / "dog" / "more" / "a.JPEG", colour=(0, 255, 0))
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "cat" / ".hidden.png")
    picture(tmp_path / ".cache" / "1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "list.txt").write_text("no class")
    return tmp_path


def test_a_folder_is_a_class(folder):
    data = ImageFolders(folder, size=16)
    assert data.classes == ("cat", "dog")
    assert data.num_classes == 2
    assert [label for _, label in data] == [0, 1, 1]
    for image, label in data:
        assert image.shape == (3, 16, 16)
        assert image.dtype == torch.float32
        assert image.mean((1, 2)).argmax() == label
    assert repr(data).startswith("ImageFolders(3 pictures of 2 classes, size=16, training=False: ")


def test_evaluation_sees_the_middle_of_a_picture(tmp_path):
    # Of 48 x 32 pixels the shorter side is as long as it should be for 28: 32. The middle is 10 to 38, and 2 to 30.
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    image, _ = ImageFolders(tmp_path, size=28)[0]
    expected = torch.from_numpy(pixels[2:30, 10:38].copy()).permute(2, 0, 1) / 255
    assert torch.equal(image, expected)
    assert view(224, training=False)(torch.zeros(3, 9, 7, dtype=torch.uint8)).shape == (3, 224, 224)


def test_training_sees_another_part_with_every_draw(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    data = ImageFolders(tmp_path, size=28, training=True)
    seen = [data[Draw(0, seed)][0] for seed in range(4)]
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
    torch.manual_seed(4)
    assert all(torch.equal(data[Draw(0, seed)][0], image) for seed, image in enumerate(seen))


def test_more_augmentation_follows_from_the_draw_too(folder):
    data = ImageFolders(folder, size=16, augment=v2.RandomInvert(0.5))
    seen = [data[Draw(0, seed)][0] for seed in range(12)]
    assert len({image[0, 0, 0].item() for image in seen}) == 2
    assert all(torch.equal(data[Draw(0, seed)][0], image) for seed, image in enumerate(seen))


def test_missing_and_empty_folders_are_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder for every class; there is no '.*none'"):
        ImageFolders(tmp_path / "none")
    with pytest.raises(ValueError, match=r"a folder for every class; '.*more' has none"):
        ImageFolders(folder / "dog" / "more")
    (folder / "bat").mkdir()
    with pytest.raises(ValueError, match=r"has none of 1, the first of which is 'bat'"):
        ImageFolders(folder)
    with pytest.raises(ValueError, match="size must be positive; got 0"):
        ImageFolders(folder, size=0)


def test_a_damaged_picture_is_named(folder):
    (folder / "cat" / "1.png").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"cat/1.png \(7 bytes\) must be a picture"):
        ImageFolders(folder)[0]
    (folder / "cat" / "1.png").unlink()
    (folder / "cat" / "1.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"cat/1.png must be a picture: .*No such file"):
        ImageFolders(folder)[0]


def test_imagenet_is_a_thousand_classes(tmp_path):
    for i in range(999):
        (tmp_path / "val" / f"n{i:08}").mkdir(parents=True)
        (tmp_path / "val" / f"n{i:08}" / "1.JPEG").touch()
    with pytest.raises(ValueError, match=r"the 1000 classes of ImageNet, .*; got 999 folders"):
        imagenet(tmp_path)
    (tmp_path / "val" / "n00000999").mkdir()
    (tmp_path / "val" / "n00000999" / "1.JPEG").touch()
    assert imagenet(tmp_path).num_classes == 1000
    (tmp_path / "val" / "n00000999").rename(tmp_path / "val" / "tench")
    with pytest.raises(ValueError, match="got 1000 folders, 'tench' among them"):
        imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no '.*train'"):
        imagenet(tmp_path, split="train")
    with pytest.raises(ValueError, match="split must be 'train' or 'val'; got 'test'"):
        imagenet(tmp_path, split="test")


def idx(array):
    head = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def clothes(folder, split="train", count=5, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (count, 28, 28))
    for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count) * 2)):
        data = idx(array)
        path = folder / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_packed_or_not(tmp_path, packed, inside):
    pixels = clothes(tmp_path / inside, packed=packed)
    clothes(tmp_path / inside, "t10k", 3, packed=packed)
    data = FashionMnist(tmp_path)
    assert len(data) == 5
    assert [label for _, label in data] == [0, 2, 4, 6, 8]
    image, _ = data[3]
    assert image.shape == (3, 28, 28)
    assert torch.equal(image[1], pixels[3].float() / 255)
    assert len(FashionMnist(tmp_path, split="test")) == 3
    assert data.classes[9] == "Ankle boot"


def test_clothes_are_augmented_by_their_draw(tmp_path):
    clothes(tmp_path)
    data = FashionMnist(tmp_path, augment=v2.RandomCrop(28, padding=4))
    seen = [data[Draw(1, seed)][0] for seed in range(4)]
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(data[Draw(1, seed)][0], image) for seed, image in enumerate(seen))


def test_fashion_mnist_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download=True fetches it, and Debian's package"):
        FashionMnist(tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        FashionMnist(tmp_path, split="val")


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:6], lambda d: b"x" + d[1:]])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_damaged_clothes_are_told(tmp_path, name, damage):
    clothes(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}' must hold bytes in"):
        FashionMnist(tmp_path)


def test_a_truncated_archive_is_told(tmp_path):
    clothes(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    for damaged in (data[:100], data[:10] + b"\xff" * 90):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a whole file of gzip"):
            FashionMnist(tmp_path)


def test_labels_must_be_as_many_as_pictures(tmp_path):
    clothes(tmp_path, count=5)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([1, 10])))
    with pytest.raises(ValueError, match="has 5 pictures and 2 labels of up to 10"):
        FashionMnist(tmp_path)
    clothes(tmp_path, count=6)
    with pytest.raises(ValueError, match="has 6 pictures and 6 labels of up to 10"):
        FashionMnist(tmp_path)
    clothes(tmp_path, count=0)
    with pytest.raises(ValueError, match="has 0 pictures and 0 labels of up to -1"):
        FashionMnist(tmp_path)


@pytest.mark.skipif(not Path(FASHION).is_dir(), reason="Fashion-MNIST is not installed")
def test_the_published_clothes_are_ten_of_a_kind():
    data = FashionMnist(FASHION, split="test")
    assert torch.bincount(data._labels.long()).tolist() == [1000] * 10
