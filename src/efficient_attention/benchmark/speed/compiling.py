"""What ``torch.compile`` makes of a function, where it can make anything."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from .entries import Unavailable

__all__ = ["compiled"]

_COMPILERS = ("g++", "c++", "clang++")


def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A function compiled for the shapes it will first be called with, those before it forgotten.

    Args:
        function: of tensors.
        device: it will run on.

    Raises:
        Unavailable: a CPU without a C++ compiler.

    Not part of the paper.
    """
    named = os.environ.get("CXX")
    if device == "cpu" and not any(map(shutil.which, [named] if named else _COMPILERS)):
        raise Unavailable("torch.compile needs a C++ compiler on a CPU, and there is none")
    torch.compiler.reset()
    # Processes that wait to compile in parallel would take the processors from what is timed.
    inductor = importlib.import_module("torch._inductor.config")
    inductor.compile_threads = 1  # type: ignore[attr-defined]
    return torch.compile(function, dynamic=False, fullgraph=True)
