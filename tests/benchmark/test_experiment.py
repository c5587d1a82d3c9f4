"""Experiments are read whole or refused in one line."""

from pathlib import Path

import pytest

pytest.importorskip("yaml")
import yaml

from efficient_attention.benchmark.experiment import read_experiment
from efficient_attention.errors import InputError

ROOT = Path(__file__).parent.parent.parent
EXPERIMENTS = sorted((ROOT / "recipes" / "experiments").glob("*.yaml"))
GIVEN = {
    "question": "Which?",
    "recipe": "recipe.yaml",
    "variants": {"none": "--model.network.at '[]'", "efficient": ""},
    "baseline": "none",
    "score": "top1",
    "better": "higher",
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("output: run")


def read(given):
    Path("asked.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return read_experiment("asked.yaml")


def test_arguments_are_split_as_a_shell_does():
    experiment = read({**GIVEN, "arguments": "--data.train.size '[48, 48]' --seed 1"})
    assert experiment.name == "asked"
    assert experiment.arguments == ("--data.train.size", "[48, 48]", "--seed", "1")
    assert experiment.variants == {"none": ("--model.network.at", "[]"), "efficient": ()}
    assert (experiment.seeds, experiment.checkpoint) == ((0, 1, 2), "last")
    assert experiment.with_seeds([7]).seeds == (7,)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"varients": {}}, ["got 'varients'", "variants is one"]),
        ({"colour": "red"}, ["must be among", "got 'colour'"]),
        ({"baseline": "plain"}, ["baseline must be one of ['none', 'efficient']", "'plain'"]),
        ({"better": "more"}, ["better must be one of ['higher', 'lower']", "'more'"]),
        ({"checkpoint": "first"}, ["checkpoint must be one of", "'first'"]),
        ({"recipe": "gone.yaml"}, ["recipe must be a file; got gone.yaml"]),
        ({"score": 1}, ["score must be a text; got 1"]),
        ({"variants": []}, ["variants must be arguments by name"]),
        ({"variants": {"none": ["--at"]}}, ["variants must be texts by name", "['--at']"]),
        ({"arguments": "--at '[]"}, ["No closing quotation"]),
        ({"seeds": []}, ["seeds must be a list of integers; got []"]),
        ({"seeds": [0, True]}, ["seeds must be a list of integers"]),
        ({"seeds": [1, 1]}, ["seeds must be different"]),
        ({"seeds": [-1]}, ["seeds must be different and not negative"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_told_with_the_file_and_what_came(change, parts):
    with pytest.raises(InputError) as error:
        read({**GIVEN, **change})
    assert "asked.yaml" in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match=r"asked\.yaml must have .*; baseline, score is missing"):
        read({k: v for k, v in GIVEN.items() if k not in ("baseline", "score")})


@pytest.mark.parametrize("text", ["[1, 2]", "{", "key: [", "\0"])
def test_files_that_are_no_experiment_are_told(text):
    Path("asked.yaml").write_text(text)
    with pytest.raises(InputError, match="experiment must be a YAML file"):
        read_experiment("asked.yaml")
    with pytest.raises(InputError, match=r"gone\.yaml"):
        read_experiment("gone.yaml")


@pytest.mark.skipif(not EXPERIMENTS, reason="not a checkout")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_experiments_of_the_paper_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(path.relative_to(ROOT))
    assert len(experiment.seeds) >= 3
    assert len(experiment.variants) >= 2
    assert f"bench experiment recipes/experiments/{path.name}" in path.read_text()
