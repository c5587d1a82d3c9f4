"""A process that is killed, as machines do it, and one that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

import torch

import efficient_attention
from efficient_attention.cli import main

SOURCE = Path(efficient_attention.__file__).parent.parent

# Pairs; asked for the ninth time, the data set waits as long as a file says so.
DATA = """
import time
from pathlib import Path
from efficient_attention.data.generated_stereo import GeneratedStereo

class Pairs(GeneratedStereo):
    asked = 0

    def __getitem__(self, key):
        Pairs.asked += 1
        while Pairs.asked == 9 and Path("wait").exists():
            time.sleep(0.05)
        return super().__getitem__(key)
"""
RECIPE = """
output: {output}
model:
  class_path: Stereo
  init_args:
    network: {{name: psmnet_small, options: {{max_disparity: 16, width: 4}}}}
    optimizer: {{class_path: AdamW, init_args: {{lr: 0.001}}}}
    schedule: {{class_path: Cosine, init_args: {{warmup_steps: 2}}}}
    ema_decay: 0.9
data:
  class_path: StereoData
  init_args:
    train: {{class_path: pairs.Pairs, init_args: {{size: [32, 64], max_disparity: 16, length: 6}}}}
    batch_size: 1
    workers: 0
checkpoint: {{every_n_steps: 2}}
trainer: {{accelerator: cpu, max_epochs: 2, log_every_n_steps: 1, enable_model_summary: false}}
"""


def recipe(folder, output):
    (folder / f"{output}.yaml").write_text(RECIPE.format(output=output))
    return ["fit", "--config", f"{output}.yaml"]


def losses(folder):
    path = folder / "history.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line for line in lines if "train/loss" in line]


def test_a_run_that_was_killed_inside_an_epoch_ends_like_one_that_was_not(tmp_path, monkeypatch):
    (tmp_path / "pairs.py").write_text(DATA)
    (tmp_path / "wait").touch()
    command = [sys.executable, "-m", "efficient_attention.cli", *recipe(tmp_path, "killed")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}:{tmp_path}",
        "OMP_NUM_THREADS": "1",
        # As in this process, there are no native kernels, whatever this machine has.
        "XDG_CACHE_HOME": str(tmp_path),
    }
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    # The ninth sample never comes: eight steps are done, six of the first epoch and two of the second.
    while len(losses(tmp_path / "killed")) < 8:
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (tmp_path / "wait").unlink()

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_num_threads(1)
    assert main([*recipe(tmp_path, "killed"), "--ckpt_path", "last"]) == 0
    assert main(recipe(tmp_path, "whole")) == 0
    # Nothing that was written before is lost, and what came after is what came in the run that was not killed.
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    last = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("whole", "killed")]
    for part in ("state_dict", "current_model_state"):
        different = [k for k, v in last[0][part].items() if not torch.equal(last[1][part][k], v)]
        assert different == []
