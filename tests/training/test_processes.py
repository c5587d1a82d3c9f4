"""Two processes train like one that accumulates, and evaluate like one."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("faster_coco_eval")

import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

import efficient_attention
from efficient_attention.cli import main
from efficient_attention.errors import InputError
from efficient_attention.training.data import Data
from efficient_attention.training.merging import broadcast_buffers, merged_scores

SOURCE = Path(efficient_attention.__file__).parent.parent

DETECTION = """
output: {output}
model:
  class_path: Detection
  init_args:
    network:
      name: mask_rcnn_small
      at: [res3]
      options:
        num_classes: 7
        norm: batch
        min_size: 64
        max_size: 64
        rpn_post_nms_top_n_train: 20
        rpn_post_nms_top_n_test: 20
        box_score_thresh: 0.0
    optimizer: {{class_path: SGD, init_args: {{lr: 0.01}}}}
    schedule: {{class_path: Constant}}
data:
  class_path: DetectionData
  init_args:
    train: &shapes
      class_path: efficient_attention.data.generated_shapes.GeneratedShapes
      init_args: {{length: 4, size: [64, 64], max_objects: 2}}
    val:
      class_path: efficient_attention.data.generated_shapes.GeneratedShapes
      init_args: {{length: 11, size: [64, 64]}}
    test: *shapes
    batch_size: 2
    workers: 0
trainer: {{accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, enable_model_summary: false}}
"""
STEREO = """
output: {output}
model:
  class_path: Stereo
  init_args:
    network: {{name: psmnet_small, options: {{max_disparity: 16, width: 4}}}}
    optimizer: {{class_path: SGD, init_args: {{lr: 0.001}}}}
    schedule: {{class_path: Constant}}
data:
  class_path: StereoData
  init_args:
    train: &pairs
      class_path: efficient_attention.data.generated_stereo.GeneratedStereo
      init_args: {{size: [32, 64], max_disparity: 15, length: 4}}
    val:
      class_path: efficient_attention.data.generated_stereo.GeneratedStereo
      init_args: {{size: [32, 64], max_disparity: 15, length: 3}}
    test: *pairs
    batch_size: {batch}
    workers: 0
trainer: {{accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, precision: 64-true, enable_model_summary: false}}
"""


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def launched(*arguments):
    """By torchrun, as on a machine with two devices."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "efficient_attention.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def forked(*arguments):
    """In copies of this process that believe it, as nothing has to be imported again."""
    in_two(lambda rank: main(arguments))


def in_two(function):
    """Call a function with its rank in two copies of this process."""
    port = free_port()
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(_child(function, str(rank), port))
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]


def _child(function, rank, port):
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update(TORCHELASTIC_RUN_ID="test")
    rank_zero_only.rank = int(rank)
    torch.set_num_threads(1)
    signal.alarm(200)
    try:
        return function(int(rank)) or 0
    except BaseException:
        traceback.print_exc()
        return 1


def history(folder, kind):
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line for line in lines if any(key.startswith(kind) for key in line)]


TWO = ("--trainer.devices", "2")
SHARDED = (
    *("--trainer.strategy", "pytorch_lightning.strategies.ModelParallelStrategy"),
    *("--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1"),
    *("--trainer.strategy.save_distributed_checkpoint", "false"),
)


def test_scores_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    """Eleven pictures on two processes: with one of them twice it would be another average precision."""
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(DETECTION.format(output="two"))
    forked("fit", "--config", "two.yaml", *TWO)
    (expected,) = history(tmp_path / "two", "val/")
    assert expected["val/images"] == 11
    assert main(["validate", "--config", "two.yaml", "--ckpt_path", "last"]) == 0
    (found,) = map(json.loads, Path("two/validate.jsonl").read_text().splitlines())
    scores = {k.removeprefix("val/"): v for k, v in expected.items() if k.startswith("val/")}
    assert scores == pytest.approx({key: found[key] for key in scores}, rel=1e-6)


def fit(name, run, *arguments, batch):
    """Weights and scores at the end of two steps."""
    Path(f"{name}.yaml").write_text(STEREO.format(output=name, batch=batch))
    run("fit", "--config", f"{name}.yaml", *arguments)
    (scores,) = history(Path(name), "val/")
    assert scores["val/images"] == 3
    return torch.load(Path(name, "checkpoints", "last.ckpt"))["state_dict"], scores


def alone(*arguments):
    assert main([*arguments, "--trainer.accumulate_grad_batches", "2"]) == 0


def error(weights, reference):
    assert weights.keys() == reference.keys()
    return max((weights[k].double() - reference[k]).abs().max().item() for k in reference)


def test_two_processes_train_like_one_that_accumulates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference, expected = fit("one", alone, batch=1)
    weights, found = fit("two", launched, *TWO, batch=2)
    assert error(weights, reference) < 1e-12
    key = "val/end_point_error"
    assert found[key] == pytest.approx(expected[key], rel=1e-6)
    # Twice the error of the same steps in the same type; this strategy knows no float64.
    single = ("--trainer.precision", "32-true")
    plain, _ = fit("plain", alone, *single, batch=1)
    sharded, _ = fit("sharded", forked, *TWO, *SHARDED, *single, batch=2)
    assert error(sharded, reference) <= 2 * error(plain, reference)
    # One process takes what two have saved in parts.
    assert main(["validate", "--config", "sharded.yaml", "--ckpt_path", "last", *single]) == 0


class Seen:
    """Numbers that were seen; there is no score of none."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def merge(self, other):
        return Seen(*self.numbers, *other.numbers)

    def compute(self):
        if not self.numbers:
            raise ValueError("scores need a number; got none")
        return self

    def _asdict(self):
        return {"largest": max(self.numbers)}


def test_scores_and_statistics_are_the_same_on_all_processes():
    def work(rank):
        dist.init_process_group("gloo")
        assert merged_scores(Seen(rank)) == {"largest": 1}
        with pytest.raises(ValueError, match="scores need a number; got none"):
            merged_scores(Seen())
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank + 1)
        broadcast_buffers(norm)
        assert norm.running_mean.tolist() == [1, 1]

    in_two(work)
    assert merged_scores(Seen(3)) == {"largest": 3}


def test_fewer_samples_than_processes_are_refused(monkeypatch):
    data = Data(val=lambda: [1], workers=0)
    data.setup("validate")
    monkeypatch.setattr(data, "_process", lambda: (0, 2))
    with pytest.raises(InputError, match=r"data\.val must have a sample for each of 2 processes"):
        data.val_dataloader()


def test_a_batch_that_does_not_divide_among_processes_is_refused(monkeypatch):
    data = Data(train=lambda: [1, 2, 3], batch_size=3, workers=0)
    data.setup("fit")
    monkeypatch.setattr(data, "_process", lambda: (0, 2))
    with pytest.raises(InputError, match="batch_size must divide among 2 processes; got 3"):
        data.train_dataloader()
