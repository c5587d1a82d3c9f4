"""Checkpoints are whole or not there, the best and the last are kept, and a network comes out."""

import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("pytorch_lightning")

import torch
from pytorch_lightning.trainer.states import TrainerFn

from efficient_attention import create_model
from efficient_attention.models.network import Network
from efficient_attention.training.checkpointing import (
    AtomicCheckpointIO,
    Checkpoints,
    read_checkpoint,
)

CONTENT = {"state_dict": {"weight": torch.arange(4.0)}, "global_step": 7}


@pytest.fixture
def checkpoint(tmp_path):
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "sub" / "a.ckpt")
    return tmp_path / "sub" / "a.ckpt"


def test_what_was_written_is_read(checkpoint):
    content = AtomicCheckpointIO().load_checkpoint(checkpoint)
    assert content["global_step"] == 7
    assert torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert [path.name for path in checkpoint.parent.iterdir()] == ["a.ckpt"]


def test_a_writer_that_is_killed_leaves_the_old_checkpoint(checkpoint):
    """Killed between the writing and the moving, and in the middle of the writing."""
    before = checkpoint.read_bytes()
    for where in ("os.fsync", "torch.serialization._save"):
        code = (
            "import os, signal, sys, torch\n"
            "from efficient_attention.training.checkpointing import AtomicCheckpointIO\n"
            f"{where} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "content = {'state_dict': {'weight': torch.ones(4)}, 'global_step': 8}\n"
            "AtomicCheckpointIO().save_checkpoint(content, sys.argv[1])\n"
        )
        pid = os.fork()
        if pid == 0:
            sys.argv[1:] = [str(checkpoint)]
            exec(code, {})
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert checkpoint.read_bytes() == before


def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_no_part_of_the_new(checkpoint):
    before = checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {**CONTENT, "state_dict": {"weight": torch.zeros(100_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            AtomicCheckpointIO().save_checkpoint(large, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(checkpoint)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 10, 400, -1])
def test_a_truncated_file_is_an_error_with_name_and_size(checkpoint, kept):
    data = checkpoint.read_bytes()[:kept]
    checkpoint.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.ckpt \({len(data)} bytes\) cannot be read") as error:
        read_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path must be a file; got .*nothing\.ckpt"):
        read_checkpoint(tmp_path / "nothing.ckpt")


def test_weights_alone_are_sent_where_they_belong(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"Weights alone belong to model.network.weights"):
        read_checkpoint(tmp_path / "weights.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({**CONTENT, "code": os.system}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.ckpt")


class Run:
    """A trainer, as far as the callback looks."""

    def __init__(self, monitor="val/x"):
        self.saved, self.callback_metrics, self.monitor = [], {}, monitor
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.sanity_checking = self.fast_dev_run = False
        self.is_global_zero, self.max_steps, self.accumulate_grad_batches = True, -1, 1
        self.global_step, self.enable_validation = 0, True
        self.val_check_batch, self.check_val_every_n_epoch, self.current_epoch = 100, 1, 0
        progress = SimpleNamespace(is_last_batch=False)
        self.fit_loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=progress), batch_idx=0, total_batch_idx=0
        )

    def save_checkpoint(self, path, weights_only):
        self.saved.append((self.global_step, path.name))


def validated(callback, run, *values):
    for value in values:
        run.callback_metrics["val/x"] = torch.tensor(value)
        callback.on_validation_end(run, None)
        run.global_step += 1


def made(tmp_path, run, **options):
    callback = Checkpoints(tmp_path / "checkpoints", **options)
    callback.setup(run, SimpleNamespace(monitor=("val/x", "max")), "fit")
    return callback


def test_the_best_is_written_when_it_is_found(tmp_path):
    run = Run()
    callback = made(tmp_path, run)
    validated(callback, run, float("nan"), 1.0, 0.5, float("nan"), 1.0, 2.0)
    assert run.saved == [(1, "best.ckpt"), (5, "best.ckpt")]
    assert callback.state_dict() == {"best": 2.0, "monitor": "val/x"}


def test_the_smallest_can_be_the_best(tmp_path):
    run = Run()
    callback = made(tmp_path, run, monitor="val/x", mode="min")
    validated(callback, run, 3.0, 4.0, 2.0)
    assert run.saved == [(0, "best.ckpt"), (2, "best.ckpt")]


def test_a_resumed_run_compares_with_the_best_before(tmp_path):
    run = Run()
    callback = made(tmp_path, run)
    callback.load_state_dict({"best": 5.0, "monitor": "val/x"})
    validated(callback, run, 4.0, 6.0)
    assert run.saved == [(1, "best.ckpt")]
    other = made(tmp_path, run)
    other.load_state_dict({"best": 5.0, "monitor": "val/y"})
    assert other.best is None


def test_a_measure_that_validation_lacks_is_an_error(tmp_path):
    run = Run()
    callback = made(tmp_path, run, monitor="val/y", mode="max")
    with pytest.raises(ValueError, match=r"monitor must be one of \['val/x'\]; got 'val/y'"):
        validated(callback, run, 1.0)


def test_the_last_is_written_every_n_steps_inside_an_epoch(tmp_path):
    run = Run()
    callback = made(tmp_path, run, every_n_steps=2)
    for step in range(1, 6):
        run.global_step = step
        run.fit_loop.epoch_loop.batch_progress.is_last_batch = step == 4
        callback.on_train_batch_end(run)
    callback.on_train_epoch_end(run, None)
    assert run.saved == [(2, "last.ckpt"), (5, "last.ckpt")]


def test_gradients_that_are_being_accumulated_are_waited_for(tmp_path):
    run = Run()
    run.accumulate_grad_batches = 3
    callback = made(tmp_path, run, every_n_steps=1)
    for batch in range(6):
        run.fit_loop.batch_idx, run.global_step = batch, (batch + 1) // 3
        callback.on_train_batch_end(run)
    assert run.saved == [(1, "last.ckpt"), (2, "last.ckpt")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": -1}, "every_n_steps must not be negative; got -1"),
        ({"monitor": "val/x"}, "monitor and mode go together"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**options)


def test_the_best_network_comes_out_as_a_folder(tmp_path):
    network = create_model("psmnet_small", max_disparity=16, width=4)
    weights = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    other = {name: torch.full_like(tensor, 0.5) for name, tensor in weights.items()}
    for name, content in (("best", weights), ("last", other)):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": content, "global_step": 1}, path)
    run = Run()
    made(tmp_path, run).on_fit_end(run, SimpleNamespace(network=network))
    found = Network.from_pretrained(tmp_path / "network")
    assert found.configuration == network.configuration
    assert all(torch.equal(found.state_dict()[k], v) for k, v in network.state_dict().items())
