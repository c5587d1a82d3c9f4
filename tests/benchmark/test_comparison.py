"""A comparison trains what is not trained, goes on where it was killed, and records what it has found."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")
import yaml

from efficient_attention.benchmark.comparison import compare
from efficient_attention.benchmark.runs import Run
from efficient_attention.benchmark.tables import comparison_table
from efficient_attention.cli import main
from efficient_attention.errors import InputError

CUES = "efficient_attention.data.generated_cues.GeneratedCues"
RECIPE = {
    "model": {
        "class_path": "Classification",
        "init_args": {
            "network": {"name": "resnet_small", "at": ["res4"], "options": {"num_classes": 6}},
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.001}},
            "schedule": {"class_path": "Constant"},
        },
    },
    "data": {
        "class_path": "ClassificationData",
        "init_args": {
            "train": {"class_path": CUES, "init_args": {"length": 4, "size": [48, 48]}},
            "test": {"class_path": CUES, "init_args": {"length": 4, "size": [48, 48], "seed": 1}},
            "batch_size": 2,
            "workers": 0,
        },
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False},
}
EXPERIMENT = {
    "question": "Does attention help within two steps?",
    "recipe": "recipe.yaml",
    "variants": {"none": "--model.network.at '[]'", "efficient": ""},
    "baseline": "none",
    "score": "top1",
    "better": "higher",
    "seeds": [0, 1],
}
FOLDERS = ["--output", "records", "--runs", "runs"]


def prepare(folder, **changes):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the command has done the experiment, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        lines = []
        compare("tiny.yaml", output="records", runs="runs", jobs=2, report=lines.append)
    return folder, lines


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of it, to go on in."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(folder):
    return json.loads((folder / "records" / "tiny.json").read_text())


def test_every_variant_is_trained_and_tested_under_every_seed(finished):
    found = record(finished[0])
    assert [*found["variants"]] == ["none", "efficient"]
    for variant in found["variants"].values():
        assert [run["seed"] for run in variant["runs"]] == [0, 1]
        for run in variant["runs"]:
            assert run["starts"] == 1
            assert run["fit"]["cpu_seconds"] > 0
            assert run["scores"]["samples"] == 4
            # Of four pictures.
            assert run["scores"]["top1"] % 25 == 0


def test_the_record_sums_its_runs_up(finished):
    found = record(finished[0])
    none, efficient = (
        [run["scores"]["top1"] for run in found["variants"][name]["runs"]]
        for name in ("none", "efficient")
    )
    assert found["variants"]["none"]["score"]["mean"] == sum(none) / 2
    assert found["variants"]["none"]["minus_baseline"] is None
    pairs = [ours - theirs for ours, theirs in zip(efficient, none, strict=True)]
    assert found["variants"]["efficient"]["minus_baseline"]["by_seed"] == {
        "0": pairs[0],
        "1": pairs[1],
    }


def test_the_record_says_what_it_follows_from(finished):
    found = record(finished[0])
    assert found["arguments"] == []
    assert found["variants"]["none"]["arguments"] == ["--model.network.at", "[]"]
    provenance = found["provenance"]
    assert {"commit", "changed", "torch", "processor", "threads", "time"} <= provenance.keys()
    for variant in found["variants"].values():
        for run in variant["runs"]:
            assert run["fit"]["commit"] == provenance["commit"]
    assert len(found["recipe_sha256"]) == len(found["experiment_sha256"]) == 64


def test_runs_of_different_variants_are_different(finished):
    configurations = [
        yaml.safe_load(path.read_text()) for path in finished[0].glob("runs/*/config.yaml")
    ]
    found = {(c["seed"], str(c["model"]["init_args"]["network"]["at"])) for c in configurations}
    assert found == {(seed, at) for seed in (0, 1) for at in ("[]", "['res4']")}


def test_progress_and_a_table_are_reported(finished):
    _, lines = finished
    assert lines[0] == "4 runs, of which 0 are done"
    assert sum(", seed" in line and ": top1 " in line for line in lines) == 4
    assert comparison_table(record(finished[0])) in lines[-1]


def test_what_is_done_is_not_done_again(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    assert main(["bench", "experiment", "tiny.yaml", *FOLDERS]) == 0
    assert "4 runs, of which 4 are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before


def test_seeds_of_the_command_line_go_before_those_of_the_file(folder, capsys):
    assert main(["bench", "experiment", "tiny.yaml", "--seeds", "1", *FOLDERS]) == 0
    assert "2 runs, of which 2 are done" in capsys.readouterr().out
    found = record(folder)
    assert found["seeds"] == [1]
    assert found["variants"]["none"]["score"]["deviation"] is None


def test_a_run_that_was_killed_goes_on(folder):
    """Killed when all was trained, and before that was noted."""
    (path,) = (
        p for p in folder.glob("runs/*-seed1") if "at: []" in (p / "config.yaml").read_text()
    )
    scores = record(folder)["variants"]["none"]["runs"][1]["scores"]
    (path / "run.json").unlink()
    compare("tiny.yaml", output="records", runs="runs")
    run = record(folder)["variants"]["none"]["runs"][1]
    # Nothing was left to train.
    assert run["starts"] == 1
    assert run["scores"] == scores


def test_a_run_that_fails_is_named_and_nothing_is_recorded(folder, capsys):
    prepare(folder, variants={"none": "--model.network.at '[attic]'"})
    shutil.rmtree(folder / "records")
    assert main(["bench", "experiment", "tiny.yaml", "--seeds", "0", *FOLDERS]) == 2
    err = capsys.readouterr().err
    assert err.startswith("efficient-attention bench experiment: error: variant 'none', seed 0: ")
    assert "fit of recipe.yaml --model.network.at [attic] --seed 0 must end with code 0; got 2" in (
        err
    )
    assert "at must be among" in err
    assert "fit.log" in err
    assert err.count("\n") == 1
    assert not (folder / "records").exists()


def test_a_score_that_is_none_is_told_with_those_there_are(folder):
    prepare(folder, score="top11")
    with pytest.raises(InputError, match=r"one of \['top1', 'top5', 'samples'\]; got 'top11'"):
        compare("tiny.yaml", output="records", runs="runs")


def test_a_training_that_diverged_is_named(folder):
    path = min(folder.glob("runs/*-seed1/test.jsonl"))
    path.write_text('{"top1": NaN}\n')
    with pytest.raises(InputError, match=r"seed 1: top1 must be finite; got nan \(see runs/"):
        compare("tiny.yaml", output="records", runs="runs")


def test_a_run_is_another_if_its_recipe_is_another(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    first = Run(str(recipe), ("--x", "y"), 0, "last", Path("runs")).folder
    same = Run(str(recipe), ("--x", "y"), 0, "last", Path("runs")).folder
    other = Run(str(recipe), ("--x", "z"), 0, "last", Path("runs")).folder
    recipe.write_text("a: 2")
    changed = Run(str(recipe), ("--x", "y"), 0, "last", Path("runs")).folder
    assert first == same
    assert len({first, other, changed}) == 3


@pytest.mark.parametrize(
    ("deviation", "told"),
    [(0.00841, "0.1000 ± 0.0084"), (35.2, "0 ± 35"), (0.0, "0.10 ± 0.00"), (None, "0.10 ± ?")],
)
def test_a_table_has_as_many_digits_as_the_deviation_leaves(deviation, told):
    score = {"mean": 0.1, "deviation": deviation, "by_seed": {"0": 0.1}}
    variant = {"score": score, "minus_baseline": None, "runs": [{"fit": {"cpu_seconds": 1.0}}]}
    found = {"name": "", "score": "", "better": "", "baseline": "", "variants": {"x": variant}}
    assert f"| x | {told} |" in comparison_table(found)


def test_a_table_has_a_row_for_each_variant():
    runs = [{"fit": {"cpu_seconds": 90.0}}, {"fit": {"cpu_seconds": 110.0}}]
    scores = {"mean": 51.0, "deviation": 1.4142, "by_seed": {"0": 50.0, "1": 52.0}}
    apart = {"mean": -0.5, "deviation": 0.70711, "by_seed": {"0": 0.0, "1": -1.0}}
    found = {
        "name": "tiny",
        "score": "top1",
        "better": "higher",
        "baseline": "none",
        "variants": {
            "none": {"score": scores, "minus_baseline": None, "runs": runs},
            "efficient": {"score": scores, "minus_baseline": apart, "runs": runs},
        },
    }
    assert comparison_table(found).splitlines() == [
        "| tiny | top1 (higher is better) | by seed | minus none | by seed | CPU s |",
        "|---|--:|--:|--:|--:|--:|",
        "| none | 51.0 ± 1.4 | 50.0, 52.0 |  |  | 100 |",
        "| efficient | 51.0 ± 1.4 | 50.0, 52.0 | -0.50 ± 0.71 | +0.00, -1.00 | 100 |",
    ]
