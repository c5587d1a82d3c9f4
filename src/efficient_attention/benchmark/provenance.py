"""What a number follows from: code, versions, machine and threads."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "source_version", "text_hash", "write_record"]

_PACKAGES = ("torch", "torchvision", "pytorch-lightning")
_ROOT = Path(__file__).parent


def describe() -> dict[str, Any]:
    """Where and when this process runs, of which code.

    Returns:
        What JSON can hold: ``time``, UTC; ``command``; ``commit`` and ``changed``, see :func:`source_version`;
        ``python`` and versions of packages; ``processor``; ``threads`` of an operator, as the environment has them.

    Example:
        >>> describe()["threads"] == torch.get_num_threads()
        True

    Not part of the paper.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["efficient-attention", *sys.argv[1:]],
        **source_version(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def source_version() -> dict[str, Any]:
    """The commit of the code that runs, and whether files that git knows differ from it; ``None`` for both outside git.

    Example:
        >>> sorted(source_version())
        ['changed', 'commit']

    Not part of the paper.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def text_hash(*texts: str) -> str:
    """The SHA-256 of texts, as 64 hexadecimal digits; where one ends and the next begins counts.

    Example:
        >>> text_hash("ab", "c") == text_hash("a", "bc")
        False

    Not part of the paper.
    """
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON: whole or not at all, whatever ends the process meanwhile.

    Args:
        path: of the file; its folder is made.
        record: what JSON can hold.

    Example:
        >>> write_record(Path(folder, "new", "record.json"), {"score": 1.5})

    Not part of the paper.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(path)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        # Not a checkout, or no git.
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The name that the system gives the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
