"""Pictures whose class is a relation: it is the angle, and neither arrow alone tells."""

import math

import pytest
import torch

from efficient_attention.data import generated_angles
from efficient_attention.data.draws import Draw, generator
from efficient_attention.data.generated_angles import GeneratedAngles
from efficient_attention.data.outlines import arrow, figure


@pytest.mark.parametrize("num_classes", [2, 5, 9])
def test_the_label_is_the_angle_between_the_arrows(num_classes):
    data = GeneratedAngles(1, num_classes=num_classes)
    step = 180 / (num_classes - 1)
    labels = set()
    for seed in range(300):
        label, (first, second) = data._directions(generator(seed))
        cosine = math.cos(first - second)
        between = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        assert abs(between - label * step) <= step / 3 + 1e-5
        labels.add(label)
    assert labels == set(range(num_classes))


def test_neither_arrow_alone_tells_the_label():
    data = GeneratedAngles(1, num_classes=3)
    counts = torch.zeros(2, 3, 4)
    for seed in range(3000):
        label, directions = data._directions(generator(9, seed))
        for i, direction in enumerate(directions):
            counts[i, label, int(direction % (2 * math.pi) // (math.pi / 2))] += 1
    # 250 of 3000 in each of 12 cells; chi squared of 11 degrees is below 31.3 in 999 of 1000 cases.
    chi_squared = ((counts - 250) ** 2 / 250).sum((1, 2))
    assert (chi_squared < 31.3).all()


def test_arrows_are_far_apart_and_nothing_is_over_them():
    data = GeneratedAngles(1, size=(48, 80), clutter=8)
    for seed in range(50):
        things = data._things((0.0, 1.0), generator(seed))
        assert [thing.outline for thing in things[:2]] == [arrow, arrow]
        assert arrow not in [thing.outline for thing in things[2:]]
        for i, one in enumerate(things):
            y, x = one.centre
            assert one.radius <= y <= 48 - one.radius
            assert one.radius <= x <= 80 - one.radius
            for other in things[:i]:
                assert math.dist(one.centre, other.centre) > one.radius + other.radius
        assert math.dist(things[0].centre, things[1].centre) >= 24


def test_an_arrow_points_where_it_is_turned():
    patch = figure(arrow, (101, 101), centre=(50.5, 50.5), radius=40.3, angle=math.pi / 2)
    widths = patch.inside.sum(1)
    # Angles turn from x to y, which points down: the head is below, and wider than the shaft.
    assert widths[-20:].max() > 2 * widths[:20].max() > 0
    assert torch.equal(patch.inside, patch.inside.flip(1))


def test_what_is_placed_is_drawn(monkeypatch):
    # Without clouds and camera, all that differs from the ground is inside a figure, of one colour each.
    monkeypatch.setattr(generated_angles, "clouds", lambda size, random: torch.full(size, 0.5))
    monkeypatch.setattr(generated_angles, "camera", lambda scene, random: scene * 255)
    patches = []

    def noted(*args, **options):
        patches.append(figure(*args, **options))
        return patches[-1]

    monkeypatch.setattr(generated_angles, "figure", noted)
    image, _ = GeneratedAngles(3, size=(64, 80))[0]
    left = torch.ones(64, 80, dtype=torch.bool)
    colours = []
    for rows, columns, inside in patches:
        colours.append(image[:, rows, columns][:, inside].unique(dim=1))
        left[rows, columns] &= ~inside
    colours.append(image[:, left].unique(dim=1))
    assert len(patches) >= 2
    assert [colour.shape for colour in colours] == [(3, 1)] * (len(patches) + 1)
    assert torch.cat(colours, 1).unique(dim=1).shape[1] == len(patches) + 1


def test_a_sample_follows_from_seed_and_index_alone():
    data = GeneratedAngles(8, size=(48, 64), seed=3)
    image, label = data[5]
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    torch.manual_seed(5)
    again, same = GeneratedAngles(80, size=(48, 64), seed=3)[Draw(5, 99)]
    assert torch.equal(again, image)
    assert same == label
    assert not torch.equal(GeneratedAngles(8, size=(48, 64), seed=4)[5][0], image)
    labels = [label for _, label in data]
    assert len(labels) == 8
    assert len(set(labels)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be positive; got 0"),
        ({"size": (47, 64)}, r"size must be \(H, W\) of at least 48 pixels; got \(47, 64\)"),
        ({"num_classes": 10}, "num_classes must be from 2 to 9; got 10"),
        ({"clutter": 9}, "clutter must be from 0 to 8; got 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedAngles(**{"length": 1, **options})
