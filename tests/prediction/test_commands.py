"""stereo, detect and classify from the command line: what they leave, what they refuse, and how they go on."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import efficient_attention
from efficient_attention import create_model
from efficient_attention.cli import main
from efficient_attention.data.disparity_files import read_disparity_png, read_pfm, write_pfm
from efficient_attention.prediction import (
    forward,
    predict_disparity,
    predict_objects,
    read_picture,
)
from efficient_attention.prediction.forward import forward_bytes

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

DOCUMENT = Path(__file__).parents[2] / "docs" / "prediction.md"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A small network for each task, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    create_model("psmnet_small", max_disparity=16, width=4).save_pretrained(folder / "stereo")
    detector = {"num_classes": 3, "min_size": 64, "max_size": 96, "box_score_thresh": 0.0}
    detector["box_detections_per_img"] = 4
    create_model("mask_rcnn_small", **detector).save_pretrained(folder / "detect")
    create_model("resnet_small", num_classes=3).save_pretrained(folder / "classify")
    return folder


@pytest.fixture(autouse=True)
def _plans(monkeypatch):
    """Memory is planned once for what is the same in many tests."""
    monkeypatch.setattr(forward, "forward_bytes", planned)


PLANS = {}


def planned(network, inputs, *, dtype, device):
    key = str((network.configuration, [getattr(x, "shape", x) for x in inputs], dtype))
    if key not in PLANS:
        PLANS[key] = forward_bytes(network, inputs, dtype=dtype, device=device)
    return PLANS[key]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to work in, with three pairs of views."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for side in ("left", "right"):
        Path(side).mkdir()
        for name in "abc":
            pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(side, f"{name}.png"))
    return tmp_path


@pytest.fixture
def call(work, networks, capsys):
    """Runs a command with its network; returns the exit code and the lines on both streams."""

    def call(command, *arguments, network=True):
        own = ["--network", str(networks / command)] if network else []
        try:
            code = main([command, *arguments, *own])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_stereo_leaves_disparities(call, networks):
    code, out, err = call("stereo", "left", "right", "-o", "there")
    assert (code, err) == (0, [])
    endings = ("colours.png", "disparity.pfm", "disparity.png")
    assert names("there") == sorted(
        [f"{name}_{ending}" for name in "abc" for ending in endings] + ["stereo.jsonl"]
    )
    network = efficient_attention.models.Network.from_pretrained(networks / "stereo")
    views = (read_picture(f"{side}/b.png") for side in ("left", "right"))
    expected = predict_disparity(network, *views)
    assert torch.equal(read_pfm("there/b_disparity.pfm"), expected)
    stored = read_disparity_png("there/b_disparity.png")
    assert (stored - expected).abs().max() <= 0.5 / 256
    assert Image.open("there/b_colours.png").size[0] > 60
    assert [line.split()[0] for line in out] == ["a", "b", "c", "3"]
    assert out[1].startswith("b  60 x 40, disparities ")
    assert out[3] == "3 of 3 pairs are in there"


def test_stereo_leaves_depths_and_points(call):
    geometry = ["--focal", "100", "--baseline", "0.25"]
    code, out, _ = call("stereo", "left/a.png", "right/a.png", *geometry)
    assert code == 0
    disparity, depth = read_pfm("out/a_disparity.pfm"), read_pfm("out/a_depth.pfm")
    known = torch.arange(60) >= disparity
    torch.testing.assert_close(depth, (25 / disparity).where(known, 0))
    millimetres = read_disparity_png("out/a_depth.png", scale=1)
    assert (millimetres - 1000 * depth).abs().max() <= 0.51
    points = Path("out/a_points.ply").read_bytes()
    assert f"element vertex {int(known.sum())}\n".encode() in points
    _, _, body = points.partition(b"end_header\n")
    assert len(body) == 15 * int(known.sum())
    # The last point has the colour of the last pixel.
    assert list(body[-3:]) == np.array(Image.open("left/a.png"))[-1, -1].tolist()
    assert f"depths {depth[known].min():.2f} to {depth[known].max():.2f} m" in out[0]


def test_stereo_tells_errors_of_pairs_and_of_all(call):
    call("stereo", "left", "right")
    Path("truth").mkdir()
    for name, error in zip("abc", (0.5, 1.5, 2.5), strict=True):
        truth = read_pfm(f"out/{name}_disparity.pfm") + error
        truth[:20] = torch.inf
        write_pfm(f"truth/{name}.pfm", truth)
    code, out, _ = call("stereo", "left", "right", "--truth", "truth")
    assert code == 0
    assert out == [
        "a  end-point error 0.500 px, bad-1 0.00 %, bad-2 0.00 %, bad-3 0.00 %",
        "b  end-point error 1.500 px, bad-1 100.00 %, bad-2 0.00 %, bad-3 0.00 %",
        "c  end-point error 2.500 px, bad-1 100.00 %, bad-2 100.00 %, bad-3 0.00 %",
        "all 3  end-point error 1.500 px, bad-1 66.67 %, bad-2 33.33 %, bad-3 0.00 %",
        "errors over 3,600 pixels: 0 < d, occluded pixels in, mean over pixels",
        "3 of 3 pairs are in out, 3 of them done before",
    ]


def test_stereo_says_what_does_not_fit_its_png(call, networks):
    # 16 px seen at a fiftieth are up to 750 px.
    for side in ("left", "right"):
        Image.effect_noise((1500, 1000), 80).save(f"{side}.png")
    code, out, _ = call("stereo", "left.png", "right.png", "--scale", "0.02")
    assert code == 0
    assert "(no _disparity.png, which holds 256.00 px at most)" in out[0]
    assert names("out") == ["left_colours.png", "left_disparity.pfm", "stereo.jsonl"]


def test_detect_leaves_results_and_pictures(call, networks):
    coco = {
        "categories": [{"id": 7, "name": "nucleus"}, {"id": 9, "name": "cell"}],
        "images": [{"id": 40, "file_name": "b.png"}],
    }
    Path("coco.json").write_text(json.dumps(coco))
    code, out, err = call("detect", "left/*.png", "--classes", "coco.json", "--score", "0")
    assert (code, err) == (0, [])
    results = json.loads(Path("out/results.json").read_text())
    assert [r["image_id"] for r in results] == [41] * 4 + [40] * 4 + [42] * 4
    network = efficient_attention.models.Network.from_pretrained(networks / "detect")
    found = predict_objects(network, read_picture("left/b.png"))
    assert [r["segmentation"] for r in results[4:8]] == found.outlines
    assert [r["score"] for r in results[4:8]] == found.scores.tolist()
    assert {(r["category_id"], r["category"]) for r in results} <= {(7, "nucleus"), (9, "cell")}
    assert names("out") == [*(f"{n}_objects.jpg" for n in "abc"), "detect.jsonl", "results.json"]
    assert Image.open("out/b_objects.jpg").size == (240, 160)
    assert out[0].startswith("left/a.png  4 objects of score 0 or more: ")
    # As pycocotools reads it, in the frame of the picture.
    pycocotools = pytest.importorskip("pycocotools.mask")
    assert pycocotools.decode([r["segmentation"] for r in results]).shape == (40, 60, 12)


def test_detect_follows_the_orientation_of_a_picture(call):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("left/a.png").save("phone.jpg", exif=exif)
    call("detect", "phone.jpg")
    results = json.loads(Path("out/results.json").read_text())
    assert {tuple(r["segmentation"]["size"]) for r in results} == {(60, 40)}


def test_classify_leaves_json_and_csv(call):
    Path("names.txt").write_text("cat\ndog\nowl\n")
    code, out, _ = call("classify", "left", "right/c.png", "--classes", "names.txt", "--top", "2")
    assert code == 0
    found = json.loads(Path("out/classes.json").read_text())
    assert [one["file"] for one in found] == [
        "left/a.png",
        "left/b.png",
        "left/c.png",
        "right/c.png",
    ]
    best, second = found[0]["classes"]
    assert 1 > best["probability"] >= second["probability"] > 0
    assert best["class"] == ("cat", "dog", "owl")[best["label"]]
    with Path("out/classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert rows[0]["class"] == best["class"]
    assert float(rows[0]["probability"]) == best["probability"]
    assert out[0] == f"left/a.png  {best['class']}  {100 * best['probability']:.1f} %"


@pytest.mark.parametrize("command", ["stereo", "detect", "classify"])
def test_what_is_done_is_skipped(call, command):
    arguments = ["left", "right"]
    call(command, *arguments)
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    code, out, _ = call(command, *arguments)
    assert (code, len(out)) == (0, 1)
    total = 3 if command == "stereo" else 6
    assert out[0].endswith(f"are in out, {total} of them done before")
    lists = {"results.json", "classes.json", "classes.csv"}
    assert {p.name for p, t in before.items() if p.stat().st_mtime_ns != t} <= lists
    # One picture changes, and is done again alone.
    shutil.copy("left/a.png", "left/b.png")
    code, out, _ = call(command, *arguments)
    assert len(out) == 2
    assert out[1].endswith(f"{total - 1} of them done before")
    assert (
        call(command, *arguments, "--overwrite")[1] == call(command, *arguments, "--overwrite")[1]
    )
    assert len(call(command, *arguments, "--dtype", "bfloat16")[1]) == total + 1


@pytest.mark.parametrize("command", ["stereo", "detect", "classify"])
def test_damaged_picture_among_many_is_named_at_the_end_with_code_1(call, command):
    whole = Path("left/b.png").read_bytes()
    Path("left/b.png").write_bytes(whole[:-3000])
    arguments = ["left", "right"] if command == "stereo" else ["left"]
    code, out, err = call(command, *arguments)
    assert code == 1
    assert out[-1].startswith("2 of 3 ")
    (line,) = err
    assert line.startswith(
        f"efficient-attention {command}: error: a picture must be sound; got 'left/b.png'"
    )
    assert not any(name.startswith(("b_", ".")) for name in names("out"))
    # Once it is sound, the rest is not done again.
    Path("left/b.png").write_bytes(whole)
    code, out, _ = call(command, *arguments)
    assert code == 0
    assert out[-1].endswith("2 of them done before")


BAD = [
    (["stereo", "left", "none"], "got 'none': no such file or folder"),
    (["stereo", "left", "right/a.png"], "RIGHT must be as many files as LEFT, 3; got 1"),
    (["stereo", "left/a.png", "right/*"], "RIGHT must be as many files as LEFT, 1; got 3"),
    (["stereo", "left/a.png", "small.png"], "one size; got 'left/a.png' of 60 x 40 and 'small.png' of 5 x 4"),
    (["stereo", "left/a.png", "text.png"], "format that Pillow reads; got 'text.png'"),
    (["stereo", "left/a.png", "cut.png"], "a picture must be sound; got 'cut.png'"),
    (["stereo", "left/a.png", "turned.jpg"], "without an orientation tag"),
    (["stereo", "left/a.png", "empty"], "'empty' must hold files that end in"),
    (["stereo", "left/a.png", "right/a.png", "--scale", "2"], "must be a number from 0.01 to 1; got '2'"),
    (["stereo", "left/a.png", "right/a.png", "--focal", "9"], "both --focal and --baseline; got --focal"),
    (["stereo", "left/a.png", "right/a.png", "--focal", "-9"], "argument --focal: must be a number"),
    (["stereo", "left/a.png", "right/a.png", "--calibration", "text.png"], "must have cam0=[...]"),
    (["stereo", "left/a.png", "right/a.png", "--calibration", "calib.txt"], "one of 30 x 20 for"),
    (["stereo", "left/a.png", "right/a.png", "--calibration", "calib.txt", "--cx", "1"], "got both, --cx"),
    (["stereo", "left/a.png", "right/a.png", "--truth", "left"], "--truth must be as many files"),
    (["stereo", "left/a.png", "right/a.png", "--truth", "text.png"], "--truth must be a true disparity"),
    (["stereo", "left/a.png", "right/a.png", "--truth", "small.pfm"], "size of its views; got 'small.pfm'"),
    (["stereo", "left/a.png", "right/a.png", "--truth", "zero.pfm"], "must have known pixels; got 'zero"),
    (["stereo", "left/a.png", "right/a.png", "--truth-scale", "2"], "must come with --truth"),
    (["stereo", "left/a.png", "right/a.png", "-o", "left"], "another folder than that of the pictures"),
    (["stereo", "left/a.png", "right/a.png", "-o", "text.png"], "a folder that can be written"),
    (["stereo", "left/a.png", "right/a.png", "--model", "psmnet"], "one network must be named"),
    (["stereo", "left/a.png", "right/a.png", "--device", "cuda:77"], "--device must be one that is there"),
    (["detect", "text.png"], "format that Pillow reads; got 'text.png'"),
    (["detect", "left", "nothing*"], "got 'nothing*', which matches none"),
    (["detect", "cut.png"], "a picture must be sound; got 'cut.png'"),
    (["detect", "left", "--classes", "one.txt"], "must name the network's 2 classes; 'one.txt' has 1"),
    (["classify", "left", "--classes", "one.txt"], "must name the network's 3 classes; 'one.txt' has 1"),
    (["classify", "left", "--options", "{"], "must be options in JSON"),
    (["classify", "left", "--top", "0"], "must be a whole number from 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=lambda x: " ".join(x)[-60:])
def test_what_cannot_be_is_told_in_one_line_with_code_2(call, arguments, expected):
    Image.new("RGB", (5, 4)).save("small.png")
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(Path("left/a.png").read_bytes()[:-3000])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("left/a.png").save("turned.jpg", exif=exif)
    Path("empty").mkdir()
    Path("calib.txt").write_text("cam0=[9 0 1; 0 9 1; 0 0 1]\nbaseline=9\nwidth=30\nheight=20")
    write_pfm("small.pfm", torch.ones(4, 5))
    write_pfm("zero.pfm", torch.zeros(40, 60))
    Path("one.txt").write_text("one\n")
    code, _, err = call(*arguments)
    assert code == 2
    assert len(err) == 1, err
    assert err[0].startswith(f"efficient-attention {arguments[0]}: error: ")
    assert expected in err[0]
    # Nothing is half written.
    if Path("out").exists():
        assert not any(name.startswith(".") for name in names("out"))
        assert names("out") == []


def test_views_too_large_for_memory_are_refused_with_the_way_out(call, monkeypatch):
    monkeypatch.setattr("efficient_attention.prediction.forward.available_bytes", lambda _: 10**7)
    Image.new("L", (600, 400)).save("large.png")
    code, _, err = call("stereo", "large.png", "large.png")
    assert code == 2
    assert "a pair of 600 x 400 pixels takes 0." in err[0]
    way_out = err[0].partition("take --scale ")[2].split()[0]
    assert call("stereo", "large.png", "large.png", "--scale", way_out)[0] == 0


def test_stereo_without_a_network_says_what_it_needs(call, monkeypatch):
    monkeypatch.setattr("efficient_attention.prediction.networks.shipped_network", lambda _: None)
    code, _, err = call("stereo", "left", "right", network=False)
    assert code == 2
    assert "stereo needs a network: --network FOLDER" in err[0]


@pytest.mark.skipif(not DOCUMENT.exists(), reason="not a checkout")
def test_the_example_of_the_documentation_runs(work, networks):
    for side in ("left", "right"):
        shutil.copy(f"{side}/a.png", f"{side}.png")
    shutil.copytree(networks / "stereo", "runs/psmnet/network")
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    scope = {}
    exec(example, scope)
    assert scope["disparity"].shape == (40, 60)
    assert Path("points.ply").stat().st_size > 15 * scope["known"].sum() > 0


def test_missing_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("stereo", "left/a.png", "right/a.png")
    assert code == 2
    assert "pip install 'efficient-attention[plot]'" in err[0]
    assert not any(name.endswith((".png", ".jsonl")) for name in names("out"))


def test_commands_need_the_extras_models_and_plot_alone(work, networks):
    """In a process of its own, without what only the extra train brings."""
    code = (
        "import sys\n"
        "for name in ('pycocotools', 'pytorch_lightning', 'lightning_fabric', 'jsonargparse', 'rich', 'tensorboard',\n"
        "             'faster_coco_eval'):\n"
        "    sys.modules[name] = None\n"
        "from efficient_attention.cli import main\n"
        "sides = ['left/a.png', 'right/a.png']\n"
        "for command in ('stereo', 'detect', 'classify'):\n"
        "    own = ['--score', '0'] if command == 'detect' else []\n"
        "    network = f'{sys.argv[1]}/{command}'\n"
        "    assert main([command, *sides, '--network', network, *own]) == 0\n"
    )
    path = str(Path(efficient_attention.__path__[0]).parent)
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(networks)]
    subprocess.run(command, check=True, env=environment, capture_output=True)


def test_help_loads_nothing_but_the_parser():
    code = (
        "import sys\n"
        "from efficient_attention.cli import main\n"
        "for command in ('stereo', 'detect', 'classify'):\n"
        "    try:\n"
        "        main([command, '--help'])\n"
        "    except SystemExit as exit_:\n"
        "        assert exit_.code == 0\n"
        "heavy = {'torchvision', 'PIL', 'numpy', 'matplotlib', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "ours = [name for name in sys.modules if name.startswith('efficient_attention.prediction')]\n"
        "assert sorted(ours) == ['efficient_attention.prediction', 'efficient_attention.prediction.arguments'], ours\n"
        "assert heavy <= {'numpy'}, heavy\n"
    )
    path = str(Path(efficient_attention.__path__[0]).parent)
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: efficient-attention") == 3
