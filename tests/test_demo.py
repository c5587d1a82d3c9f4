"""The demonstration tells the truth: what it reads, fits, rebuilds, measures and draws."""

import doctest
import inspect
import io

import pytest
import torch

import efficient_attention
from efficient_attention.demo import colour, costs, main, model, photo
from efficient_attention.demo.costs import Cost, compare, in_words, table
from efficient_attention.demo.main import rebuild, run
from efficient_attention.demo.model import Bands, PhotoAttention, fit
from efficient_attention.demo.photo import bundled_photo, pixels_of, read_photo, shrink, to_image
from efficient_attention.errors import InputError
from efficient_attention.memory import peak_bytes
from efficient_attention.progress import Progress
from efficient_attention.visualize import attention_map, drawing, template_maps

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _one_thread():
    """As in `run`; the first fixture of all restores the number."""
    torch.set_num_threads(1)


def noise(width=48, height=32, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    data = torch.randint(0, 256, (height * width * channels,), dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), bytes(data.tolist()))


def patches(size=32):
    """Four squares of one colour each."""
    pixels = torch.zeros(1, 3, size, size)
    half = size // 2
    pixels[:, 0, :half, :half] = 0.9
    pixels[:, 1, :half, half:] = 0.8
    pixels[:, 2, half:, :half] = 0.7
    pixels[:, :, half:, half:] = 0.5
    return pixels


def saved(image, path, **options):
    image.save(path, **options)
    return read_photo(path)


# Reading


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_photo_is_read_as_it_is(tmp_path, name):
    image = noise()
    assert saved(image, tmp_path / name).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_photo_of_wide_numbers_is_stretched_from_black_to_white(tmp_path, mode):
    numbers = torch.arange(0, 60_000, 60_000 // (40 * 20), dtype=torch.int32)[: 40 * 20]
    image = Image.frombytes("I", (40, 20), numbers.numpy().tobytes()).convert(mode)
    read = saved(image, tmp_path / "a.tif")
    levels = pixels_of(read)[0, 0].flatten()
    assert read.mode == "RGB"
    assert levels[0] == 0
    assert levels[-1] == 1
    assert (levels.diff() >= 0).all()
    torch.testing.assert_close(levels, torch.linspace(0, 1, 800), atol=1 / 255, rtol=0)


def test_photo_of_16_bits_keeps_them_apart_where_8_would_not(tmp_path):
    dim = Image.new("I;16", (20, 20), 1000)
    dim.paste(1100, (0, 0, 20, 10))  # both are 3 or 4 of 255
    levels = pixels_of(saved(dim, tmp_path / "a.png"))[0, 0]
    assert levels.unique().tolist() == [0, 1]


def test_photo_that_is_transparent_lies_on_white(tmp_path):
    image = noise(mode="RGBA")
    image.putalpha(0)
    image.paste((10, 20, 30, 255), (0, 0, 5, 5))
    read = saved(image, tmp_path / "a.png")
    assert read.getpixel((20, 20)) == (255, 255, 255)
    assert read.getpixel((2, 2)) == (10, 20, 30)


def test_photo_with_a_transparent_colour_in_its_palette_lies_on_white(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 5, 5))
    read = saved(image, tmp_path / "a.png", transparency=0)
    assert read.getpixel((2, 2)) == (255, 255, 255)
    assert read.getpixel((10, 10)) == (0, 0, 255)


def test_photo_in_grayscale_has_equal_channels(tmp_path):
    image = noise(mode="L")
    read = saved(image, tmp_path / "a.png")
    assert read.tobytes() == Image.merge("RGB", [image] * 3).tobytes()


def test_photo_is_turned_upright(tmp_path):
    image = noise()
    orientation = Image.Exif()
    orientation[0x112] = 6  # the camera was held on its side
    read = saved(image, tmp_path / "a.png", exif=orientation)
    assert read.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_photo_errors_name_the_argument_and_the_file(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    noise(200, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    noise(15, 40).save(tmp_path / "small.png")
    expected = {
        "nothing.png": "image must be an image file; got '.*nothing.png': no such file",
        "text.png": "image must be an image file; got '.*text.png': not a format that Pillow reads",
        "cut.png": "image must be a sound image file; got '.*cut.png'",
        "small.png": "image must have at least 16 x 16 pixels; got '.*small.png': 15 x 40",
        ".": "image must be an image file; got '.*': a folder",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message):
            read_photo(tmp_path / name)


def test_shrinking_takes_means_of_areas():
    image = Image.new("L", (40, 20))
    image.paste(200, (0, 0, 40, 10))
    small = shrink(image.convert("RGB"), 2)
    assert small.size == (2, 1)
    assert small.getpixel((0, 0)) == (100, 100, 100)
    assert shrink(image, 800) is image


def test_pixels_come_back_from_an_image_of_them():
    image = noise()
    assert to_image(pixels_of(image)).tobytes() == image.tobytes()
    torch.testing.assert_close(pixels_of(image, 5, 9), pixels_of(image)[:, :, 5:9])


def test_oklab_is_that_of_its_reference():
    # Red and blue from the table of Ottosson's article, by way of the sRGB primaries.
    pixels = torch.tensor([[1.0, 0, 0], [0, 0, 1]]).view(2, 3, 1, 1)
    expected = torch.tensor([[0.62796, 0.22486, 0.12585], [0.45201, -0.03246, -0.31153]])
    torch.testing.assert_close(colour.to_oklab(pixels).flatten(1), expected, atol=1e-4, rtol=0)


# Fitting


def test_fitting_improves_the_reconstruction():
    thumbnail = pixels_of(shrink(read_photo(bundled_photo("astronaut.png")), 32 * 32))
    attention = PhotoAttention(thumbnail)

    def distance():
        with torch.no_grad():
            return float((attention(thumbnail) - thumbnail).square().mean().sqrt())

    before = distance()
    errors = fit(attention, thumbnail, 60)
    assert errors[-1] < 0.3 * errors[0]
    assert distance() < 0.6 * before


def test_fitted_maps_fall_on_the_parts_of_a_picture():
    thumbnail = patches()
    attention = PhotoAttention(thumbnail, templates=6)
    fit(attention, thumbnail, 150)
    features = attention.features(thumbnail).detach()
    for row, column in ((4, 4), (4, 28), (28, 4), (28, 28)):
        attended = attention_map(attention.attention, features, (row, column))[0, 0]
        rows, columns = (slice(16 * (i // 16), 16 * (i // 16) + 16) for i in (row, column))
        assert attended[rows, columns].sum() > 0.9  # its own patch, a quarter of the picture


def test_fitting_depends_on_the_seed_alone():
    thumbnail = pixels_of(noise())

    def fitted(seed):
        return fit(PhotoAttention(thumbnail, seed=seed), thumbnail, 3)

    torch.manual_seed(5)
    first, state = fitted(0), torch.get_rng_state()
    torch.manual_seed(6)
    assert fitted(0) == first
    assert fitted(1) != first
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global state alone


def test_context_vectors_are_mean_appearances_of_what_templates_attend_to():
    pixels = pixels_of(noise())
    attention = PhotoAttention(pixels)
    features = attention.features(pixels)
    maps = template_maps(attention.attention, features)[0].flatten(1)  # [T, N]
    means = maps @ attention.appearance(pixels)[0].flatten(1).T  # [T, A]
    context = attention.attention.summarize(features)
    torch.testing.assert_close(context.mean[0, 0], means, atol=1e-5, rtol=1e-4)


def test_appearance_of_rows_is_that_of_the_whole():
    pixels = pixels_of(noise())
    attention = PhotoAttention(pixels)
    part = attention.appearance(pixels[:, :, 7:20], top=7, height=32)
    torch.testing.assert_close(part, attention.appearance(pixels)[:, :, 7:20])


# Attending


def test_rebuilding_in_bands_leaves_no_trace_of_them(monkeypatch):
    image = noise(40, 50)
    attention = PhotoAttention(pixels_of(image))
    fit(attention, pixels_of(image), 5)
    with torch.no_grad():
        whole = pixels_of(to_image(attention(pixels_of(image))))
        monkeypatch.setattr(main, "Bands", lambda m, i: Bands(m, i, pixels=7 * 40))
        banded = pixels_of(rebuild(attention, image))
    torch.testing.assert_close(banded, whole, atol=1.5 / 255, rtol=0)


def test_rebuilding_takes_memory_that_does_not_grow_with_the_photo():
    attention = PhotoAttention(pixels_of(noise())).requires_grad_(False)

    def peak(height):
        image = noise(256, height)
        return peak_bytes(lambda: rebuild(attention, image))

    assert peak(1024) < 1.05 * peak(512)


# Measuring


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(costs, "ENOUGH_SECONDS", 0)
    monkeypatch.setattr(costs, "FUSED_POSITIONS", 256)
    monkeypatch.setattr(costs, "EXPLICIT_POSITIONS", 128)
    monkeypatch.setattr(drawing, "_WIDTH", 600)


def test_costs_are_measured_on_few_positions_and_computed_for_all(quick):
    query, key, value = (torch.randn(1, 1, 1000, c) for c in (4, 4, 3))
    efficient, fused, all_fused, explicit, all_explicit = compare(query, key, value, positions=1000)
    assert [c.positions for c in (efficient, fused, explicit)] == [1000, 250, 125]
    assert [c.measured for c in (efficient, fused, explicit)] == [True] * 3
    assert not all_fused.measured
    assert not all_explicit.measured
    assert all_fused.bytes == pytest.approx(4 * fused.bytes)
    assert all_fused.seconds == pytest.approx(16 * fused.seconds)
    assert all_explicit.bytes == pytest.approx(64 * explicit.bytes)
    assert all_explicit.seconds == pytest.approx(64 * explicit.seconds)
    assert explicit.bytes >= 2 * 4 * 125**2  # scores and weights
    assert efficient.bytes < 4 * 1000**2 / 50  # of the N x N map


def test_costs_of_what_fits_are_not_computed(quick):
    query, key, value = (torch.randn(1, 1, 100, c) for c in (4, 4, 3))
    assert all(cost.measured for cost in compare(query, key, value, positions=100))


def test_explicit_attention_is_that_of_the_library(quick):
    query, key, value = (torch.randn(1, 1, 50, c) for c in (4, 4, 3))
    expected = efficient_attention.dot_product_attention(query, key, value)
    torch.testing.assert_close(costs._explicit(query, key, value), expected)


def test_table_is_aligned_and_says_what_was_computed():
    rows = [Cost("a", 7, 2**30, 0.0123), Cost("b", 1_000_000, 5.5e14, 12345.6, measured=False)]
    lines = table(rows).splitlines()
    assert lines[1].split() == ["a", "7", "1.0", "0.012", "measured"]
    assert lines[2].split() == ["b", "1,000,000", "512,227", "12,346", "computed"]
    assert (
        len(
            {
                line.index(" measured") if "measured" in line else line.index(" computed")
                for line in lines[1:]
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    ("seconds", "size", "words"),
    [
        (0.5, 100, "0.50 s,  100 B"),
        (60, 2**30, "1.0 min,  1.0 GiB"),
        (90_000, 2**45, "1.0 days,  32 TiB"),
    ],
)
def test_costs_in_words_have_the_units_that_suit_them(seconds, size, words):
    assert in_words(Cost("a", 1, size, seconds)) == words


# All of it


def test_demo_of_a_small_photo_writes_a_picture_and_reports(tmp_path, quick):
    noise(40, 30).save(tmp_path / "in.png")
    lines = []
    torch.set_num_threads(2)
    path = run(tmp_path / "in.png", output=tmp_path / "new" / "out", steps=4, report=lines.append)
    assert path == tmp_path / "new" / "out" / "demo.png"
    with Image.open(path) as picture:
        assert picture.width == 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    report = "\n".join(lines)
    assert "in.png: 40 x 30 = 1,200 pixels" in report
    assert "4 steps" in report
    assert "measured" in report
    assert "computed" in report
    assert str(path) in report
    assert [p.name for p in path.parent.iterdir()] == ["demo.png"]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("size", [(16, 16), (16, 200), (200, 16)])
def test_demo_takes_any_shape(tmp_path, quick, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "blank.png")  # without any contrast
    run(tmp_path / "blank.png", output=tmp_path, steps=1)
    assert (tmp_path / "demo.png").exists()


def test_demo_draws_a_large_photo_smaller_and_rebuilds_it_whole(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(main, "VIEW_PIXELS", 400)
    noise(80, 40).save(tmp_path / "in.png")
    lines = []
    run(tmp_path / "in.png", output=tmp_path, pixel=(79, 39), steps=1, report=lines.append)
    rows = {line[:24].strip(): line[24:].split() for line in "\n".join(lines).splitlines()}
    assert rows["efficient, end to end"][0] == "3,200"
    assert rows["efficient attention"][0] == "392"  # 28 x 14


@pytest.mark.parametrize("pixel", [(40, 0), (0, 30), (-1, 5)])
def test_demo_refuses_a_pixel_outside(tmp_path, pixel):
    noise(40, 30).save(tmp_path / "in.png")
    with pytest.raises(
        InputError,
        match=f"pixel must be X from 0 to 39 and Y from 0 to 29; got {pixel[0]} {pixel[1]}",
    ):
        run(tmp_path / "in.png", output=tmp_path / "out", pixel=pixel)
    assert not (tmp_path / "out").exists()


def test_demo_refuses_an_output_that_is_no_folder_before_the_work(tmp_path):
    noise(40, 30).save(tmp_path / "in.png")
    for output in (tmp_path / "in.png", tmp_path / "in.png" / "below"):
        lines = []
        with pytest.raises(InputError, match="output must be a folder that can be written to; got"):
            run(tmp_path / "in.png", output=output, report=lines.append)
        assert lines == []


def test_demo_tells_of_a_picture_that_cannot_be_written(tmp_path, quick):
    noise(40, 30).save(tmp_path / "in.png")
    (tmp_path / "demo.png").mkdir()
    with pytest.raises(InputError, match="output must be a folder that can be written to; got"):
        run(tmp_path / "in.png", output=tmp_path, steps=1)


def test_missing_photograph_names_the_extra(monkeypatch):
    monkeypatch.setattr(photo, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"efficient-attention\[plot\]"):
        bundled_photo("astronaut.png")


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line_that_vanishes():
    terminal = Terminal()
    progress = Progress("fitting", 4, terminal)
    progress.show(2, "error 0.5")
    progress.show(4)
    shown = terminal.getvalue()
    assert "[############------------] fitting 2/4  error 0.5" in shown
    assert shown.endswith("\r\033[K")
    assert "\n" not in shown


def test_progress_on_a_terminal_is_not_redrawn_at_every_step():
    terminal = Terminal()
    progress = Progress("fitting", 10_000, terminal)
    for step in range(100):
        progress.show(step)
    assert terminal.getvalue().count("\r") < 50


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    log = io.StringIO()
    progress = Progress("fitting", 30, log)
    for step in range(1, 31):
        now[0] += 1
        progress.show(step, "error 0.5")
    assert log.getvalue() == "fitting 10/30  error 0.5\nfitting 20/30  error 0.5\n"


EXAMPLES = [
    thing
    for module in (colour, costs, main, model, photo)
    for name in module.__all__
    if callable(thing := getattr(module, name)) and ">>> " in inspect.getdoc(thing)
]


@pytest.mark.parametrize("thing", [*EXAMPLES, Cost.at, Progress], ids=lambda t: t.__qualname__)
def test_examples_print_what_they_say(thing, tmp_path, quick):
    scope = {"torch": torch, **vars(inspect.getmodule(thing)), "folder": tmp_path}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, "doc", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
