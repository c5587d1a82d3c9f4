"""Disparities and pictures on disk, and back."""

import struct
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from PIL import Image

from efficient_attention.data.disparity_files import (
    check_disparity,
    read_disparity,
    read_disparity_png,
    read_pfm,
    write_disparity_png,
    write_pfm,
)
from efficient_attention.data.images import check_pixels, read_image


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 4), (1, 1), (0, 4)])
def test_float_maps_make_the_round_trip(tmp_path, byte_order, shape):
    image = torch.randn(shape)
    write_pfm(tmp_path / "a.pfm", image, byte_order=byte_order)
    assert torch.equal(read_pfm(tmp_path / "a.pfm"), image)


def test_float_maps_have_the_bytes_of_the_format(tmp_path):
    # Rows from the bottom up, the channels of a pixel together.
    gray = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    write_pfm(tmp_path / "gray.pfm", gray)
    assert (tmp_path / "gray.pfm").read_bytes() == b"Pf\n2 2\n-1.0\n" + struct.pack(
        "<4f", 3, 4, 1, 2
    )
    colour = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    write_pfm(tmp_path / "colour.pfm", colour, byte_order="big")
    assert (tmp_path / "colour.pfm").read_bytes() == b"PF\n1 1\n1.0\n" + struct.pack(">3f", 1, 2, 3)


@pytest.mark.parametrize(
    "header", [b"Pf\n2 1\n-0.003922\n", b"Pf 2 1 -1\n", b"Pf\r\n2 1\r\n-1e0\r\n"]
)
def test_headers_of_other_writers_are_read(tmp_path, header):
    (tmp_path / "a.pfm").write_bytes(header + struct.pack("<2f", 10, 32))
    assert read_pfm(tmp_path / "a.pfm").tolist() == [[10, 32]]


def test_float_maps_keep_infinity_and_are_contiguous(tmp_path):
    image = torch.tensor([[torch.inf, -torch.inf], [1e-40, 0]]).T
    write_pfm(tmp_path / "a.pfm", image)
    read = read_pfm(tmp_path / "a.pfm")
    assert torch.equal(read, image)
    assert read.is_contiguous()


@pytest.mark.parametrize("change", [-1, -8, 1])
def test_a_truncated_float_map_is_refused(tmp_path, change):
    path = tmp_path / "a.pfm"
    write_pfm(path, torch.ones(3, 5))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(
        ValueError, match=f"a.pfm must hold 60 bytes after its header.*{60 + change}"
    ):
        read_pfm(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Pf\n2 x\n1\n",
        b"Pf\n1 1\nE\n1234",
        b"Pf\n1 1\n-\n1234",
        b"\x89PNG\r\n",
        b"P5\n2 2\n255\n1234",
    ],
)
def test_what_is_no_float_map_is_refused(tmp_path, data):
    (tmp_path / "a.pfm").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.pfm must begin as a portable float map"):
        read_pfm(tmp_path / "a.pfm")


def test_a_disparity_is_stored_as_kitti_does(tmp_path):
    path = tmp_path / "a.png"
    # To the nearest step: 255.99 is 65533.44 steps, and 2.499 is 639.744.
    disparity = torch.tensor([[1.0, 2.499, 255.99], [0.0, -1.0, torch.nan]])
    write_disparity_png(path, disparity)
    with Image.open(path) as file:
        assert np.array(file).tolist() == [[256, 640, 65533], [0, 0, 0]]
        assert np.array(file).dtype == np.uint16
    assert read_disparity_png(path).tolist() == [[1, 2.5, 65533 / 256], [0, 0, 0]]


def test_a_known_disparity_is_never_stored_as_unknown(tmp_path):
    valid = torch.tensor([[True, True, False]])
    write_disparity_png(tmp_path / "a.png", torch.tensor([[0.0, 0.001, 5.0]]), valid)
    assert read_disparity_png(tmp_path / "a.png").tolist() == [[1 / 256, 1 / 256, 0]]


@pytest.mark.parametrize("known", [256.0, -1.0, torch.inf, torch.nan])
def test_a_disparity_that_does_not_fit_is_refused(tmp_path, known):
    disparity = torch.tensor([[known]])
    with pytest.raises(ValueError, match=r"disparity must be in \[0, 256.00\] px"):
        write_disparity_png(tmp_path / "a.png", disparity, torch.ones(1, 1, dtype=torch.bool))
    assert list(tmp_path.iterdir()) == []


def test_eight_bits_need_a_scale(tmp_path):
    Image.fromarray(np.array([[40, 0]], np.uint8)).save(tmp_path / "a.png")
    assert read_disparity_png(tmp_path / "a.png", scale=4).tolist() == [[10, 0]]
    with pytest.raises(ValueError, match="scale must be given for"):
        read_disparity(tmp_path / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(
        ValueError, match=r"b.png must have one channel of 8 or 16 bits; got mode RGB"
    ):
        read_disparity(tmp_path / "b.png")


def test_the_format_follows_from_the_name(tmp_path):
    disparity = torch.tensor([[1.5, 2.5]])
    write_pfm(tmp_path / "a.pfm", disparity)
    write_disparity_png(tmp_path / "a.png", disparity)
    np.save(tmp_path / "a.npy", disparity.double().numpy())
    for name in ("a.pfm", "a.png", "a.npy"):
        assert torch.equal(read_disparity(tmp_path / name), disparity)
    assert read_disparity(tmp_path / "a.npy", scale=2).tolist() == [[0.75, 1.25]]
    with pytest.raises(ValueError, match=r"must be .pfm, .png or .npy files; got .*a.tif"):
        read_disparity(tmp_path / "a.tif")
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"b.npy must hold a map \[H, W\]; got shape \(3,\)"):
        read_disparity(tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), r"a.npy \(0 bytes\) must be a whole array of NumPy: EOF"),
        (lambda p: p.write_bytes(b"garbage" * 9), r"a.npy \(63 bytes\) must be a whole array"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1]),
            r"a.npy \(151 bytes\) must be a whole array",
        ),
        (lambda p: np.save(p, np.array([[{}]])), "must be a whole array of NumPy: .* objects"),
        (lambda p: np.save(p, np.ones((2, 3), complex)), "must hold real numbers; got complex128"),
        (lambda p: np.save(p, np.ones((1, 2, 3))), r"must hold a map \[H, W\]; got shape"),
    ],
)
def test_arrays_that_are_no_disparities_are_refused(tmp_path, make, message):
    path = tmp_path / "a.npy"
    np.save(path, np.ones((2, 3), np.float32))
    make(path)
    for look in (read_disparity, check_disparity):
        with pytest.raises(ValueError, match=message):
            look(path)


def test_a_file_is_checked_by_its_head_as_by_reading_it(tmp_path):
    disparity = torch.full((2, 3), 1.5)
    write_pfm(tmp_path / "a.pfm", disparity)
    write_disparity_png(tmp_path / "a.png", disparity)
    np.save(tmp_path / "a.npy", disparity.numpy())
    for name in ("a.pfm", "a.png", "a.npy"):
        assert check_disparity(tmp_path / name) == read_disparity(tmp_path / name).shape
    write_pfm(tmp_path / "colour.pfm", torch.ones(3, 2, 3))
    (tmp_path / "short.pfm").write_bytes((tmp_path / "a.pfm").read_bytes()[:-1])
    Image.new("L", (3, 2)).save(tmp_path / "shallow.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "a.txt").write_text("1.5")
    for name in ("colour.pfm", "short.pfm", "shallow.png", "colour.png", "short.png", "a.txt"):
        with pytest.raises(ValueError, match=name) as told:
            read_disparity(tmp_path / name)
        with pytest.raises(ValueError, match=name) as told_by_head:
            check_disparity(tmp_path / name)
        assert str(told.value) == str(told_by_head.value)
    with pytest.raises(FileNotFoundError):
        check_disparity(tmp_path / "b.pfm")


@pytest.mark.parametrize("scale", [0, -256, float("nan")])
def test_a_scale_is_positive(tmp_path, scale):
    write_disparity_png(tmp_path / "a.png", torch.ones(1, 1))
    write_pfm(tmp_path / "a.pfm", torch.ones(1, 1))
    for name in ("a.png", "a.pfm"):
        with pytest.raises(ValueError, match="scale must be positive; got"):
            read_disparity(tmp_path / name, scale=scale)


@pytest.mark.parametrize("write", [write_pfm, write_disparity_png])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, write, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, torch.ones(2, 2))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_read_as_rgb_in_unit_range(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    image = read_image(tmp_path / "rgb.png")
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert image.is_contiguous()
    for mode in ("L", "LA", "P", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png").shape == (3, 2, 4)
    assert torch.equal(read_image(tmp_path / "RGBA.png"), image)
    gray = read_image(tmp_path / "LA.png")
    assert gray.std(0).max() == 0
    assert torch.equal(gray, read_image(tmp_path / "L.png"))


def test_pictures_without_eight_bits_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png must be gray or RGB with 8 bits.*I;16"):
        read_image(tmp_path / "deep.png")


def test_damaged_pictures_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    data = (tmp_path / "a.png").read_bytes()
    for damaged in (data[: len(data) // 2], b"no picture"):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a.png \({len(damaged)} bytes\) must be a picture"):
            read_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("look", [read_image, check_pixels])
def test_a_picture_of_absurd_size_is_named(tmp_path, look):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", compress(b"")), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match=r"a.png \(65 bytes\) must be a picture: Image size"):
        look(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_head_tells_the_size_of_what_can_be_read(tmp_path, mode):
    Image.new(mode, (5, 3)).save(tmp_path / "a.png")
    assert check_pixels(tmp_path / "a.png") == read_image(tmp_path / "a.png").shape[1:] == (3, 5)
