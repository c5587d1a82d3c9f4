"""A run that was stopped anywhere goes on as if it had not been, to the last bit."""

import json
import os
import shutil
import signal

import pytest

pytest.importorskip("pytorch_lightning")

import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import Dataset

from efficient_attention.data.draws import as_draw, generator
from efficient_attention.training import checkpointing
from efficient_attention.training.checkpointing import AtomicCheckpointIO, Checkpoints
from efficient_attention.training.data import Data
from efficient_attention.training.history import History
from efficient_attention.training.networks import NetworkOptions
from efficient_attention.training.optimization import SGD, AdamW, Cosine, Steps
from efficient_attention.training.task import Task

EPOCHS = 2


class Noise(Dataset):
    """Samples that say which draw they are of."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        draw = as_draw(key, self.length)
        x = torch.randn(4, generator=generator(draw.item, draw.seed))
        return x, x.sum() + draw.item


class Net(nn.Sequential):
    """Everything that has a state: weights, running statistics, random numbers."""

    configuration = {"name": "net"}  # noqa: RUF012

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


class NetOptions(NetworkOptions):
    def build(self):
        torch.manual_seed(0)
        return Net()


class Mean:
    """A mean that merges."""

    def __init__(self, total=0.0, count=0):
        self.total, self.count = total, count

    def merge(self, other):
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self):
        return self

    def _asdict(self):
        return {"error": self.total / self.count, "count": self.count}


class Regression(Task):
    monitor = ("val/error", "min")

    def losses(self, batch):
        x, y = batch
        return {"square": (self.network(x).squeeze(1) - y).square().mean()}

    def new_metrics(self, dataset):
        return Mean()

    def evaluate(self, batch, metrics):
        x, y = batch
        metrics.total += (self.network(x).squeeze(1) - y).abs().sum().item()
        metrics.count += len(x)

    def write_predictions(self, outputs, folder):
        raise NotImplementedError


class Keep(AtomicCheckpointIO):
    """Keeps a copy of every checkpoint that is written, and of the history at that time."""

    def __init__(self, folder):
        self.folder = folder

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        kept = self.folder / "kept" / f"{len(list(self.folder.glob('kept/*'))):02}-{path.stem}"
        kept.mkdir(parents=True)
        shutil.copy(path, kept)
        if (self.folder / "history.jsonl").exists():
            shutil.copy(self.folder / "history.jsonl", kept)


@pytest.fixture(autouse=True)
def _nets_are_built_by_name(monkeypatch):
    Net.save_pretrained = lambda self, folder: torch.save(self.state_dict(), folder)
    monkeypatch.setattr(checkpointing, "create_model", lambda name: Net())


class Send(Callback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def start(
    folder,
    *,
    ema=None,
    lr=0.05,
    optimizer=SGD,
    epochs=EPOCHS,
    seed=0,
    batch=2,
    every=1,
    callbacks=(),
    **options,
):
    # Whatever a process has drawn before must not matter.
    torch.seed()
    workers = options.pop("workers", 0)
    schedule = options.pop("schedule", None) or Cosine(warmup_steps=3)
    task = Regression(NetOptions(name="net"), optimizer(lr=lr), schedule, ema_decay=ema, seed=seed)
    data = Data(
        lambda: Noise(9), lambda: Noise(5), batch_size=batch, eval_batch_size=2, workers=workers
    )
    checkpoint = options.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=History(folder),
        callbacks=[Checkpoints(folder / "checkpoints", every_n_steps=every), *callbacks],
        plugins=[Keep(folder)],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    return task


def history(folder):
    """The last line of every step and kind."""
    path = folder / "history.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {(line["step"], "val/error" in line): line for line in lines}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9},
        {"optimizer": AdamW, "schedule": Steps(epochs=[0.5, 1])},
        {"accumulate_grad_batches": 3},
        {"val_check_interval": 2},
        {"max_steps": 7, "epochs": -1},
        {"max_steps": 7, "epochs": -1, "check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 2},
        {"workers": 1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_runs_go_on_from_every_checkpoint_to_the_bit(options, tmp_path):
    whole = start(tmp_path / "whole", **options).state_dict()
    lines = history(tmp_path / "whole")
    steps = max(lines)[0] + 1
    kept = sorted((tmp_path / "whole" / "kept").iterdir())
    for folder in kept[3:5] if "workers" in options else kept:
        (checkpoint,) = folder.glob("*.ckpt")
        done = torch.load(checkpoint)["global_step"]
        if done == steps:
            continue
        resumed = start(tmp_path / folder.name, ckpt_path=checkpoint, **options).state_dict()
        assert [k for k in whole if not torch.equal(resumed[k], whole[k])] == [], folder.name
        # What was measured before the checkpoint and after it is all there is. The step that the checkpoint is of is
        # written down right behind it.
        before, after = history(folder), history(tmp_path / folder.name)
        assert {**before, **after, (done - 1, False): lines[done - 1, False]} == lines, folder.name
        assert min(after)[0] >= done - 1, folder.name


@pytest.mark.parametrize(("step", "kept"), [(2, 3), (3, 2)], ids=["training", "validation"])
def test_a_run_that_is_asked_to_end_goes_on_from_there(step, kept, tmp_path):
    """The fourth step is followed by validation, which is then not done: the run goes on from before."""
    whole = start(tmp_path / "whole").state_dict()
    with pytest.raises(SystemExit):
        start(tmp_path / "run", every=2, callbacks=[Send(signal.SIGTERM, step)])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last)["global_step"] == kept
    resumed = start(tmp_path / "run", ckpt_path=last).state_dict()
    assert [k for k in whole if not torch.equal(resumed[k], whole[k])] == []
    assert history(tmp_path / "run") == history(tmp_path / "whole")
