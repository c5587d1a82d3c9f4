"""Pictures whose class is a relation: the frame says which figure counts, and neither alone is enough."""

import math
from collections import Counter

import pytest
import torch

from efficient_attention.data import generated_cues
from efficient_attention.data.draws import Draw, generator
from efficient_attention.data.generated_cues import GeneratedCues
from efficient_attention.data.outlines import OUTLINES, figure, frame


@pytest.fixture
def plain(monkeypatch):
    """Pictures without clouds and camera, and the patches that each is made of."""
    monkeypatch.setattr(generated_cues, "clouds", lambda size, random: torch.full(size, 0.5))
    monkeypatch.setattr(generated_cues, "camera", lambda scene, random: scene * 255)
    patches = []

    def noted(outline, size, **options):
        patches.append((outline, figure(outline, size, **options)))
        return patches[-1][1]

    monkeypatch.setattr(generated_cues, "figure", noted)
    return patches


@pytest.mark.parametrize("figures", [2, 3, 4])
def test_the_class_is_that_of_the_figure_with_the_colour_of_the_frame(plain, figures):
    data = GeneratedCues(20, size=(64, 80), figures=figures)
    for i in range(20):
        plain.clear()
        image, label = data[i]
        colours = []
        ground = torch.ones(64, 80, dtype=torch.bool)
        for _, (rows, columns, inside) in plain:
            (colour,) = image[:, rows, columns][:, inside].unique(dim=1).t()
            colours.append(tuple(colour.tolist()))
            ground[rows, columns] &= ~inside
        assert image[:, ground].unique().numel() == 1
        outlines = [outline for outline, _ in plain]
        assert outlines[0] is frame
        assert len(set(outlines)) == len(outlines) == figures + 1
        assert len(set(colours)) == figures
        (chosen,) = [o for o, c in zip(outlines[1:], colours[1:], strict=True) if c == colours[0]]
        assert chosen is OUTLINES[data.classes[label]]


def test_the_figure_that_counts_is_placed_as_the_others_are():
    # Were it nearer to the frame or larger, that alone would tell. Of 3 x 600 it is the nearest in one third.
    data = GeneratedCues(1, size=(48, 48), figures=3)
    nearest, largest = Counter(), Counter()
    for seed in range(600):
        first, *others = data._places(generator(seed))
        nearest[min(range(3), key=lambda i: math.dist(first.centre, others[i].centre))] += 1
        largest[max(range(3), key=lambda i: others[i].radius)] += 1
    for counts in (nearest, largest):
        # Chi squared of two degrees is below 13.8 in 999 of 1000 cases.
        assert sum((counts[i] - 200) ** 2 / 200 for i in range(3)) < 13.8


def test_figures_are_far_from_the_frame_and_apart():
    data = GeneratedCues(1, size=(48, 80), figures=4)
    for seed in range(50):
        first, *others = data._places(generator(seed))
        for i, one in enumerate(others):
            assert math.dist(one.centre, first.centre) >= 24
            for other in others[:i]:
                assert math.dist(one.centre, other.centre) > one.radius + other.radius
        for (y, x), radius in [(thing.centre, thing.radius) for thing in (first, *others)]:
            assert radius <= y <= 48 - radius
            assert radius <= x <= 80 - radius


def test_classes_are_equally_frequent():
    data = GeneratedCues(600, size=(48, 48), figures=2)
    counts = Counter(label for _, label in data)
    assert data.num_classes == len(data.classes) == 6
    # Chi squared of five degrees is below 20.5 in 999 of 1000 cases.
    assert sum((counts[i] - 100) ** 2 / 100 for i in range(6)) < 20.5


def test_a_frame_is_a_square_without_its_middle():
    patch = figure(frame, (101, 101), centre=(50.5, 50.5), radius=50)
    # Sides of 2 sqrt(1/2) and 0.8 radii.
    assert abs(int(patch.inside.sum()) - (2 - 0.64) * 50**2) < 4 * 71
    assert not patch.inside[50, 50]


def test_a_sample_follows_from_seed_and_index_alone():
    data = GeneratedCues(8, size=(48, 64), seed=3)
    image, label = data[5]
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    torch.manual_seed(5)
    again, same = GeneratedCues(80, size=(48, 64), seed=3)[Draw(5, 99)]
    assert torch.equal(again, image)
    assert same == label
    assert not torch.equal(GeneratedCues(8, size=(48, 64), seed=4)[5][0], image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be positive; got 0"),
        ({"size": (47, 64)}, r"size must be \(H, W\) of at least 48 pixels; got \(47, 64\)"),
        ({"figures": 1}, "figures must be from 2 to 4; got 1"),
        ({"figures": 5}, "figures must be from 2 to 4; got 5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedCues(**{"length": 1, **options})
