"""Pictures of every kind are read as 8-bit RGB, upright, or refused in one line."""

import numpy as np
import pytest
import torch

from efficient_attention.errors import InputError
from efficient_attention.prediction.pictures import picture_size, read_picture

Image = pytest.importorskip("PIL.Image")
# Darker to the right, and of another red in every row: [2, 3, 3].
COLOURS = np.array(
    [[[250, 10, 0], [150, 20, 0], [50, 30, 0]], [[240, 10, 9], [140, 20, 9], [40, 30, 9]]], "uint8"
)


@pytest.fixture
def save(tmp_path):
    def save(image, name="picture.png", **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def rgb(path, **options):
    return read_picture(path, **options).movedim(0, 2).numpy()


def test_colours_are_kept(save):
    picture = read_picture(save(Image.fromarray(COLOURS)))
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, 2, 3))
    assert (picture.movedim(0, 2).numpy() == COLOURS).all()


def test_gray_has_three_equal_channels(save):
    gray = COLOURS[..., 0]
    assert (rgb(save(Image.fromarray(gray))) == gray[..., None]).all()


def test_sixteen_bits_of_gray_become_eight_rounded(save):
    # 257 * 128 = 32896; half a step is 128.5.
    numbers = np.array([[0, 65535, 32896, 32896 + 128, 32896 + 129]], "uint16")
    assert rgb(save(Image.fromarray(numbers)))[0, :, 0].tolist() == [0, 255, 128, 128, 129]


def test_palette_is_resolved_and_transparency_lies_on_white(save):
    palette = Image.fromarray(COLOURS).quantize(6)
    assert np.abs(rgb(save(palette)).astype(int) - COLOURS).max() <= 4
    clear = np.dstack([COLOURS, np.array([[255, 0, 51]] * 2, "uint8")])
    read = rgb(save(Image.fromarray(clear), "clear.png"))
    assert read[0, :2].tolist() == [[250, 10, 0], [255, 255, 255]]
    # A fifth of the colour, four fifths of white.
    assert np.abs(read[0, 2] - (0.2 * COLOURS[0, 2] + 0.8 * 255)).max() <= 1


# Of what the sides and corners of COLOURS become.
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed(save, orientation):
    turned = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.swapaxes(0, 1),
        6: COLOURS[::-1].swapaxes(0, 1),
        7: COLOURS[::-1, ::-1].swapaxes(0, 1),
        8: COLOURS[:, ::-1].swapaxes(0, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(COLOURS), exif=exif)
    assert (rgb(path) == turned).all()
    assert picture_size(path) == turned.shape[:2]


def test_view_with_an_orientation_is_refused(save):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.fromarray(COLOURS), exif=exif)
    for read in (read_picture, picture_size):
        with pytest.raises(InputError, match=r"without an orientation tag .* with 6"):
            read(path, upright=False)
    plain = save(Image.fromarray(COLOURS), "plain.png")
    assert (rgb(plain, upright=False) == COLOURS).all()


def test_what_is_no_picture_is_refused(save, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    sound = save(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")))
    (tmp_path / "cut.png").write_bytes(sound.read_bytes()[:-4000])
    save(Image.fromarray(np.ones((2, 2), "float32")), "float.tif")
    save(Image.fromarray(np.array([[-1, 5]], "int32")), "negative.tif")
    for name, expected in {
        "text.png": r"format that Pillow reads; got .* \(13 bytes\)",
        "cut.png": "must be sound; got .*truncated",
        "float.tif": "mode F is not supported",
        "negative.tif": "from 0 to 65535; got -1 to 5",
        "absent.png": "no such file",
        ".": "a folder",
    }.items():
        with pytest.raises(InputError, match=expected) as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
    # The beginning of a file that is cut short is sound.
    assert picture_size(tmp_path / "cut.png") == (64, 64)
