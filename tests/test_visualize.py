"""Attention maps are rows and columns of a matrix that is never built; drawings are whole files."""

import doctest
import inspect
import sys
from pathlib import Path

import pytest
import torch

import efficient_attention
from efficient_attention import (
    EfficientAttention,
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    MultiheadEfficientAttention,
    NonLocal2d,
    visualize,
)
from efficient_attention.memory import peak_bytes
from efficient_attention.visualize import (
    Facts,
    Panel,
    attention_map,
    draw_maps,
    draw_panels,
    overlay,
    template_maps,
)

SPATIAL = {
    EfficientAttention1d: (7,),
    EfficientAttention2d: (3, 5),
    EfficientAttention3d: (2, 3, 4),
}


def make(kind, normalization="softmax"):
    """A module with two heads in float64, an input of two samples, and its positions."""
    if kind is EfficientAttention:
        module = kind(6, 2, key_channels=8, normalization=normalization)
        x, spatial = torch.randn(2, 11, 6), (11,)
    else:
        module = kind(
            6, 8, 4, num_heads=2, residual=False, init="official", normalization=normalization
        )
        spatial = SPATIAL[kind]
        x = torch.randn(2, 6, *spatial)
    return module.double(), x.double(), spatial


def by_hand(module, x, keys_of=None):
    """``rho_q(Q) [B, h, N, dk / h]`` and ``rho_k(K) [B, h, M, dk / h]`` as the paper has them."""
    tokens = isinstance(module, EfficientAttention)

    def heads(layer, source):
        y = layer(source) if tokens else layer(source).flatten(2).mT
        return y.unflatten(-1, (2, -1)).transpose(1, 2)

    query, key = heads(module.queries, x), heads(module.keys, x if keys_of is None else keys_of)
    if module.normalization == "softmax":
        return query.softmax(-1), key.softmax(-2)
    return query, key / key.shape[-2]


ALL = [*SPATIAL, EfficientAttention]


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("kind", ALL)
def test_template_maps_are_the_normalized_keys(kind, normalization):
    module, x, spatial = make(kind, normalization)
    _, keys = by_hand(module, x)
    expected = keys.mT.reshape(2, 8, *spatial)
    torch.testing.assert_close(template_maps(module, x), expected)


@pytest.mark.parametrize("kind", ALL)
def test_template_maps_are_distributions_over_positions(kind):
    module, x, _ = make(kind)
    maps = template_maps(module, 30 * x).flatten(2)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(2), torch.ones_like(maps[..., 0]))


def test_template_maps_leave_out_what_is_masked_whatever_it_holds():
    module, x, _ = make(EfficientAttention2d)
    mask = torch.rand(2, 3, 5) > 0.4
    expected = template_maps(module, x, mask)
    x = x.masked_fill(~mask.unsqueeze(1), float("nan"))
    maps = template_maps(module, x, key_mask=mask)
    assert (maps.masked_select(~mask.unsqueeze(1)) == 0).all()
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 8, dtype=torch.float64))


def test_template_maps_are_zero_where_nothing_may_be_attended_to():
    module, x, _ = make(EfficientAttention2d)
    assert (template_maps(module, x, torch.zeros(2, 3, 5, dtype=torch.bool)) == 0).all()


def test_template_maps_of_half_precision_are_summed_in_single():
    module = EfficientAttention1d(4, 2).bfloat16()
    maps = template_maps(module, torch.randn(1, 4, 1000).bfloat16())
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(2), torch.ones(1, 2))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("kind", ALL)
def test_attention_map_is_a_row_of_the_explicit_matrix(kind, normalization):
    module, x, spatial = make(kind, normalization)
    query, key = by_hand(module, x)
    matrix = query @ key.mT  # [B, h, N, N]
    for n, position in enumerate(torch.cartesian_prod(*map(torch.arange, spatial)).tolist()):
        expected = matrix[:, :, n].unflatten(2, spatial)
        torch.testing.assert_close(attention_map(module, x, position), expected)


def test_attention_map_applied_to_values_is_the_modules_output():
    module, x, _ = make(EfficientAttention2d)
    row = attention_map(module, x, (2, 1)).flatten(2)  # [B, h, N]
    values = module.values(x).flatten(2).unflatten(1, (2, -1))  # [B, h, dv / h, N]
    attended = torch.einsum("bhn,bhvn->bhv", row, values).flatten(1)
    output = module.reprojection(attended[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(output, module(x)[:, :, 2, 1])


def test_attention_map_of_a_mask_is_a_distribution_over_the_rest():
    module, x, _ = make(EfficientAttention2d)
    mask = torch.rand(2, 3, 5) > 0.4
    row = attention_map(module, x, (0, 0), mask)
    assert (row.masked_select(~mask.unsqueeze(1)) == 0).all()
    torch.testing.assert_close(row.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64))


def test_attention_map_reaches_into_another_context():
    module = EfficientAttention(6, 2, context_dim=3).double()
    x, context = torch.randn(2, 5, 6).double(), torch.randn(2, 9, 3).double()
    query, key = by_hand(module, x, context)
    row = attention_map(module, x, 4, context=context)
    torch.testing.assert_close(row, (query @ key.mT)[:, :, 4])


def test_attention_map_takes_memory_linear_in_the_positions():
    module = EfficientAttention2d(8, 4).requires_grad_(False)

    def peak(side):
        x = torch.randn(1, 8, 64, side)
        return peak_bytes(lambda: attention_map(module, x, (5, 5)))

    few, many = peak(64), peak(512)
    assert many < 1.1 * 8 * few
    assert many < 4 * (64 * 512) ** 2 / 100  # of the N x N map


@pytest.mark.parametrize(
    ("position", "got"),
    [((3, 0), r"\(3, 0\)"), ((0, -1), r"\(0, -1\)"), ((1,), r"\(1,\)"), (1, "1")],
)
def test_attention_map_refuses_a_position_outside(position, got):
    module, x, _ = make(EfficientAttention2d)
    with pytest.raises(ValueError, match=rf"position must be 2 indices inside \(3, 5\); got {got}"):
        attention_map(module, x, position)


@pytest.mark.parametrize("module", [NonLocal2d(4), MultiheadEfficientAttention(4, 2)])
def test_maps_refuse_other_modules(module):
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(TypeError, match=f"module must be .*; got {type(module).__name__}"):
        template_maps(module, x)
    with pytest.raises(TypeError, match=f"module must be .*; got {type(module).__name__}"):
        attention_map(module, x, (0, 0))


def test_maps_name_the_argument_of_the_wrong_shape():
    module, x, _ = make(EfficientAttention2d)
    with pytest.raises(ValueError, match="x must have shape"):
        template_maps(module, x[:, :5])
    with pytest.raises(ValueError, match="key_mask must have shape"):
        template_maps(module, x, torch.ones(2, 3, dtype=torch.bool))


def read(path):
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(path) as image:
        data = bytearray(image.convert("RGB").tobytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3)


def test_overlay_dims_the_image_where_nothing_is_attended_to_and_glows_elsewhere():
    heat = torch.zeros(10, 10)
    heat[0] = 1.0
    picture = overlay(heat, torch.full((3, 10, 10), 0.5))
    torch.testing.assert_close(picture[5, 5], torch.full((3,), 0.35 * 0.5), atol=0.01, rtol=0)
    assert picture[0].min(dim=0).values[0] > 0.9  # the hottest colour of the map is a bright yellow


def test_overlay_resizes_the_map_to_the_image():
    heat = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    picture = overlay(heat, torch.zeros(3, 40, 60)).sum(-1)
    assert picture.shape == (40, 60)
    assert picture[35, 55] > 1 > picture[5, 5]


def test_overlay_of_an_empty_map_is_the_dimmed_image():
    picture = overlay(torch.zeros(4, 4), torch.ones(3, 4, 4))
    torch.testing.assert_close(picture, torch.full((4, 4, 3), 0.35), atol=0.01, rtol=0)


def test_drawing_shows_every_panel_whole(tmp_path):
    red, blue = torch.zeros(2, 10, 80, 3)
    red[..., 0], blue[..., 2] = 1, 1
    draw_panels(tmp_path / "a.png", [[Panel(red, "red"), Panel(blue)], [Panel(blue), Panel(red)]])
    picture = read(tmp_path / "a.png")
    assert picture.shape[1] == 1600
    is_red = (picture == torch.tensor([255, 0, 0])).all(-1)
    is_blue = (picture == torch.tensor([0, 0, 255])).all(-1)
    area = 2 * 782 * 782 / 8  # two panels in a row of 1600 pixels with three gaps of 12
    assert is_red.sum() == pytest.approx(area, rel=0.01)
    assert is_blue.sum() == pytest.approx(area, rel=0.01)
    half = picture.shape[0] // 2
    assert is_red[:half, :800].any()
    assert not is_red[:half, 800:].any()


def test_drawing_rings_the_marked_pixel(tmp_path):
    gray = torch.full((20, 100, 3), 0.5)
    draw_panels(tmp_path / "a.png", [[Panel(gray, mark=(5, 75))]])
    picture = read(tmp_path / "a.png")[46:]
    ring = (picture == 0).all(-1).nonzero().double().mean(0)  # the black of it; captions are empty
    pixel = (1600 - 24) / 100
    assert ring.tolist() == pytest.approx([5.5 * pixel, 12 + 75.5 * pixel], abs=3)


def test_drawing_writes_facts_beside_pictures(tmp_path):
    pictures = [Panel(torch.ones(10, 40, 3)), Facts("size", [("100", "pixels")])]
    draw_panels(tmp_path / "a.png", [pictures])
    picture = read(tmp_path / "a.png")
    assert (picture[60:, 800:] == 0).any()
    assert (picture[60:, :700] == 255).all()


def test_maps_are_drawn_in_rows_of_columns(tmp_path):
    for columns, rows in ((4, 2), (7, 1)):
        draw_maps(tmp_path / "a.png", torch.rand(7, 4, 16), columns=columns, heading="seven")
        height = 64 + rows * (34 + 12 + (1600 - 12 * (columns + 1)) / columns / 4)
        assert read(tmp_path / "a.png").shape[0] == pytest.approx(height, abs=1)


def test_maps_of_sequences_are_drawn_as_strips(tmp_path):
    draw_maps(tmp_path / "a.png", torch.rand(2, 320), columns=1)
    assert read(tmp_path / "a.png").shape[0] < 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": torch.rand(2, 3, 4, 5)}, "maps must have shape .* got"),
        ({"maps": torch.rand(0, 4, 5)}, "maps must have shape"),
        ({"captions": ["one"]}, "captions must be 2, one for each map; got 1"),
        ({"columns": 0}, "columns must be positive; got 0"),
        ({"image": torch.rand(1, 4, 4)}, r"image must have shape \[3, H, W\]"),
    ],
)
def test_drawing_maps_refuses(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_maps(tmp_path / "a.png", **({"maps": torch.rand(2, 4, 4)} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_drawing_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "a.png"
    path.write_text("old")

    def save_half(self, name, **options):
        Path(name).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", save_half)
    with pytest.raises(OSError, match="disk full"):
        draw_maps(path, torch.rand(2, 4, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_text() == "old"


def test_drawing_replaces_a_file_under_whoever_reads_it(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with path.open() as reader:
        draw_maps(path, torch.rand(1, 4, 64))
        assert reader.read() == "old"
    assert read(path).shape[1] == 1600


def test_drawing_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"efficient-attention\[plot\]"):
        draw_maps(tmp_path / "a.png", torch.rand(1, 4, 4))


@pytest.mark.parametrize("name", visualize.__all__)
def test_examples_print_what_they_say(name, tmp_path):
    thing = getattr(visualize, name)
    scope = {
        "torch": torch,
        **vars(inspect.getmodule(thing)),
        "efficient_attention": efficient_attention,
        "folder": tmp_path,
    }
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, name, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
