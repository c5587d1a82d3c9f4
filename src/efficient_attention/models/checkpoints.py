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
    allow_missing: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
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
            ``num_batches_tracked`` may always be missing, or too many.
        ignore: keys, or patterns, that are not taken from the checkpoint: ``fc.*`` for a classifier's body alone.

    Returns:
        The keys that were allowed to be missing, and were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint; keys are missing or unexpected, or shapes or kinds of numbers
            differ; the model is on the meta device. The model is as before.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> load_checkpoint(model, {"state_dict": {"module.weight": torch.eye(2)}}, allow_missing=["bias"])
        ('bias',)

    Not part of the paper.
    """
    origin = str(checkpoint) if isinstance(checkpoint, str | Path) else "the given state_dict"
    content = _read(Path(checkpoint)) if isinstance(checkpoint, str | Path) else checkpoint
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("model must have memory to load into; got one on the meta device")
    weights, left_out = _weights(content, prefix, own, origin), _patterns(ignore)
    weights = {key: value for key, value in weights.items() if not _matches(key, left_out)}
    optional = (*_patterns(allow_missing), *_ALWAYS_OPTIONAL)
    absent = [key for key in own if key not in weights]
    allowed = tuple(key for key in absent if _matches(key, optional))
    common = [key for key in own if key in weights]
    problems = {
        "missing": [key for key in absent if key not in allowed],
        "unexpected": [
            key for key in weights if key not in own and not _matches(key, _ALWAYS_OPTIONAL)
        ],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
            for key in common
            if weights[key].shape != own[key].shape
        ],
        "of another kind": [
            f"{key} {weights[key].dtype} for {own[key].dtype}"
            for key in common
            if _kind(weights[key]) != _kind(own[key])
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


def _weights(
    content: Any, prefix: str, own: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    for name in _ENVELOPES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{origin} must hold a state_dict; got {type(content).__name__}")
    strangers = [
        str(key)
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if strangers:
        raise ValueError(
            f"{origin} must hold a state_dict of tensors; got other things: {_some(strangers)}"
        )
    weights = _unwrapped(dict(content), unless=[prefix] if prefix else own)
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(
            f"{origin} must hold a state_dict of tensors; got no key that begins {prefix!r}"
        )
    return _unwrapped(weights, unless=own) if prefix else weights


def _unwrapped(weights: dict[str, Tensor], *, unless: Iterable[str]) -> dict[str, Tensor]:
    """Keys without what wrappers put before them, unless it is there by right."""
    for start in (*_WRAPPERS, *_WRAPPERS):
        if all(k.startswith(start) for k in weights) and not all(
            k.startswith(start) for k in unless
        ):
            weights = {key.removeprefix(start): value for key, value in weights.items()}
    return weights


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _some(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
