"""Every recipe can be read, and says what the paper says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

import torch
import yaml

from efficient_attention import create_model
from efficient_attention.training.checkpointing import Checkpoints
from efficient_attention.training.command import Command

ROOT = Path(__file__).parent.parent.parent
# Those of experiments say what is compared, of one of these.
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "experiments")
PIECES = []
if RECIPES:
    DOCUMENT = (ROOT / "docs" / "training.md").read_text()
    PIECES = re.findall(r"```yaml\n(# over (\S+)\n.*?)```", DOCUMENT, re.DOTALL)
pytestmark = pytest.mark.skipif(not RECIPES, reason="not a checkout")


class Parsed(Command):
    """Reads a recipe, and stops there or behind the building."""

    build = False

    def instantiate_classes(self):
        if self.build:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand):
        pass


class Built(Parsed):
    build = True


def read(recipe, *arguments, kind=Parsed):
    return kind("fit", ["--config", str(recipe), *arguments])


def options(recipe, *arguments):
    return read(recipe, *arguments).config.fit


def name(recipe):
    return str(recipe.relative_to(ROOT / "recipes").with_suffix(""))


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipes_build(recipe, tmp_path, monkeypatch):
    """On no device: sizes and names are right, and nothing is computed. Weights are not here."""
    monkeypatch.chdir(tmp_path)
    bare = "network.weights", "network.weights_into", "network.ignore"
    without = [
        f"--model.{key}={value}" for key, value in zip(bare, ("null", "", "[]"), strict=True)
    ]
    alone = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.sync_batchnorm=false"]
    with torch.device("meta"):
        command = read(recipe, *without, *alone, kind=Built)
    configuration = command.model.network.configuration
    assert set(configuration["at"]) <= set(command.model.network.places)
    assert command.trainer.max_epochs > 0
    (checkpoints,) = (c for c in command.trainer.callbacks if isinstance(c, Checkpoints))
    assert checkpoints.every_n_steps > 0
    assert Path(options(recipe).output).parts[0] == "runs"


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipes_say_how_they_are_started(recipe):
    assert f"--config recipes/{name(recipe)}.yaml" in recipe.read_text()


@pytest.mark.parametrize(
    ("recipe", "network", "attention", "at"),
    [
        ("mask_rcnn_r50", "mask_rcnn_resnet50_fpn", "efficient", 7),
        ("mask_rcnn_r101", "mask_rcnn_resnet101_fpn", "efficient", 7),
        ("mask_rcnn_x101", "mask_rcnn_resnext101_32x8d_fpn", "efficient", 7),
        ("mask_rcnn_r50_non_local", "mask_rcnn_resnet50_fpn", "non_local", 1),
        ("mask_rcnn_r50_heads", "mask_rcnn_resnet50_fpn", "efficient", 1),
        ("mask_rcnn_r50_normalization", "mask_rcnn_resnet50_fpn", "efficient", 1),
        ("psmnet_scene_flow", "psmnet", "efficient", 1),
        ("resnet50_imagenet", "resnet50", "efficient", 2),
    ],
)
def test_experiments_of_the_paper_have_its_modules(recipe, network, attention, at):
    found = options(ROOT / "recipes" / f"{recipe}.yaml").model.init_args.network
    assert (found.name, found.attention, len(found.at)) == (network, attention, at)


def test_learning_rates_and_batches_are_those_that_the_recipes_cite():
    rcnn = options(ROOT / "recipes" / "mask_rcnn_r50.yaml")
    assert rcnn.model.init_args.optimizer.init_args.lr == 0.02
    assert rcnn.data.init_args.batch_size == 16
    assert rcnn.model.init_args.schedule.init_args.epochs == [16, 22]
    assert rcnn.trainer.max_epochs == 24
    resnet = options(ROOT / "recipes" / "resnet50_imagenet.yaml")
    assert resnet.model.init_args.optimizer.init_args.lr == 0.1
    assert resnet.data.init_args.batch_size == 256


@pytest.mark.parametrize("count", [0, 1, 5])
def test_modules_are_counted_on_the_command_line(count):
    at = {0: [], 1: ["res3"], 5: [f"fpn{i}" for i in range(1, 6)]}[count]
    recipe = ROOT / "recipes" / "small" / "mask_rcnn.yaml"
    with torch.device("meta"):
        chosen = options(recipe, "--model.network.at", f"[{','.join(at)}]").model.init_args.network
        network = create_model(chosen.name, chosen.attention, at=chosen.at, **chosen.options)
    assert list(network.configuration["at"]) == at


def test_ablations_are_options_of_the_command_line():
    recipe = ROOT / "recipes" / "mask_rcnn_r50_heads.yaml"
    arguments = [
        "--model.network.attention_options.num_heads",
        "32",
        "--model.network.attention",
        "non_local",
    ]
    network = options(recipe, *arguments).model.init_args.network
    assert network.attention_options == {"num_heads": 32}
    assert network.attention == "non_local"


@pytest.mark.parametrize("task", ["mask_rcnn", "psmnet", "resnet"])
def test_small_recipes_train(task, tmp_path, monkeypatch):
    from efficient_attention.cli import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "recipes" / "small" / f"{task}.yaml", tmp_path / "recipe.yaml")
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    sizes = ["--data.batch_size", "1", "--data.eval_batch_size", "1", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", "recipe.yaml", "--output", "run", *few, *sizes]) == 0
    assert (tmp_path / "run" / "network" / "model.safetensors").exists()
    names = tmp_path / "run" / "network" / "classes.json"
    if task == "psmnet":
        assert not names.exists()
    else:
        first = int(task == "mask_rcnn")
        assert json.loads(names.read_text())[0] == {"label": first, "id": first, "name": "ellipse"}


@pytest.mark.parametrize(("piece", "recipe"), PIECES, ids=range(len(PIECES)))
def test_what_the_documentation_lays_over_a_recipe_fits(piece, recipe, tmp_path):
    (tmp_path / "piece.yaml").write_text(piece)
    found = options(ROOT / recipe, "--config", str(tmp_path / "piece.yaml"))
    # An alias of the recipe is a copy: what is changed in one place stays in the other.
    assert found.data.init_args.train != found.data.init_args.val
    for section, value in yaml.safe_load(piece).get("model", {}).get("init_args", {}).items():
        if section == "network":
            assert {key: found.model.init_args.network[key] for key in value} == value


def test_the_documentations_options_are_options():
    """Of the list of what can be said otherwise on the command line."""
    block = DOCUMENT.split("lies over the first.\n\n")[1].split("\n\n")[0]
    recipe = ROOT / "recipes" / "small" / "mask_rcnn.yaml"
    for line in block.splitlines():
        arguments = shlex.split(re.split(r"\s{2,}", line.strip())[0])
        assert options(recipe, *arguments).trainer.accelerator == "cpu"


def test_the_documentations_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    exec(program, {})
    assert (tmp_path / "runs" / "cues" / "network" / "config.json").exists()
