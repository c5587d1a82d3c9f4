"""Data sets of stereo files, on small trees of the published layouts."""

import doctest
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from efficient_attention.data import disparity_files, images, stereo, stereo_transforms
from efficient_attention.data.disparity_files import write_disparity_png, write_pfm
from efficient_attention.data.draws import Draw
from efficient_attention.data.stereo import StereoFolder, StereoPairs
from efficient_attention.data.stereo_benchmarks import (
    Kitti2012,
    Kitti2015,
    Middlebury2014,
    SceneFlow,
)
from efficient_attention.errors import InputError

SIZE = (4, 6)
DATA = os.environ.get("EFFICIENT_ATTENTION_DATA")


def put_image(path, gray=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (gray, gray, gray)).save(path)


def put_disparity(path, disparity, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    write = write_pfm if path.suffix == ".pfm" else write_disparity_png
    write(path, torch.full(size, float(disparity)))


@pytest.fixture
def folder(tmp_path):
    """Pairs a, b and c; left images hold 1, 2, 3 of 255, right ones 11, 12, 13, and disparities 3, 4, 5."""
    for i, name in enumerate("abc", start=1):
        put_image(tmp_path / "left" / f"{name}.png", i)
        put_image(tmp_path / "right" / f"{name}.png", 10 + i)
        put_disparity(tmp_path / "truth" / f"{name}.pfm", 2 + i)
    return tmp_path


def patterns(folder):
    return folder / "left/*.png", folder / "right/*.png", folder / "truth/*.pfm"


def scene_flow(root, layout):
    """One pair of every part; the left image tells which, and so does the disparity."""
    flying, monkaa, driving = {
        "one folder a subset": ("FlyingThings3D/", "Monkaa/", "Driving/"),
        "as PSMNet": ("", "monkaa_", "driving_"),
    }[layout]
    truth = "frames_disparity" if layout == "as PSMNet" else "disparity"
    parts = {
        f"{flying}%s/TRAIN/A/0000/%s/0006": truth,
        f"{flying}%s/TRAIN/B/0000/%s/0006": truth,
        f"{flying}%s/TEST/A/0000/%s/0006": truth,
        f"{monkaa}%s/funnyworld_x2/%s/0048": "disparity",
        f"{driving}%s/15mm_focallength/scene_forwards/fast/%s/0001": "disparity",
    }
    for i, (path, of_disparity) in enumerate(parts.items(), start=1):
        for render, gray in (("frames_cleanpass", i), ("frames_finalpass", 100 + i)):
            put_image(root / (path % (render, "left") + ".png"), gray)
            put_image(root / (path % (render, "right") + ".png"), gray + 50)
        put_disparity(root / (path % (of_disparity, "left") + ".pfm"), -i)


def gray(image):
    return (image * 255).round().unique().tolist()


def test_pairs_belong_together(folder):
    pairs = StereoFolder(*patterns(folder))
    assert [sample["name"] for sample in pairs] == ["a", "b", "c"]
    for i, sample in enumerate(pairs, start=1):
        assert gray(sample["left"]) == [i]
        assert gray(sample["right"]) == [10 + i]
        assert sample["disparity"].unique().tolist() == [2 + i]


def test_samples_have_the_documented_types(folder):
    sample = StereoFolder(*patterns(folder))[0]
    assert list(sample) == ["left", "right", "name", "disparity", "valid"]
    assert sample["left"].shape == sample["right"].shape == (3, *SIZE)
    assert sample["disparity"].shape == sample["valid"].shape == SIZE
    assert {sample[x].dtype for x in ("left", "right", "disparity")} == {torch.float32}
    assert sample["valid"].dtype == torch.bool


def test_samples_are_batched_by_ordinary_loaders(folder):
    (batch,) = DataLoader(StereoFolder(*patterns(folder)), batch_size=3)
    assert batch["left"].shape == (3, 3, *SIZE)
    assert batch["disparity"].shape == batch["valid"].shape == (3, *SIZE)
    assert batch["name"] == ["a", "b", "c"]


def test_pairs_without_truth_claim_none(folder):
    sample = StereoFolder(*patterns(folder)[:2])[1]
    assert list(sample) == ["left", "right", "name"]


def test_disparities_are_valid_where_they_are_finite_and_positive(folder):
    unknown = [0, -1, torch.inf, -torch.inf, torch.nan]
    truth = torch.tensor([[*unknown, 0.25]] * SIZE[0])
    write_pfm(folder / "truth/a.pfm", truth)
    sample = StereoFolder(*patterns(folder))[0]
    assert sample["valid"][0].tolist() == [False] * 5 + [True]
    assert sample["disparity"][0].tolist() == [0] * 5 + [0.25]
    sample = StereoFolder(*patterns(folder), absolute=True)[0]
    assert sample["disparity"][0].tolist() == [0, 1, 0, 0, 0, 0.25]
    sample = StereoFolder(*patterns(folder), disparity_scale=4)[1]
    assert sample["disparity"].unique().tolist() == [1]


def test_several_wildcards_mean_the_same_in_every_pattern(tmp_path):
    for scene in ("x", "y"):
        for frame in ("1", "2"):
            put_image(tmp_path / scene / "left" / f"{frame}.png", int(frame))
            put_image(tmp_path / scene / "right" / f"{frame}.png", 10 + int(frame))
    pairs = StereoFolder(tmp_path / "*/left/*.png", tmp_path / "*/right/*.png")
    assert [file.name for file in pairs.files] == ["x/1", "x/2", "y/1", "y/2"]
    assert gray(pairs[1]["right"]) == [12]


def test_other_signs_in_folders_are_no_wildcards(tmp_path):
    folder = tmp_path / "set [1] (+?)"
    put_image(folder / "a_left.png")
    put_image(folder / "a_right.png")
    put_image(tmp_path / "set 1 (+)" / "b_left.png")
    pairs = StereoFolder(folder / "*_left.png", folder / "*_right.png")
    assert [file.name for file in pairs.files] == ["a"]


def test_hidden_files_are_passed_over(folder):
    (folder / "left/._a.png").write_bytes(b"of an archiver")
    assert len(StereoFolder(*patterns(folder))) == 3


def test_a_missing_partner_is_named(folder):
    (folder / "right/b.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 left images have no right image; .*right/b.png"
    ):
        StereoFolder(*patterns(folder))
    put_image(folder / "right/b.png")
    (folder / "truth/c.pfm").rename(folder / "truth/d.pfm")
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 left images have no disparity; .*truth/c.pfm"
    ):
        StereoFolder(*patterns(folder))
    put_disparity(folder / "truth/c.pfm", 1)
    with pytest.raises(ValueError, match=r"1 disparity files have no left image; .*left/d.png"):
        StereoFolder(*patterns(folder))


def test_patterns_that_match_nothing_or_not_alike_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no left image .*missing"):
        StereoFolder(folder / "missing/*.png", folder / "right/*.png")
    with pytest.raises(ValueError, match=r"patterns must have the same number of \*"):
        StereoFolder(folder / "left/*.png", folder / "right/a.png")


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("left/b.png", lambda p: p.write_bytes(p.read_bytes()[:50]), "b.png .50 bytes. must be a"),
        ("left/b.png", lambda p: p.write_bytes(b""), "left/b.png .0 bytes. must be a picture"),
        ("right/b.png", lambda p: put_image(p, size=(4, 7)), "6 x 4; got 7 x 4"),
        (
            "right/b.png",
            lambda p: Image.new("I;16", (6, 4)).save(p),
            "8 bits a channel; got mode I",
        ),
        ("truth/b.pfm", lambda p: put_disparity(p, 1, size=(5, 6)), "left/b.png, 6 x 4; got 6 x 5"),
        ("truth/b.pfm", lambda p: p.write_bytes(p.read_bytes()[:-1]), "b.pfm must hold 96 bytes"),
        (
            "truth/b.pfm",
            lambda p: write_pfm(p, torch.ones(3, *SIZE)),
            r"\[H, W\]; got .* \(3, 4, 6\)",
        ),
    ],
)
def test_what_heads_of_files_show_is_told_before_the_first_sample(folder, file, make, message):
    make(folder / file)
    with pytest.raises(InputError, match=f"^1 of 3 pairs cannot be used; the first: .*{message}"):
        StereoFolder(*patterns(folder))


def test_files_that_are_missing_are_told_before_the_first_sample(folder):
    files = StereoFolder(*patterns(folder)).files
    for file in ("truth/c.pfm", "right/c.png"):
        (folder / file).unlink()
        with pytest.raises(InputError, match=f"1 of 3 pairs .*No such file .*{file}"):
            StereoPairs(files)


def test_damage_inside_of_a_file_is_told_when_it_is_met(folder):
    pairs = StereoFolder(*patterns(folder))
    put_image(folder / "right/b.png", size=(4, 7))
    with pytest.raises(InputError, match=r"right/b.png must have the size of .*; got 7 x 4"):
        pairs[1]
    put_disparity(folder / "truth/a.pfm", 1, size=(5, 6))
    with pytest.raises(InputError, match=r"truth/a.pfm must have the size of .*; got 6 x 5"):
        pairs[0]
    (folder / "left/c.png").unlink()
    with pytest.raises(InputError, match=r"pair c can no longer be read: .*left/c.png"):
        pairs[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-3.0, -4.0, -0.5], "of 24 there are 24 negative, 0 zero .*; absolute=True takes them"),
        (
            [-3.0, 0.0, torch.nan],
            "of 24 there are 8 negative, 8 zero and the others not finite; abs",
        ),
        ([torch.nan, torch.inf, -torch.inf], "of 24 there are 8 negative"),
        ([torch.nan], "0 negative, 0 zero and the others not finite$"),
        ([0.0], "0 negative, 24 zero and the others not finite$"),
    ],
)
def test_a_truth_in_which_nothing_is_known_is_told(folder, values, message):
    write_pfm(folder / "truth/a.pfm", torch.tensor(values).repeat(24 // len(values)).view(SIZE))
    with pytest.raises(InputError, match=f"truth/a.pfm must hold disparities that .*{message}"):
        StereoFolder(*patterns(folder))


def test_numbers_in_another_byte_order_are_no_disparities(folder):
    path = folder / "truth/b.pfm"
    pairs = StereoFolder(*patterns(folder))
    write_pfm(path, 6 * torch.rand(SIZE))
    path.write_bytes(path.read_bytes().replace(b"\n-1.0\n", b"\n1.0\n"))
    with pytest.raises(InputError, match=r"b.pfm must hold disparities .* an image 6 wide; got"):
        pairs[1]


def test_disparities_of_another_scale_exceed_the_image(folder):
    for name in "abc":
        write_disparity_png(folder / f"truth/{name}.png", torch.rand(SIZE) + 1)
    paths = *patterns(folder)[:2], folder / "truth/*.png"
    assert len(StereoFolder(*paths)) == 3
    with pytest.raises(InputError, match=r"a.png must hold .*; got \d+ for one and 24 such of 24"):
        StereoFolder(*paths, disparity_scale=1)
    with pytest.raises(ValueError, match="disparity_scale must be positive; got 0"):
        StereoFolder(*paths, disparity_scale=0)


def test_a_few_disparities_may_exceed_the_image(folder):
    # Things that nearly touch the camera.
    truth = torch.full(SIZE, 3.0)
    truth[:2] = 100
    write_pfm(folder / "truth/a.pfm", truth)
    assert StereoFolder(*patterns(folder))[0]["valid"].all()


def test_transforms_take_their_random_numbers_from_the_draw(folder):
    def transform(sample, generator):
        return sample | {"name": str(torch.rand((), generator=generator).item())}

    pairs = StereoFolder(*patterns(folder), transform=transform)
    torch.manual_seed(1)
    names = [pairs[key]["name"] for key in (Draw(0, 5), Draw(0, 6), Draw(1, 5), 0)]
    assert len(set(names)) == 4
    torch.manual_seed(2)
    assert pairs[Draw(0, 5)]["name"] == names[0]


@pytest.mark.parametrize("layout", ["one folder a subset", "as PSMNet"])
def test_scene_flow_is_split_as_it_is_published(tmp_path, layout):
    scene_flow(tmp_path, layout)
    train = SceneFlow(tmp_path)
    assert [file.name for file in train.files] == [
        "FlyingThings3D/TRAIN/A/0000/0006",
        "FlyingThings3D/TRAIN/B/0000/0006",
        "Monkaa/funnyworld_x2/0048",
        "Driving/15mm_focallength/scene_forwards/fast/0001",
    ]
    for sample, i in zip(train, (1, 2, 4, 5), strict=True):
        assert gray(sample["left"]) == [i]
        assert gray(sample["right"]) == [i + 50]
        # Stored with the sign turned, as in one release.
        assert sample["disparity"].unique().tolist() == [i]
        assert sample["valid"].all()
    test = SceneFlow(tmp_path, "test")
    assert [gray(sample["left"]) for sample in test] == [[3]]
    final = SceneFlow(tmp_path, pass_name="final", subsets=("Monkaa",))
    assert [gray(sample["left"]) for sample in final] == [[104]]


def test_scene_flow_shows_the_folders_it_expects(tmp_path):
    scene_flow(tmp_path, "as PSMNet")
    with pytest.raises(FileNotFoundError) as caught:
        SceneFlow(tmp_path / "elsewhere")
    message = str(caught.value)
    assert "elsewhere/FlyingThings3D/disparity/TRAIN/*/*/left/*.pfm" in message
    assert "elsewhere/frames_disparity/TRAIN/*/*/left/*.pfm" in message
    with pytest.raises(ValueError, match="subsets must name one that has a test part"):
        SceneFlow(tmp_path, "test", subsets=("Monkaa",))
    with pytest.raises(ValueError, match=r"subsets must be among .*; got 'Sintel'"):
        SceneFlow(tmp_path, subsets=("Sintel",))
    with pytest.raises(ValueError, match=r"pass_name must be among .*; got 'cleanpass'"):
        SceneFlow(tmp_path, pass_name="cleanpass")


def kitti(root, left, right, truths):
    for frame in ("000000", "000001"):
        number = int(frame)
        for split in ("training", "testing"):
            for time in ("10", "11"):
                put_image(root / split / left / f"{frame}_{time}.png", number * 2 + int(time))
                put_image(root / split / right / f"{frame}_{time}.png", 50 + number)
        for i, truth in enumerate(truths):
            path = root / "training" / truth / f"{frame}_10.png"
            put_disparity(path, 0)
            disparity = torch.zeros(SIZE)
            disparity[0, : 2 - i] = number + 1.5
            write_disparity_png(path, disparity)


@pytest.mark.parametrize("year", [2012, 2015])
def test_kitti_has_the_truth_of_its_own_frame(tmp_path, year):
    names = {
        2012: ("colored_0", "colored_1", ("disp_occ", "disp_noc")),
        2015: ("image_2", "image_3", ("disp_occ_0", "disp_noc_0")),
    }
    kitti(tmp_path, *names[year])
    dataset = {2012: Kitti2012, 2015: Kitti2015}[year]
    train = dataset(tmp_path)
    assert len(train) == 2
    for i, sample in enumerate(train):
        assert gray(sample["left"]) == [2 * i + 10]
        assert gray(sample["right"]) == [50 + i]
        assert sample["disparity"][sample["valid"]].tolist() == [i + 1.5] * 2
    visible = dataset(tmp_path, occluded=False)[0]
    assert visible["valid"].sum() == 1
    test = dataset(tmp_path, "test")
    assert len(test) == 2
    assert "disparity" not in test[0]
    with pytest.raises(ValueError, match=r"split must be among \('train', 'test'\); got 'val'"):
        dataset(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=f"expected:\n  .*training/{names[year][0]}"):
        dataset(tmp_path / "training")


def test_middlebury_has_both_calibrations(tmp_path):
    for scene, number in (("Piano-perfect", 1), ("Piano-imperfect", 2), ("Pipes-perfect", 3)):
        put_image(tmp_path / scene / "im0.png", number)
        put_image(tmp_path / scene / "im1.png")
        put_disparity(tmp_path / scene / "disp0.pfm", 2)
    write_pfm(tmp_path / "Pipes-perfect/disp0.pfm", torch.tensor([[2.0] + [torch.inf] * 5] * 4))
    perfect = Middlebury2014(tmp_path)
    assert [sample["name"] for sample in perfect] == ["Piano", "Pipes"]
    assert [int(sample["valid"].sum()) for sample in perfect] == [24, 4]
    assert [gray(sample["left"]) for sample in Middlebury2014(tmp_path, "imperfect")] == [[2]]


@pytest.mark.skipif(DATA is None, reason="EFFICIENT_ATTENTION_DATA names no folder of data")
def test_a_real_pair_agrees_with_its_truth():
    scene = Path(DATA, "stereo", "*_half")
    (sample,) = StereoFolder(scene / "left.png", scene / "right.png", scene / "disparity.npy")
    disparity, valid = sample["disparity"], sample["valid"]
    assert 21 < disparity[valid].min() < disparity[valid].max() < 106
    columns = torch.arange(disparity.shape[1]) - disparity
    seen = valid & (columns >= 0)
    rows = torch.arange(disparity.shape[0])[:, None].expand_as(columns)

    def difference(shift):
        partner = (columns + shift).round().clamp(0, disparity.shape[1] - 1).long()
        warped = sample["right"][:, rows, partner]
        return (warped - sample["left"]).abs().mean(0)[seen].median()

    assert 2 * difference(0) < min(difference(-3), difference(3))


def test_the_pair_of_numpy_disparities_is_read(folder):
    np.save(folder / "truth/a.npy", np.full(SIZE, 3.5))
    paths = [folder / "left/a.png", folder / "right/a.png", folder / "truth/a.npy"]
    (sample,) = StereoFolder(*paths)
    assert sample["name"] == "a"
    assert sample["disparity"].unique().tolist() == [3.5]


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m in (disparity_files, images, stereo, stereo_transforms) for n in m.__all__],
)
def test_examples_print_what_they_say(module, name, tmp_path):
    scope = {"torch": torch, "Path": Path, "folder": str(tmp_path), **vars(module)}
    doc = inspect.getdoc(getattr(module, name)) or ""
    test = doctest.DocTestParser().get_doctest(doc, scope, name, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
