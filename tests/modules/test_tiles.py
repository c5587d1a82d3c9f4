"""The whole from its tiles."""

import copy

import pytest
import torch

import efficient_attention as ea
from efficient_attention.testing import assert_as_precise_as_plain

EXACT = {"rtol": 0, "atol": 1e-12}


class Tiles:
    """Tiles that are read anew on every pass, and count how many are alive."""

    def __init__(self, image):
        self.image, self.passes = image, 0

    def __iter__(self):
        self.passes += 1
        for rows in self.image.split([3, 5, 2], 2):
            yield from rows.split([4, 1, 6], 3)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["auto", "linear", "folded"])
def test_tiles_equal_the_whole_image(normalization, order):
    module = ea.EfficientAttention2d(
        6,
        4,
        8,
        num_heads=2,
        init="official",
        normalization=normalization,
        order=order,
        dtype=torch.float64,
    )
    image = torch.randn(1, 6, 10, 11, dtype=torch.float64)
    tiles = Tiles(image)
    outputs = list(ea.attend_tiles(module, tiles))
    assert tiles.passes == 2
    rows = [torch.cat(outputs[i : i + 3], 3) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(rows, 2), module(image), **EXACT)


def test_frames_of_a_stream_equal_the_whole_volume():
    module = ea.EfficientAttention3d(6, 4, 8, init="official", dtype=torch.float64)
    volume = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    outputs = ea.attend_tiles(module, volume.split(1, 2))
    torch.testing.assert_close(torch.cat(list(outputs), 2), module(volume), **EXACT)


def test_token_tiles_equal_all_tokens():
    module = ea.EfficientAttention(6, 2, dtype=torch.float64)
    tokens = torch.randn(2, 20, 6, dtype=torch.float64)
    outputs = ea.attend_tiles(module, tokens.split(7, 1))
    torch.testing.assert_close(torch.cat(list(outputs), 1), module(tokens), **EXACT)


def test_many_tiles_are_as_precise_as_the_whole():
    module = ea.EfficientAttention(8)
    tokens = torch.randn(1, 20_000, 8)
    exact = copy.deepcopy(module).double()(tokens.double())
    tiled = torch.cat(list(ea.attend_tiles(module, tokens.split(20, 1))), 1)
    assert_as_precise_as_plain(tiled, module(tokens), exact)


def test_overlap_is_hidden_by_masks():
    module = ea.EfficientAttention2d(6, 4, 8, init="official", dtype=torch.float64)
    image = torch.randn(1, 6, 4, 10, dtype=torch.float64)
    tiles = [image[..., :6], image[..., 4:]]
    masks = [None, (torch.arange(6) >= 2).expand(1, 4, 6)]
    left, right = ea.attend_tiles(module, tiles, key_masks=masks)
    expected = module(image)
    torch.testing.assert_close(left, expected[..., :6], **EXACT)
    torch.testing.assert_close(right, expected[..., 4:], **EXACT)


def test_a_generator_is_refused_at_once():
    module = ea.EfficientAttention2d(6)
    with pytest.raises(TypeError, match=r"tiles must be iterable twice, .* got a generator"):
        ea.attend_tiles(module, (x for x in [torch.zeros(1, 6, 2, 2)]))


def test_errors_name_the_argument():
    module, tile = ea.EfficientAttention2d(6), torch.zeros(1, 6, 2, 2)
    with pytest.raises(ValueError, match="tiles must hold at least one tile; got none"):
        next(ea.attend_tiles(module, []))
    with pytest.raises(ValueError, match="key_masks must be as many as tiles"):
        next(ea.attend_tiles(module, [tile, tile], key_masks=[None]))
    with pytest.raises(ValueError, match="key_masks must be as many as tiles; got more"):
        next(ea.attend_tiles(module, [tile], key_masks=[None, None]))
    with pytest.raises(TypeError, match=r"module must be an EfficientAttention.* got NonLocal2d"):
        ea.attend_tiles(ea.NonLocal2d(6), [tile])
