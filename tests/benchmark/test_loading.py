"""How long steps wait for data is seen, whoever loads it."""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")
import yaml

from efficient_attention.benchmark.loading import loading_table
from efficient_attention.cli import main

# Pictures of which each takes a tenth of a second in which nothing is done, and 20 ms of work.
DATA = """
import time
from efficient_attention.data.generated_cues import GeneratedCues

class Slow(GeneratedCues):
    def __getitem__(self, key):
        time.sleep(0.1)
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return super().__getitem__(key)
"""
RECIPE = {
    "model": {
        "class_path": "Classification",
        "init_args": {
            "network": {"name": "resnet_small", "at": [], "options": {"num_classes": 6}},
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.001}},
            "schedule": {"class_path": "Constant"},
        },
    },
    "data": {
        "class_path": "ClassificationData",
        "init_args": {
            "train": {"class_path": "slow.Slow", "init_args": {"length": 16, "size": [48, 48]}},
            "batch_size": 2,
        },
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 1},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("slow.py").write_text(DATA)
    Path("slow.yaml").write_text(yaml.safe_dump(RECIPE))


def bench(*arguments):
    return main(["bench", "loading", "slow.yaml", "--output", "records", *arguments])


def test_a_step_waits_for_as_long_as_its_samples_take(capsys):
    arguments = ["--warm-up", "2", "--batches", "4", "--workers", "0", "--seed", "3"]
    told = logging.getLogger("pytorch_lightning.utilities.rank_zero").level
    assert bench(*arguments) == 0
    assert logging.getLogger("pytorch_lightning.utilities.rank_zero").level == told
    record = json.loads(Path("records", "slow.json").read_text())
    found = record["workers"]["0"]
    assert found["batch_size"] == 2
    # Two samples, of which each sleeps for a tenth of a second, which is no CPU time.
    assert found["wait_seconds"][0] >= 0.2
    assert found["wait_cpu_seconds"][1] < found["wait_seconds"][1] - 0.15
    assert found["step_cpu_seconds"][1] > 0
    for values in found.values():
        if isinstance(values, list):
            assert values == sorted(values)
            assert len(values) == 3
    assert record["arguments"] == ["--seed", "3"]
    assert loading_table(record) in capsys.readouterr().out


def test_a_sample_costs_what_it_computes_and_not_what_it_waits(capsys):
    arguments = ["--samples", "5", "--warm-up", "1", "--output", "records"]
    assert main(["bench", "samples", "slow.yaml", *arguments]) == 0
    record = json.loads(Path("records", "Slow.json").read_text())
    assert 0.02 <= record["sample_cpu_seconds"][0] <= record["sample_cpu_seconds"][2] < 0.1
    assert record["samples_per_cpu_second"] <= 50
    assert record["warm_up_cpu_seconds"] >= 0.02
    assert "samples in a CPU second" in capsys.readouterr().out


def test_a_data_set_with_too_few_samples_is_told_in_one_line(capsys):
    assert main(["bench", "samples", "slow.yaml", "--samples", "16", "--warm-up", "1"]) == 2
    err = capsys.readouterr().err
    assert "samples must be at most 16, which slow.yaml has, warm-up included; got 17" in err


def test_a_recipe_with_too_few_batches_is_told_in_one_line(capsys):
    assert bench("--warm-up", "2", "--batches", "10", "--workers", "0") == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert "batches must be fewer than what slow.yaml trains on, 8; got 12" in line


def test_a_recipe_that_cannot_be_is_told_in_one_line(capsys):
    assert bench("--model.network.name", "resnt") == 2
    assert "name must be one of" in capsys.readouterr().err
