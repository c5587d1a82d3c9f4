"""A network learns to outline nuclei from two pictures: real pictures, from scratch, held out ones judged."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("faster_coco_eval")

from efficient_attention.cli import main

DATA = os.environ.get("EFFICIENT_ATTENTION_DATA")
RECIPE = Path(__file__).parent.parent.parent / "recipes" / "small" / "my_coco.yaml"


@pytest.mark.skipif(not DATA, reason="EFFICIENT_ATTENTION_DATA names no folder")
@pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="minutes; set SLOW_TESTS")
def test_nuclei_that_were_held_out_are_found_after_a_hundred_steps(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_coco").symlink_to(Path(DATA, "detection", "nuclei").resolve())
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_epochs", "50", "--trainer.check_val_every_n_epoch", "50"]
    assert main(["fit", "--config", str(RECIPE), "--output", "run", *short]) == 0
    lines = map(json.loads, Path("run", "history.jsonl").read_text().splitlines())
    (scores,) = (line for line in lines if "val/mask_ap_50" in line)
    assert scores["step"] < 100
    assert scores["val/images"] == 1
    assert scores["val/mask_ap_50"] > 0.4
    (name,) = json.loads(Path("run", "network", "classes.json").read_text())
    assert name == {"label": 1, "id": 1, "name": "nucleus"}
