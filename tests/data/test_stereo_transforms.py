"""What training changes in pairs, and what it leaves."""

import pytest
import torch

from efficient_attention.data.stereo_transforms import StereoAugmentation, crop, flip_vertically

PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "gamma": 0, "asymmetry": 0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(height=20, width=40, disparity=6):
    """Every pixel of the right view is its own number; the left view shows them shifted."""
    numbers = torch.arange(height * (width + disparity)).view(height, -1) / (height * (width + 10))
    right = numbers.expand(3, -1, -1)
    left = right[:, :, :width]
    columns = torch.arange(width).expand(height, width)
    return {
        "left": left,
        "right": right[:, :, disparity:],
        "name": "numbers",
        "disparity": torch.full((height, width), float(disparity)),
        "valid": columns % 3 > 0,
        "visible": columns >= disparity,
    }


def assert_corresponds(sample):
    """left[y, x] is right[y, x - d] wherever the sample says that it is visible, and only there it could be."""
    height, width = sample["disparity"].shape
    partner = torch.arange(width).expand(height, width) - sample["disparity"].long()
    assert torch.equal(sample["visible"], partner >= 0)
    rows, columns = sample["visible"].nonzero(as_tuple=True)
    assert len(rows)
    left = sample["left"][:, rows, columns]
    assert torch.equal(left, sample["right"][:, rows, partner[rows, columns]])


def test_crops_keep_what_corresponds():
    sample = pair()
    assert_corresponds(sample)
    part = crop(sample, 3, 17, (10, 20))
    assert_corresponds(part)
    assert torch.equal(part["left"], sample["left"][:, 3:13, 17:37])
    assert torch.equal(part["disparity"], sample["disparity"][3:13, 17:37])
    assert torch.equal(part["valid"], sample["valid"][3:13, 17:37])


def test_flips_keep_what_corresponds():
    sample = pair()
    sample["disparity"][:5], sample["visible"][:5] = 0, True
    sample["right"] = torch.cat([sample["left"][:, :5], sample["right"][:, 5:]], dim=1)
    flipped = flip_vertically(sample)
    assert_corresponds(flipped)
    assert torch.equal(flipped["valid"].flip(0), sample["valid"])
    assert torch.equal(flipped["left"].flip(1), sample["left"])


def test_augmented_pairs_correspond_and_have_the_size():
    for seed in range(20):
        sample = StereoAugmentation((8, 16), **PLAIN)(pair(), seeded(seed))
        assert sample["left"].shape == (3, 8, 16)
        assert_corresponds(sample)


def test_every_crop_can_happen_and_flips_do_half_of_the_time():
    augment = StereoAugmentation((19, 39), **PLAIN)
    corners = {}
    for seed in range(200):
        sample = augment(pair(), seeded(seed))
        corner = (round(float(sample["left"][0, 0, 0]), 6), float(sample["left"][0, -1, 0]))
        corners[corner] = corners.get(corner, 0) + 1
    # Two rows, two columns, two ways up.
    assert len(corners) == 8
    assert min(corners.values()) > 8


def test_samples_without_truth_are_augmented_too():
    sample = {key: value for key, value in pair().items() if key in ("left", "right", "name")}
    assert list(StereoAugmentation((8, 16))(sample, seeded())) == ["left", "right", "name"]


def test_without_strength_colours_stay():
    sample = pair()
    same = StereoAugmentation(None, flip=0, **PLAIN)(sample, seeded())
    for key in ("left", "right"):
        torch.testing.assert_close(same[key], sample[key], rtol=0, atol=2**-22)


def test_the_given_sample_is_left_alone():
    sample = pair()
    before = {key: value.clone() for key, value in sample.items() if key != "name"}
    StereoAugmentation((8, 16), flip=1)(sample, seeded())
    assert all(torch.equal(sample[key], value) for key, value in before.items())


def test_views_are_recoloured_alike_but_for_the_asymmetry():
    sample = {"left": torch.rand(3, 8, 8), "name": "noise"}
    sample["right"] = sample["left"].clone()

    def difference(asymmetry, seed):
        augment = StereoAugmentation(None, flip=0, asymmetry=asymmetry)
        views = augment(sample, seeded(seed))
        assert (views["left"] - sample["left"]).abs().max() > 0.01
        return (views["left"] - views["right"]).abs().max()

    for seed in range(5):
        assert difference(0.0, seed) == 0
        assert 0 < difference(0.05, seed) < 0.25


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "gamma"])
def test_every_strength_changes_what_it_is_called(name):
    sample = {"left": torch.rand(3, 16, 16), "name": "noise"}
    sample["right"] = sample["left"]
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    before = {**sample, "left": sample["left"] * 0.5 + 0.25}
    changes = []
    for seed in range(10):
        augment = StereoAugmentation(None, flip=0, **(PLAIN | {name: 0.1}))
        gray, old = ((weights * x["left"]).sum(0) for x in (augment(before, seeded(seed)), before))
        colour = (augment(before, seeded(seed))["left"] - gray).std()
        old_colour = (before["left"] - old).std()
        changes.append((gray.mean() - old.mean(), gray.std() / old.std(), colour / old_colour))
    means, contrasts, saturations = map(torch.tensor, zip(*changes, strict=True))
    assert saturations.std() > 0.01
    if name == "saturation":
        torch.testing.assert_close(contrasts, torch.ones(10), rtol=1e-5, atol=0)
    if name in ("saturation", "contrast"):
        torch.testing.assert_close(means, torch.zeros(10), rtol=0, atol=1e-6)
    else:
        assert means.min() < -0.001
        assert means.max() > 0.001
    if name in ("brightness", "contrast"):
        torch.testing.assert_close(contrasts, saturations, rtol=1e-4, atol=0)
        assert contrasts.std() > 0.01


def test_the_generator_decides_alone():
    augment = StereoAugmentation((8, 16))
    for seed in range(8):
        torch.manual_seed(2 * seed)
        one = augment(pair(), seeded(seed))
        torch.manual_seed(2 * seed + 1)
        same, other = augment(pair(), seeded(seed)), augment(pair(), seeded(seed + 8))
        assert torch.equal(one["left"], same["left"])
        assert not torch.equal(one["left"], other["left"])


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"size must fit into the images; got \(30, 16\) for 'numbers'"
    ):
        StereoAugmentation((30, 16))(pair(), seeded())
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\); got 1"):
        StereoAugmentation(gamma=1)
    with pytest.raises(ValueError, match=r"size must be a positive height and width; got \(0, 5\)"):
        StereoAugmentation((0, 5))
    with pytest.raises(ValueError, match="flip must be a probability"):
        StereoAugmentation(flip=2)
