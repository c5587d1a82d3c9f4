"""Weights from files of other people: read without running code, checked whole before anything is changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_checkpoint"]

# What training frameworks put around a state_dict, and before its keys.
_ENVELOPES = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
# Files of PyTorch 0.4 and before do not have this counter, which only momentum=None reads.
_ALWAYS_OPTIONAL = ("*num_batches_tracked",)


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    prefix: str = "",
    allow_missing: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> tuple[str, ...]:
    """Load the weights of a file into a model: all that were asked for, or none.

    A checkpoint of the plain network goes into the one with attention by ``allow_missing=["*inserted_attention*"]``;
    whatever else differs is an error that names it.

    Args:
        model: changed in place.
        checkpoint: a ``.safetensors`` file; a file of ``torch.save``, read with ``weights_only=True``; or a state_dict.
            A state_dict under ``"state_dict"``, ``"model_state_dict"`` or ``"model"`` is taken from there, and
            ``module.`` (of ``DataParallel``) and ``_orig_mod.`` (of ``torch.compile``) before all keys are dropped.
        prefix: only keys that begin so count, without it: ``"network."`` for the part of a larger model.
        allow_missing: keys, or patterns as in ``fnmatch``, that the checkpoint may lack; they keep their values.
        ignore: keys, or patterns, that are not taken from the checkpoint: ``fc.*`` for a classifier's body alone.

    Returns:
        The keys that were allowed to be missing, and were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint; keys are missing or unexpected, or shapes differ. The model is as before.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> load_checkpoint(model, {"state_dict": {"module.weight": torch.eye(2)}}, allow_missing=["bias"])
        ('bias',)

    Not part of the paper.
    """
    origin = str(checkpoint) if isinstance(checkpoint, str | Path) else "the given state_dict"
    content = _read(Path(checkpoint)) if isinstance(checkpoint, str | Path) else checkpoint
    weights, left_out = _weights(content, prefix, origin), tuple(ignore)
    weights = {key: value for key, value in weights.items() if not _matches(key, left_out)}
    own = model.state_dict()
    optional = (*allow_missing, *_ALWAYS_OPTIONAL)
    absent = [key for key in own if key not in weights]
    allowed = tuple(key for key in absent if _matches(key, optional))
    problems = {
        "missing": [key for key in absent if key not in allowed],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
            for key in own.keys() & weights.keys()
            if weights[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{origin} must hold the weights of {type(model).__name__}; {'; '.join(found)}. Nothing was loaded"
        )
    model.load_state_dict(weights, strict=False)
    return allowed


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file; got {path}")
    try:
        if path.suffix == ".safetensors":
            # Imported when it is needed: this package imports torch alone.
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    # A damaged file shows in as many ways as there are readers; a file with code in it, as UnpicklingError.
    except Exception as error:
        reason, size = str(error).partition("\n")[0], path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) cannot be read as a checkpoint of weights alone: {reason}"
        ) from error


def _weights(content: Any, prefix: str, origin: str) -> dict[str, Tensor]:
    for name in _ENVELOPES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{origin} must hold a state_dict; got {type(content).__name__}")
    weights = dict(content)
    for start in (*_WRAPPERS, prefix, *_WRAPPERS):
        if start == prefix or all(key.startswith(start) for key in weights):
            weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    strangers = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if strangers or not weights:
        what = (
            f"other things: {_some(strangers)}" if strangers else f"no key that begins {prefix!r}"
        )
        raise ValueError(f"{origin} must hold a state_dict of tensors; got {what}")
    return weights


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _some(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
