"""Generated pairs: geometry against arithmetic by hand, and pictures against their own truth."""

import doctest
import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficient_attention.data import generated_stereo
from efficient_attention.data.draws import Draw
from efficient_attention.data.generated_stereo import (
    GeneratedStereo,
    choices,
    installed_photographs,
    photographs,
    shapes,
    textures,
)
from efficient_attention.data.generated_stereo.cameras import Camera
from efficient_attention.data.generated_stereo.layers import Layer, Placement, Scene
from efficient_attention.data.generated_stereo.materials import Light, Material
from efficient_attention.data.generated_stereo.objects import visible_faces
from efficient_attention.data.generated_stereo.rendering import render
from efficient_attention.data.generated_stereo.scenes import random_scene
from efficient_attention.data.generated_stereo.surfaces import Box, Quadric, Relief

SIZE = (96, 192)
DAYLIGHT = Light((0.0, 0.0, 1.0), 1.0, (0.0, 0.0, 1e9), 200.0)


def pairs(**options):
    return GeneratedStereo(SIZE, **({"max_disparity": 48, "length": 1000} | options))


def material(gray=0.5):
    """Of one colour."""
    laying = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    return Material(torch.zeros(1, 3, 3), laying, torch.zeros(3, 1), torch.full((3,), gray))


def warped(view, disparity):
    """The right view as the left camera would see it: ``out[y, x] = view[y, x - disparity]``."""
    height, width = disparity.shape
    x = torch.arange(width) - disparity
    y = torch.arange(height)[:, None].expand_as(x)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(view[None], grid[None], padding_mode="border", align_corners=False)[0]


@pytest.fixture(scope="module")
def ideal():
    dataset = pairs(ideal_cameras=True)
    return [dataset[i] for i in range(8)]


def test_samples_have_the_types_of_all_stereo_pairs():
    sample = pairs()[3]
    assert list(sample) == ["left", "right", "name", "disparity", "valid", "visible"]
    assert sample["left"].shape == sample["right"].shape == (3, *SIZE)
    assert sample["disparity"].shape == sample["valid"].shape == sample["visible"].shape == SIZE
    assert {sample[x].dtype for x in ("left", "right", "disparity")} == {torch.float32}
    assert sample["valid"].dtype == sample["visible"].dtype == torch.bool
    assert sample["name"] == "generated-0-3"
    for view in (sample["left"], sample["right"]):
        assert view.is_contiguous()
        assert 0 <= view.min() <= view.max() <= 1
        levels = view * 255
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_what_both_views_show_is_where_the_disparity_says(ideal):
    """A quarter of a pixel more or less makes it worse; what is hidden looks like something else."""
    errors = {shift: [] for shift in (0, 0.25, -0.25)}
    hidden = []
    for sample in ideal:
        for shift, found in errors.items():
            view = warped(sample["right"], sample["disparity"] + shift)
            difference = (view - sample["left"]).abs().mean(0)
            found.append(difference[sample["visible"]].mean())
            inside = torch.arange(SIZE[1]) - sample["disparity"] >= 0
            if shift == 0:
                hidden.append(difference[~sample["visible"] & inside].mean())
    truth, *shifted = (torch.stack(found).mean() for found in errors.values())
    assert min(shifted) > 1.3 * truth
    assert torch.stack(hidden).mean() > 20 * truth


def test_every_sample_alone_is_where_the_disparity_says(ideal):
    for sample in ideal:
        view = warped(sample["right"], sample["disparity"])
        difference = (view - sample["left"]).abs().mean(0)[sample["visible"]]
        # In grey levels of 255; rounding both views makes 0.3 alone. The mean has the seams between surfaces, too.
        assert difference.median() * 255 < 1
        assert difference.mean() * 255 < 4


def test_all_samples_differ_and_are_worth_learning_from(ideal):
    means = torch.stack([sample["disparity"].mean() for sample in ideal])
    assert means.std() > 2
    shares = torch.stack([sample["visible"].float().mean() for sample in ideal])
    assert 0.6 < shares.mean() < 0.98
    assert min(sample["left"].std() for sample in ideal) > 0.03
    assert min(sample["disparity"].std() for sample in ideal) > 0.5


@pytest.mark.parametrize(
    ("size", "most"), [((64, 128), 32), ((48, 300), 192), ((32, 32), 4), ((40, 64), 192)]
)
def test_disparities_are_positive_and_below_the_bound(size, most, monkeypatch):
    plain = lambda *arguments: lambda **options: material()  # noqa: E731
    monkeypatch.setattr("efficient_attention.data.generated_stereo.scenes.MaterialSource", plain)
    for i in range(25):
        scene = random_scene(np.random.default_rng(i), size, most, seed=0)
        disparity = render(scene, size).disparity
        assert disparity.min() > 0
        assert disparity.max() < min(most, 0.45 * size[1])


def test_a_sample_follows_from_seed_and_number_alone():
    dataset = pairs()
    first = [dataset[i] for i in (0, 1, 2)]
    # Another order, another object, caches emptied, other global generators, another draw.
    for cache in (textures.tile, photographs.photograph_tile):
        cache.cache_clear()
    torch.manual_seed(5)
    np.random.seed(5)
    again = pairs(length=5)
    for i in (2, 0, 1):
        sample = again[Draw(i, 77)]
        for key in ("left", "right", "disparity", "visible"):
            assert torch.equal(sample[key], first[i][key])


def test_global_generators_are_left_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()
    pairs()[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before[1])


def test_workers_make_the_same_samples():
    dataset = pairs(length=4)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1)
    batches = torch.cat([batch["left"] for batch in loader])
    assert torch.equal(batches, torch.stack([dataset[i]["left"] for i in range(4)]))


def test_other_seeds_and_numbers_make_other_samples():
    views = [pairs()[0], pairs()[1], pairs(seed=1)[0]]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (views[i]["left"] - views[j]["left"]).abs().mean() > 0.02
        assert (views[i]["disparity"] - views[j]["disparity"]).abs().mean() > 0.5


def test_a_data_set_ends():
    dataset = pairs(length=2)
    assert len(list(dataset)) == len(dataset) == 2
    assert dataset[-1]["name"] == "generated-0-1"


def test_unlike_cameras_change_pictures_but_not_the_truth():
    for i in range(3):
        plain, real = pairs(ideal_cameras=True)[i], pairs()[i]
        assert torch.equal(plain["disparity"], real["disparity"])
        assert not torch.equal(plain["left"], real["left"])


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"size must be a height and a width of at least 32; got \(16, 64\)"
    ):
        GeneratedStereo((16, 64))
    with pytest.raises(ValueError, match="max_disparity must be at least 4 pixels; got 2"):
        GeneratedStereo(max_disparity=2)
    with pytest.raises(
        ValueError, match=r"length must be positive and seed not negative; got 5, -1"
    ):
        GeneratedStereo(length=5, seed=-1)
    with pytest.raises(FileNotFoundError, match=r"photographs must be files; got nowhere.png"):
        GeneratedStereo(photographs=["nowhere.png"])


def test_a_box_hides_as_many_pixels_as_it_is_nearer():
    """Columns 20 to 29 at 12 px before a wall at 5 px: hidden is what the right view shows in columns 8 to 17."""
    wall = Layer(Quadric((0, 0), 5.0), material(0.2))
    box = Layer(Quadric((24.5, 8), 12.0), material(0.8), shapes.bar(), Placement(24.5, 8, 5, 100))
    view = render(Scene([wall, box], DAYLIGHT, 13), (16, 40))
    assert view.disparity[3].tolist() == [5] * 20 + [12] * 10 + [5] * 10
    torch.testing.assert_close(view.left[0, 3], torch.tensor([0.2] * 20 + [0.8] * 10 + [0.2] * 10))
    torch.testing.assert_close(view.right[0, 3], torch.tensor([0.2] * 8 + [0.8] * 10 + [0.2] * 22))
    # Columns 0 to 4 are outside; the wall's columns 13 to 19 are behind the box.
    hidden = [*range(5), *range(13, 20)]
    assert (~view.visible[3]).nonzero().flatten().tolist() == hidden


@pytest.mark.parametrize("level", np.arange(12, 13, 0.15).tolist())
def test_walls_that_meet_hide_nothing(level):
    """A room's corner: the nearest of two planes, which are equally near at one column."""
    walls = [Layer(Quadric((20.02, 0), level, (slope, 0)), material()) for slope in (0.8, -0.8)]
    view = render(Scene(walls, DAYLIGHT, 32), (8, 40))
    columns = torch.arange(40)
    torch.testing.assert_close(view.disparity[0], level + 0.8 * (columns - 20.02).abs())
    assert torch.equal(view.visible[0], columns - view.disparity[0] >= -0.5)


@pytest.mark.parametrize("level", np.arange(12, 13, 0.15).tolist())
def test_faces_that_meet_hide_nothing(level):
    """A box's edge at column 20.2, a face on either side."""
    wall = Layer(Quadric((0, 0), 1.0), material())
    faces = [
        Layer(Quadric((x, 4), level - 1.5, slope), material(), shapes.bar(), Placement(x, 4, 5, 9))
        for x, slope in ((15.2, (0.3, 0)), (25.2, (-0.3, 0)))
    ]
    view = render(Scene([wall, *faces], DAYLIGHT, 14), (8, 40))
    columns = torch.arange(11, 30)
    expected = level - 0.3 * (columns - 20.2).abs()
    torch.testing.assert_close(view.disparity[0, 11:30], expected, rtol=0, atol=1e-4)
    assert torch.equal(view.visible[0, 11:30], columns - expected >= -0.5)


def test_a_steep_face_hides_nothing_of_itself():
    wall = Layer(Quadric((0, 0), 1.0), material())
    place = Placement(30.3, 4, 8, 9)
    face = Layer(Quadric((30.3, 4), 12.2, (0.8, 0)), material(), shapes.bar(), place)
    view = render(Scene([wall, face], DAYLIGHT, 20), (8, 60))
    columns = torch.arange(23, 39)
    torch.testing.assert_close(view.disparity[0, 23:39], 12.2 + 0.8 * (columns - 30.3))
    assert view.visible[:, 23:39].all()


def test_textures_are_stretched_alike_in_both_views():
    """On a floor, which both views shear, one view is the other upside down."""
    stripes = torch.rand(1, 1, 16).expand(1, 16, 16)
    laying = (0.5, 0.0, 0.0), (0.0, 0.5, 0.0)
    look = Material(textures.closed(stripes), laying, torch.ones(3, 1), torch.zeros(3))
    floor = Layer(Quadric((0, 7.5), 0.0, (0, 0.4)), look)
    view = render(Scene([floor], DAYLIGHT, 4), (16, 32))
    assert (view.left - view.right).abs().max() > 0.1
    torch.testing.assert_close(view.right.flip(1), view.left, rtol=0, atol=1e-5)


def test_thin_things_stay_whole_in_both_views():
    wall = Layer(Quadric((0, 0), 3.0), material(0.0))
    for level in (10.0, 10.25, 10.5, 10.75):
        place = Placement(30.3, 16, 40, 0.55, np.pi / 2 + 0.1)
        wire = Layer(Quadric((30.3, 16), level), material(1.0), shapes.bar(), place)
        view = render(Scene([wall, wire], DAYLIGHT, 12), (32, 60))
        for picture in (view.left, view.right):
            assert ((picture[0] > 0.5).sum(1) >= 1).all()


def test_a_camera_that_looks_lower_sees_rows_earlier():
    wall = Layer(Quadric((0, 0), 3.0), material(0.0))
    box = Layer(Quadric((30, 15), 8.0), material(1.0), shapes.bar(), Placement(30, 15, 6, 4.5))
    level = render(Scene([wall, box], DAYLIGHT, 9), (32, 60))
    lower = render(Scene([wall, box], DAYLIGHT, 9), (32, 60), drop=1.0)
    assert torch.equal(lower.left, level.left)
    assert torch.equal(lower.disparity, level.disparity)
    assert torch.equal(lower.right[:, :-1], level.right[:, 1:])
    assert not lower.visible[0].any()
    assert lower.visible[-1, 3:].all()


@pytest.mark.parametrize(
    ("slope", "curve"),
    [
        ((0.0, 0.0), (0.0, 0.0, 0.0)),
        ((0.3, -0.2), (0.0, 0.0, 0.0)),
        ((0.1, 0.1), (-0.004, 0.001, -0.003)),
        ((-0.2, 0.0), (0.004, 0.0, 0.002)),
    ],
)
def test_the_right_view_is_traced_to_the_same_point(slope, curve):
    surface = Quadric((40.0, 20.0), 30.0, slope, curve)
    x, y = np.linspace(10, 70, 61)[None], np.linspace(0, 40, 41)[:, None]
    column = x - surface.disparity(x, y)
    np.testing.assert_allclose(
        surface.trace(column, y), np.broadcast_to(x, column.shape), rtol=0, atol=1e-11
    )


def test_what_is_behind_a_fold_is_not_seen():
    # d = 30 - 0.02 u^2 changes faster than a pixel per pixel where u < -25; there columns go backwards.
    surface = Quadric((0.0, 0.0), 30.0, curve=(-0.02, 0.0, 0.0))
    u, y = np.array([[-24.0, -25.0, -26.0, -40.0]]), np.zeros((1, 1))
    column = u - surface.disparity(u, y)
    assert column.argmin() == 1
    np.testing.assert_allclose(surface.trace(column, y), [[-24, -25, -24, -10]], atol=1e-6)
    with np.errstate(invalid="ignore"):
        assert np.isnan(surface.trace(column.min() - np.ones((1, 1)), y))


def test_slopes_are_those_of_the_disparity():
    plane = Quadric((3.0, 4.0), 30.0, (0.1, -0.2), (0.003, 0.002, -0.001))
    waves = np.array([[0.08, 0.3, 0.05, 1.0], [0.03, 2.0, 0.1, 0.5]])
    relief = Relief(
        Quadric((3.0, 4.0), 20.0, (0.1, 0.05)), np.array([2.0, 1.0]), waves, (32, 64), 30
    )
    x, y, h = np.linspace(5, 50, 10)[None], np.linspace(5, 25, 8)[:, None], 1e-4
    for surface in (plane, relief):
        across, down = surface.gradient(x, y)
        expected = (surface.disparity(x + h, y) - surface.disparity(x - h, y)) / (2 * h)
        np.testing.assert_allclose(np.broadcast_to(across, expected.shape), expected, atol=1e-8)
        expected = (surface.disparity(x, y + h) - surface.disparity(x, y - h)) / (2 * h)
        np.testing.assert_allclose(np.broadcast_to(down, expected.shape), expected, atol=1e-8)


def test_a_relief_is_traced_to_the_same_point():
    waves = np.array([[0.08, 0.3, 0.05, 1.0]])
    relief = Relief(Quadric((30.0, 16.0), 20.0, (0.1, 0.0)), np.array([3.0]), waves, (32, 64), 30)
    column, y = np.arange(64, dtype=np.float32)[None], np.arange(32, dtype=np.float32)[:, None]
    x = relief.trace(column, y)
    # At points that differ in both coordinates, one by one.
    found = [
        [relief.disparity(x[i, j : j + 1][None], y[i : i + 1]).item() for j in range(64)]
        for i in range(32)
    ]
    # Between pixels the surface is straight: off by 3 px * 0.08^2 / 8 at most, and so is the point but for the slope.
    np.testing.assert_allclose(x - np.array(found), np.broadcast_to(column, x.shape), atol=0.0025)


def test_surfaces_are_flattened_until_they_fit():
    random = np.random.default_rng(0)
    for _ in range(100):
        box = Box(50.0, 30.0, *random.uniform(1, 60, 2))
        surface = Quadric(
            (50.0, 30.0),
            random.uniform(2, 28),
            tuple(random.normal(0, 1, 2)),
            tuple(random.normal(0, 0.1, 3)),
        )
        fitted = surface.fitted(box, 1.0, 30.0)
        x = np.linspace(box.x - box.width, box.x + box.width, 21)[None]
        y = np.linspace(box.y - box.height, box.y + box.height, 21)[:, None]
        disparity = fitted.disparity(x, y)
        assert 1 - 1e-9 <= disparity.min() <= disparity.max() <= 30 + 1e-9
        low, high = fitted.range(box)
        assert low - 1e-9 <= disparity.min() <= disparity.max() <= high + 1e-9
        assert np.abs(fitted.gradient(x, y)[0]).max() <= 0.6 + 1e-9
    gentle = Quadric((50.0, 30.0), 15.0, (0.01, 0.01))
    assert gentle.fitted(Box(50, 30, 10, 10), 1, 30) == gentle


def test_boxes_have_the_disparities_of_their_corners_in_space():
    for seed in range(20):
        random = np.random.default_rng(seed)
        edges, _ = np.linalg.qr(random.normal(0, 1, (3, 3)))
        centre, sizes = np.array([*random.uniform(-0.5, 0.5, 2), 4.0]), random.uniform(0.2, 1, 3)
        signs = np.array(list(itertools.product((-1, 1), repeat=3)))
        corners = centre + (signs * sizes) @ edges.T  # [8, 3]
        disparities = 150 / corners[:, 2]
        image = corners[:, :2] * disparities[:, None]
        faces = list(visible_faces(centre, edges, sizes, 150.0))
        assert 1 <= len(faces) <= 3
        for outline, (b, c, level) in faces:
            distance = np.linalg.norm(outline[:, None] - image[None], axis=-1)
            which = distance.argmin(1)
            np.testing.assert_allclose(distance.min(1), 0, atol=1e-9)
            assert len(set(which)) == 4
            found = outline @ [b, c] + level
            np.testing.assert_allclose(found, disparities[which], rtol=1e-9)
            # Nothing of the solid is in front of a face that is seen.
            assert (image @ [b, c] + level > disparities - 1e-9).all()


def test_boxes_turn_one_face_to_the_eye_or_up_to_three():
    straight = list(visible_faces(np.array([0.0, 0, 5]), np.eye(3), np.ones(3), 100.0))
    # Four units away: a square of 25 px each way, with the disparity 100 / 4.
    ((outline, plane),) = straight
    assert sorted(map(tuple, outline)) == [(-25, -25), (-25, 25), (25, -25), (25, 25)]
    assert plane == (0, 0, 25)
    # Below the eyes its top shows; left of them its right side; its left side would show to the left camera alone.
    assert len(list(visible_faces(np.array([0.0, 3, 5]), np.eye(3), np.ones(3), 100.0))) == 2
    assert len(list(visible_faces(np.array([-1.5, 0, 5]), np.eye(3), np.ones(3), 100.0))) == 2
    assert len(list(visible_faces(np.array([1.5, 0, 5]), np.eye(3), np.ones(3), 100.0))) == 1


def area(shape):
    """Share of the square that is inside."""
    line = np.linspace(-1, 1, 801, dtype=np.float32)
    return float(np.broadcast_to(shape(line[None], line[:, None]), (801, 801)).mean())


def test_shapes_cover_what_geometry_says():
    circle = np.pi / 4
    expected = {
        shapes.bar(): 1,
        shapes.pebble(1): circle,
        # The area of |p|^4 + |q|^4 < 1 is Gamma(1/4)^2 / (2 sqrt(pi)), in a square of 4.
        shapes.pebble(2): 3.7081 / 4,
        shapes.ring(0.25): circle * (1 - 0.75**2),
        shapes.frame(0.1, 0.2): 1 - 0.9 * 0.8,
        shapes.lattice(4, 0, 0.1, 0.1): 4 * 0.1 / 2,
        shapes.lattice(4, 3, 0.1, 0.2): 1 - (1 - 0.2) * (1 - 0.3),
        shapes.blob(np.zeros((3, 2))): circle,
        # r = 1 + a cos(4 t) has the area pi (1 + a^2 / 2), and is scaled to fit.
        shapes.blob(np.array([[0, 0], [0, 0], [0, 0], [0.5, 0]])): circle * (1 + 0.125) / 1.5**2,
        shapes.leaf(0.5, 0.2, 0.0): 2 * 0.5 * (4 / 3) / 4,
        shapes.polygon(np.array([[-1, -1], [1, -1], [0, 1]])): 0.5,
        shapes.polygon(np.array([[-1, -1], [0, 1], [1, -1]])): 0.5,
        shapes.scatter(np.array([[-0.5, 0], [0.5, 0]]), np.array([0.4, 0.2])): circle * 0.2,
    }
    for shape, share in expected.items():
        assert area(shape) == pytest.approx(share, abs=0.01)


def test_a_wheel_has_a_rim_and_spokes():
    wheel = shapes.wheel(2, 0.1)
    points = {
        (0.95, 0): True,
        (0.5, 0.0): True,
        (0.0, 0.5): True,
        (0.4, 0.4): False,
        (0.9, 0.9): False,
    }
    for (p, q), inside in points.items():
        assert bool(wheel(np.float32(p), np.float32(q))) == inside


def test_placements_turn_and_bound_their_shape():
    place = Placement(50, 40, 20, 5, np.pi / 6)
    tip = np.array([50 + 20 * np.cos(np.pi / 6)]), np.array([40 + 20 * np.sin(np.pi / 6)])
    np.testing.assert_allclose(np.concatenate(place.local(*tip)), [1, 0], atol=1e-12)
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * [20, 5]
    turn = np.array(
        [[np.cos(np.pi / 6), np.sin(np.pi / 6)], [-np.sin(np.pi / 6), np.cos(np.pi / 6)]]
    )
    np.testing.assert_allclose(np.abs(corners @ turn).max(0), place.box[2:])


def test_tiles_can_be_repeated_and_are_of_moderate_strength():
    kinds = set()
    for number in range(24):
        fields = textures.tile(0, number)
        assert fields.shape == (2, textures.TILE_SIZE + 1, textures.TILE_SIZE + 1)
        assert torch.equal(fields[:, 0], fields[:, -1])
        assert torch.equal(fields[:, :, 0], fields[:, :, -1])
        assert fields[0].abs().max() < 3
        kinds.add(round(float(fields[0].std()), 3))
    assert len(kinds) > 20


def test_materials_go_on_beyond_their_tile():
    pattern = torch.rand(2, 8, 8)
    laying = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    cloth = Material(textures.closed(pattern), laying, torch.eye(3, 2), torch.tensor([0.0, 0, 0.5]))
    x, y = torch.tensor([2.0, 10.0, -6.0, 2.0, 7.5]), torch.tensor([3.0, 3.0, 11.0, -5.0, 0.0])
    colours = cloth.at(x, y)
    torch.testing.assert_close(
        colours[:2, :4], pattern[:, 3, 2][:, None].expand(2, 4), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        colours[:2, 4], (pattern[:, 0, 7] + pattern[:, 0, 0]) / 2, rtol=0, atol=1e-5
    )
    assert (colours[2] == 0.5).all()


def test_light_from_above_falls_on_floors():
    light = Light((0.0, 0.6, 0.8), 0.2, (0.0, 0.0, 1e9), 100.0)
    at = np.zeros(1)
    floor, ceiling, wall = (
        float(light.shade((0.0, slope), np.full(1, 20.0), at, at)[0]) for slope in (0.1, -0.1, 0.0)
    )
    # A slope of 0.1 at 20 px and a focal length of 100 is a tilt of 1 in 2.
    assert wall == pytest.approx(1)
    assert floor == pytest.approx(0.2 + 0.8 * (0.6 * 0.5 + 0.8) / np.sqrt(1.25) / 0.8)
    assert floor > wall > ceiling


def test_cameras_do_what_they_are_told():
    random = np.random.default_rng(0)
    view = torch.rand(3, 20, 30) * 0.5
    torch.testing.assert_close(Camera().photograph(view, random), (view * 255).round() / 255)
    brighter = Camera(gain=(1.5, 1.0, 0.5)).photograph(view, random)
    expected = (view * torch.tensor([1.5, 1.0, 0.5])[:, None, None] * 255).round() / 255
    torch.testing.assert_close(brighter, expected)
    curved = Camera(gamma=0.8).photograph(view, random)
    # The steps of the picture and those of the curve.
    torch.testing.assert_close(
        curved[view > 0.05], view[view > 0.05] ** 0.8, rtol=0, atol=0.5 / 255 + 5e-4
    )
    ramp = Camera(ramp=0.2).photograph(torch.full((3, 4, 101), 0.5), random)
    torch.testing.assert_close(
        ramp[0, 0, [0, 50, 100]], torch.tensor([0.55, 0.5, 0.45]), rtol=0, atol=0.003
    )
    point = torch.zeros(3, 5, 5)
    point[:, 2, 2] = 1
    soft = Camera(softness=0.25).photograph(point, random)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    torch.testing.assert_close(soft[0, 1:4, 1:4], kernel, rtol=0, atol=0.002)


def test_noise_is_as_strong_as_told_and_differs_between_pictures():
    random = np.random.default_rng(0)
    gray = torch.full((3, 100, 100), 0.5)
    first, second = (Camera(noise=0.02).photograph(gray, random) for _ in range(2))
    assert (first - 0.5).std() == pytest.approx(0.02, rel=0.05)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.03


def test_photographs_are_textures_on_demand(tmp_path):
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    plain, red = (
        pairs(ideal_cameras=True),
        pairs(ideal_cameras=True, photographs=[tmp_path / "red.png"]),
    )

    def redness(sample):
        left = sample["left"]
        return float((left[0] - left[1:].amax(0) > 0.3).float().mean())

    assert sum(redness(red[i]) for i in range(4)) > sum(redness(plain[i]) for i in range(4)) + 0.5


def test_parts_of_photographs_can_be_repeated(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    path = (tmp_path / "a.png",)
    tiles = [photographs.photograph_tile(path, 0, number) for number in range(3)]
    for tile in tiles:
        assert tile.shape == (3, textures.TILE_SIZE + 1, textures.TILE_SIZE + 1)
        assert torch.equal(tile[:, 0], tile[:, -1])
        assert torch.equal(tile[:, :, 0], tile[:, :, -1])
        assert 0 <= tile.min() <= tile.max() <= 1
    photographs.photograph_tile.cache_clear()
    assert torch.equal(photographs.photograph_tile(path, 0, 1), tiles[1])


def test_no_photograph_is_needed(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'efficient-attention\[plot\]'"):
        installed_photographs()
    pairs()[0]


def test_installed_photographs_hold_no_stereo_pair():
    pytest.importorskip("skimage")
    names = {path.stem for path in installed_photographs()}
    assert len(names) >= 5
    assert not any("motorcycle" in name for name in names)


def test_choices_follow_their_shares():
    random = np.random.default_rng(0)
    found = [choices.pick(random, (("a", 1), ("b", 3), ("c", 0))) for _ in range(4000)]
    # Three standard deviations of a share of 1/4 in 4000 tries are 0.02.
    assert abs(found.count("a") / 4000 - 0.25) < 0.02
    assert found.count("c") == 0


@pytest.mark.parametrize("thing", [GeneratedStereo, installed_photographs, choices.pick])
def test_examples_print_what_they_say(thing):
    scope = {**vars(generated_stereo), "np": np, "pick": choices.pick}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, "doc", None, 0)
    assert test.examples
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
