"""What a run has measured, line by line, in a file that is only ever added to."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

__all__ = ["History", "provenance"]


class History(Logger):
    r"""A logger that adds JSON objects to ``history.jsonl``, one a line, and never takes one back.

    A run that is resumed goes on in the same file: a line with ``"event": "start"`` says where, and the steps behind
    the checkpoint come again. Of lines for the same step the last one counts.

    Args:
        folder: of the run.
        file: in the folder.

    Example:
        >>> history = History(folder)
        >>> history.log_metrics({"train/loss": 0.5}, step=1)
        >>> Path(folder, "history.jsonl").read_text()
        '{"step": 1, "train/loss": 0.5}\\n'
    """

    FILE: ClassVar[str] = "history.jsonl"

    def __init__(self, folder: str | Path, file: str = FILE) -> None:
        super().__init__()
        self.path = Path(folder) / file

    @property
    def name(self) -> str:
        """Nothing below the folder of the run."""
        return ""

    @property
    def version(self) -> str:
        """Nothing below the folder of the run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a line.

        Args:
            metrics: values by name.
            step: how many the optimizer has taken.
        """
        # Values come as float32; the shortest numbers that are these.
        self.add({"step": step, **{k: float(str(np.float32(v))) for k, v in metrics.items()}})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        """Nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of whatever JSON can hold."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(line)) + "\n"
        with self.path.open("ab+") as file:
            # What was killed may have left a part of a line.
            if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
                text = "\n" + text
            file.write(text.encode())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def provenance() -> dict[str, Any]:
    """Where and by what numbers of this process come about."""
    from .. import __version__

    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "efficient_attention": __version__,
    }
