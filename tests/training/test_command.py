"""The commands do what the recipe and the command line say, and tell what they cannot do in one line."""

import copy
import functools
import json
import re
import resource
import shutil

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

import torch
import yaml
from PIL import Image

from efficient_attention import create_model
from efficient_attention.cli import main
from efficient_attention.data.disparity_files import write_pfm

STEREO = "efficient_attention.data.generated_stereo.GeneratedStereo"
PAIRS = {"size": [32, 64], "max_disparity": 16, "ideal_cameras": True}
RECIPE = {
    "output": "run",
    "model": {
        "class_path": "Stereo",
        "init_args": {
            "network": {
                "name": "psmnet_small",
                "at": ["volume"],
                "options": {"max_disparity": 16, "width": 4},
            },
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.001}},
            "schedule": {"class_path": "Constant"},
        },
    },
    "data": {
        "class_path": "StereoData",
        "init_args": {
            "train": {"class_path": STEREO, "init_args": {**PAIRS, "length": 3}},
            "val": {"class_path": STEREO, "init_args": {**PAIRS, "length": 3, "seed": 1}},
            "test": {"class_path": STEREO, "init_args": {**PAIRS, "length": 3, "seed": 2}},
            "batch_size": 1,
            "workers": 0,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    },
    "checkpoint": {"every_n_steps": 1},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert call("fit", "--output", str(folder / "run"), recipe=folder / "recipe.yaml") == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(trained, tmp_path / "run")


def call(command, *arguments, recipe="recipe.yaml"):
    """The exit code, however it is given."""
    try:
        return main([command, "--config", str(recipe), *arguments])
    except SystemExit as exit_:
        return exit_.code


def history(folder, key):
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config", "nothing.yaml"], ["nothing.yaml"]),
        (["--model.optimizer.lr", "fast"], ["model.optimizer.lr: expected float", "got fast"]),
        (["--model.optimiser.lr", "1"], ["model has no option 'optimiser'", "is 'optimizer'"]),
        (["--model.optimizer.lrr", "1"], ["model.optimizer has no", "is 'lr'", "SGD has"]),
        (["--model.network.atention", "none"], ["model.network has no", "is 'attention'"]),
        (["--model.network.attention", "eficient"], ["model.network.attention", "is 'efficient'"]),
        (["--model.network.options.widht", "4"], ["got 'widht'; the nearest is 'width'"]),
        (["--data.train.lenght", "4"], ["data.train has no", "'length'; GeneratedStereo has"]),
        (["--data.train", "efficient_attention.data.coco.CocoInstance"], ["is 'CocoInstances'"]),
        (["--model.schedule", "Cosin"], ["['Constant', 'Cosine', 'Steps']", "is 'Cosine'"]),
        (["--trainer.max_epoch", "1"], ["trainer has no option 'max_epoch'", "is 'max_epochs'"]),
        (["--trainer.precision", "bf16-mixd"], ["trainer.precision", "is 'bf16-mixed'"]),
        (["--outptu", "x"], ["the command has no option 'outptu'", "is 'output'"]),
        (["--model.optimizer.lr", "-1"], ["lr must be positive; got -1"]),
        (["--model.network.name", "psmnt"], ["name must be one of", "psmnet", "got 'psmnt'"]),
        (["--model.network.at", "[attic]"], ["at must be among", "volume", "attic"]),
        (["--model.network.pretrained", "x"], ["either a name or pretrained"]),
        (["--model.network.weights", "gone.pth"], ["checkpoint must be a file; got gone.pth"]),
        (["--model.ema_decay", "2"], ["ema_decay must be between 0 and 1; got 2"]),
        (["--model.max_disparity", "-3"], ["max_disparity must be positive"]),
        (["--data.batch_size", "0"], ["batch_size must be at least 1; got 0"]),
        (["--data.train.length", "0"], ["data.train", "length must be positive"]),
        (["--data.train", "null"], ["data.train must be given for this command"]),
        (["--trainer.devices", "0"], ["devices"]),
        (["--checkpoint.every_n_steps", "-1"], ["every_n_steps must not be negative"]),
        (["--ckpt_path", "gone.ckpt"], ["ckpt_path must be a file; got gone.ckpt"]),
        (["--ckpt_path", "recipe.yaml"], ["ckpt_path must be a whole checkpoint", "bytes)"]),
        (["--output", "recipe.yaml/run"], ["output must be a folder with room", "Not a dir"]),
        (["--colour", "red"], ["the command has no option 'colour'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_user_errors_are_one_line_and_code_2(arguments, parts, capsys, tmp_path):
    assert call("fit", *arguments) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert line.startswith("efficient-attention fit: error: ")
    assert [part for part in parts if part not in line] == []
    assert "Traceback" not in err
    # The same command, put right, does not find a run in its place.
    assert not any((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("output", "outptu"),
        ("checkpoint.every_n_steps", "every_n_step"),
        ("trainer.max_epochs", "max_epoch"),
        ("model.class_path", "clas_path"),
        ("model.init_args.optimizer", "optimiser"),
        ("model.init_args.network.options", "option"),
        ("model.init_args.optimizer.init_args.lr", "lrr"),
        ("data.init_args.train", "trian"),
        ("data.init_args.train.init_args.length", "lenght"),
    ],
)
def test_a_key_that_is_misspelt_in_a_recipe_is_told_with_the_nearest(path, wrong, tmp_path, capsys):
    recipe = copy.deepcopy(RECIPE)
    *around, right = path.split(".")
    node = functools.reduce(dict.__getitem__, around, recipe)
    node[wrong] = node.pop(right)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert call("fit") == 2
    err = capsys.readouterr().err
    assert f"'{wrong}'; the nearest is '{right}'" in err
    assert err.count("\n") == 1


def test_a_command_without_a_recipe_says_what_is_missing(capsys):
    assert main(["fit"]) == 2
    assert "--config recipes/" in capsys.readouterr().err


def test_a_class_that_the_network_has_no_number_for_is_an_error(tmp_path, capsys):
    cues = "efficient_attention.data.generated_cues.GeneratedCues"
    train = {"class_path": cues, "init_args": {"length": 4, "size": [48, 48]}}
    model = {**RECIPE["model"]["init_args"], "network": {"name": "resnet_small"}}
    model["network"]["options"] = {"num_classes": 5}
    recipe = {
        **RECIPE,
        "model": {"class_path": "Classification", "init_args": model},
        "data": {"class_path": "ClassificationData", "init_args": {"train": train, "workers": 0}},
    }
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    assert call("fit", recipe="other.yaml") == 2
    assert "num_classes must be at least 6 for data.train; got 5" in capsys.readouterr().err
    assert not any((tmp_path / "run").glob("*"))


@pytest.fixture
def pairs(tmp_path):
    """Three pairs in files, and a recipe for them; of the last the left image ends well, but is damaged inside."""
    for name in ("a", "b", "c"):
        for side in ("left", "right"):
            (tmp_path / side).mkdir(exist_ok=True)
            pixels = torch.randint(256, (32, 64, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / side / f"{name}.png")
        write_pfm(tmp_path / f"{name}.pfm", torch.full((32, 64), 2.0))
    path = tmp_path / "left" / "c.png"
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(50) + data[1050:])
    files = {"left_pattern": "left/*.png", "right_pattern": "right/*.png"}
    folder = {
        "class_path": "efficient_attention.data.stereo.StereoFolder",
        "init_args": {**files, "disparity_pattern": "*.pfm"},
    }
    recipe = copy.deepcopy(RECIPE)
    recipe["data"]["init_args"].update({"train": folder, "val": folder, "test": folder})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_file_that_proves_damaged_on_the_way_is_told_in_one_line(command, workers, pairs, capsys):
    network = create_model("psmnet_small", "efficient", at=["volume"], max_disparity=16, width=4)
    torch.save(network.state_dict(), "weights.pth")
    weights = ["--model.network.weights", "weights.pth", "--data.workers", workers]
    assert call(command, *weights) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert line.startswith(f"efficient-attention {command}: error: left/c.png (")
    assert "Traceback" not in err


def test_data_that_cannot_be_used_leaves_the_folder_free(pairs, capsys):
    (pairs / "b.pfm").write_bytes(b"Pf")
    for command in ("fit", "fit"):
        assert call(command) == 2
        told = "data.train cannot be used: 1 of 3 pairs cannot be used; the first: b.pfm must begin"
        assert told in capsys.readouterr().err
        assert not any((pairs / "run").glob("*"))


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_data_are_named_as_in_the_recipe(stage, pairs, capsys):
    (pairs / "b.pfm").write_bytes(b"Pf")
    network = create_model("psmnet_small", "efficient", at=["volume"], max_disparity=16, width=4)
    torch.save(network.state_dict(), "weights.pth")
    assert call(stage, "--model.network.weights", "weights.pth") == 2
    assert f"error: data.{stage} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("form", [["{}", "null"], ["{}=null"]], ids=["apart", "together"])
@pytest.mark.parametrize("option", ["model.network.at", "data.test", "model.max_disparity"])
def test_null_is_nothing_on_the_command_line_too(option, form, capsys):
    assert call("fit", *(part.format(f"--{option}") for part in form), "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    first, *rest = option.split(".")
    found = printed[first]["init_args"]
    for part in rest:
        found = found[part]
    assert found is None


def test_the_configuration_is_printed_with_what_the_command_line_changed(capsys):
    assert call("fit", "--model.network.at", "[]", "--seed", "3", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["network"]["at"] == []
    assert printed["seed"] == 3
    assert printed["checkpoint"]["every_n_steps"] == 1


def test_a_run_leaves_its_recipe_history_checkpoints_and_network(trained):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "history.jsonl",
        "network",
    }
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert history(trained, "train/loss") != []
    assert history(trained, "event") == ["start"]
    configuration = yaml.safe_load((trained / "config.yaml").read_text())
    assert configuration["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001


def test_options_of_the_command_line_beat_those_of_the_checkpoint(run):
    changed = ["--model.optimizer.lr", "0.5", "--model.optimizer.momentum", "0.25"]
    assert call("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", *changed) == 0
    assert history(run, "train/lr") == pytest.approx([0.001] * 3 + [0.5] * 3)
    (state,) = torch.load(run / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert state["param_groups"][0]["momentum"] == 0.25
    assert (run / "config-2.yaml").exists()
    assert history(run, "event") == ["start", "start"]


def test_a_run_is_not_overwritten(run, capsys):
    before = (run / "history.jsonl").read_text()
    assert call("fit") == 2
    assert "output must be a new folder; run holds a run. Add --ckpt_path last" in (
        capsys.readouterr().err
    )
    assert (run / "history.jsonl").read_text() == before


def test_the_last_of_no_checkpoints_is_the_beginning(tmp_path):
    """Also of a run that was killed before it had one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").write_text('{"event": "start"}\n')
    assert call("fit", "--ckpt_path", "last", "--trainer.limit_train_batches", "1") == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert call("fit") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert "run/checkpoints/last.ckpt cannot be written: File too large" in err
    assert "Traceback" not in err


def test_the_best_of_no_checkpoints_is_an_error(capsys):
    assert call("validate", "--ckpt_path", "best") == 2
    assert "ckpt_path must be a file; got run/checkpoints/best.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_network_without_weights_is_not_evaluated(command, capsys):
    assert call(command) == 2
    assert "ckpt_path must be best, last or a file" in capsys.readouterr().err


def test_help_is_that_of_the_command(capsys):
    assert call("fit", "--help") == 0
    out = capsys.readouterr().out
    assert "--model CONFIG" in out
    assert "--checkpoint.every_n_steps" in out


def test_a_truncated_checkpoint_is_named_with_its_size(run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    assert call("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 2
    assert "run/checkpoints/last.ckpt (5000 bytes) cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.network.options.width", "8"], "ckpt_path must hold weights of this network"),
        (["--model.network.at", "[]"], "ckpt_path must hold weights of this network"),
        (["--model.optimizer", "Adam"], "model.optimizer must be the checkpoint's, SGD"),
        (["--model.optimizer.decay_vectors", "false"], "must have groups of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_checkpoint_of_something_else_is_an_error(arguments, message, run, capsys):
    assert call("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", *arguments) == 2
    assert message in capsys.readouterr().err


def test_what_the_weights_do_not_show_is_told(run, caplog):
    assert call("validate", "--ckpt_path", "last", "--model.network.attention", "non_local") == 0
    assert "The network of the checkpoint has attention='efficient'; here 'non_local' counts" in (
        caplog.text
    )


def test_first_weights_are_not_needed_by_a_run_that_goes_on(run):
    weights = ["--model.network.weights", "gone.pth", "--model.network.weights_prefix", "x"]
    assert call("validate", "--ckpt_path", "last", *weights) == 0


def test_validation_finds_what_training_found_and_says_how_it_counts(run):
    assert call("validate", "--ckpt_path", "last") == 0
    (line,) = map(json.loads, (run / "validate.jsonl").read_text().splitlines())
    assert line["end_point_error"] == pytest.approx(history(run, "val/end_point_error")[-1])
    assert line["protocol"] == "0 < d < 16 px, occluded pixels in, mean over pixels"
    assert line["from"] == "run/checkpoints/last.ckpt"
    assert line["torch"] == torch.__version__


def test_the_best_network_is_what_a_recipe_can_begin_with(run):
    recipe = {**RECIPE, "model": {**RECIPE["model"]}}
    arguments = {**RECIPE["model"]["init_args"], "network": {"pretrained": "run/network"}}
    recipe["model"] = {"class_path": "Stereo", "init_args": arguments}
    (run.parent / "again.yaml").write_text(yaml.safe_dump(recipe))
    assert call("validate", recipe="again.yaml") == 0
    (line,) = map(json.loads, (run / "validate.jsonl").read_text().splitlines())
    assert line["end_point_error"] == pytest.approx(min(history(run, "val/end_point_error")))


def test_predictions_are_files_and_a_list(run):
    assert call("predict", "--ckpt_path", "last", "--data.eval_batch_size", "2") == 0
    listed = json.loads((run / "predictions" / "predictions.json").read_text())
    assert [record["name"] for record in listed] == [f"generated-2-{i}" for i in range(3)]
    assert all((run / "predictions" / record["file"]).exists() for record in listed)


def test_progress_is_told_in_lines_without_a_terminal(tmp_path, capsys):
    assert call("fit") == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^epoch 0  step \d/3  \S+ s/step  train/loss", out, re.M)) == 3
    assert len(re.findall(r"^epoch 0  val/end_point_error", out, re.M)) == 1


def test_what_is_trained_is_told_first_and_where_it_is_last(tmp_path, capsys):
    summary = ["--trainer.enable_model_summary", "null"]
    assert call("fit", *summary, "--trainer.accumulate_grad_batches", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"network  psmnet_small, efficient attention at volume; 0\.\d\d M parameters", lines[0]
    )
    assert lines[1:4] == [
        "train    GeneratedStereo, 3 samples",
        "val      GeneratedStereo, 3 samples",
        "steps    1 of 3 samples, from 0; 1 x cpu, precision 32-true",
    ]
    assert re.fullmatch(r"output   run; best val/end_point_error \S+", lines[-1])


def test_a_run_that_diverges_ends_and_keeps_the_checkpoint_before(tmp_path, capsys):
    steep = ["--model.optimizer.lr", "1e30", "--data.train.length", "4"]
    assert call("fit", *steep, "--checkpoint.every_n_steps", "0") == 2
    assert "the loss must be a number; it is loss nan" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert call("fit", *steep, "--output", "kept", "--trainer.log_every_n_steps", "100") == 2
    assert "weights must be numbers to be kept; some are not at step" in capsys.readouterr().err
    last = tmp_path / "kept" / "checkpoints" / "last.ckpt"
    assert all(weights.isfinite().all() for weights in torch.load(last)["state_dict"].values())


def test_tensorboard_is_an_option(tmp_path):
    pytest.importorskip("tensorboard")
    assert call("fit", "--tensorboard", "true", "--trainer.limit_train_batches", "1") == 0
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1
