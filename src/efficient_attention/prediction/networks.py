"""Which network predicts: a folder or a repository, a name with a file of weights, or the one that is shipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["digest", "load_network", "shipped_network"]

# What a task takes: where its class is, and how its networks are called.
_TASKS = {
    "stereo": ("psmnet", "PSMNet", "psmnet*"),
    "detect": ("mask_rcnn", "MaskRCNN", "mask_rcnn*"),
    "classify": ("resnet", "ResNet", "resnet*"),
}
_PACKAGE = "efficient_attention"


def load_network(
    task: str,
    network: str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    prefix: str = "",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The network for a task, in evaluation mode, in float32 on the CPU.

    Args:
        task: ``"stereo"``, ``"detect"`` or ``"classify"``.
        network: a folder that ``save_pretrained`` or a run wrote (``runs/x/network``), or a repository of the Hugging
            Face Hub; default for stereo: the one that comes with the package, if it does.
        model: instead of it, one of ``list_models()``, with ``weights``.
        weights: a file of weights, as :func:`efficient_attention.load_checkpoint` reads it: torchvision's ``.pth``, the
            ``.tar`` of the authors of PSMNet, a run's ``.ckpt`` under ``prefix="network."``. All have to fit.
        prefix: what the keys that count begin with in the file.
        options: of :func:`efficient_attention.create_model`; ``attention`` is ``"none"`` unless it is among them, since
            published weights are of plain networks.

    Raises:
        InputError: no network, or two; files or options that do not fit; a network for another task.
        ImportError: the extra ``efficient-attention[models]`` is not installed.

    Example:
        >>> import efficient_attention
        >>> efficient_attention.create_model("resnet_small").save_pretrained(folder)
        >>> load_network("classify", folder).fc.out_features
        1000
    """
    _check_choice(network, model, weights, prefix, options)
    if model is not None:
        found = _named(model, weights, prefix, dict(options or {}))
    else:
        found = _pretrained(network or _default(task))
    module, kind, pattern = _TASKS[task]
    if not isinstance(found, getattr(import_module(f"{_PACKAGE}.models.{module}"), kind)):
        raise InputError(
            f"{task} needs a {kind} ({pattern}); got a {type(found).__name__} from {network or model!s}"
        )
    # Weights may be stored in fewer bits; pictures are float32.
    return found.float().eval()


def shipped_network(task: str) -> Path | None:
    """The folder of the network that comes with the package for a task; None if none does."""
    folder = files(_PACKAGE).joinpath("weights", task)
    return Path(str(folder)) if folder.is_dir() else None


def digest(network: Any) -> str:
    """What tells a network from others: of its configuration and all its weights, 16 hexadecimal digits."""
    # As bytes, whatever their kind: NumPy has no bfloat16.
    import torch

    state = hashlib.sha256(json.dumps(network.configuration, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


def _check_choice(
    network: object, model: object, weights: object, prefix: str, options: object
) -> None:
    if network is not None and model is not None:
        raise InputError(
            f"one network must be named; got --network {network!s} and --model {model!s}"
        )
    if (model is None) != (weights is None):
        raise InputError(
            f"--model and --weights must be given together; got --model {model!s} and --weights {weights!s}"
        )
    if model is None and (prefix or options):
        raise InputError("--prefix and --options must come with --model; got them without")


def _default(task: str) -> Path:
    folder = shipped_network(task)
    if folder is None:
        raise InputError(
            f"{task} needs a network: --network FOLDER, as a run or save_pretrained() leaves it, or --model and "
            "--weights; none comes with this installation"
        )
    return folder


def _pretrained(origin: str | Path) -> Any:
    name = str(origin)
    if "/" not in name and not Path(name).is_dir():
        raise InputError(
            f"--network must be a folder, or NAMESPACE/NAME on the Hugging Face Hub; there is no folder '{name}'"
        )
    try:
        from ..models.network import Network
    except ModuleNotFoundError as error:
        raise ImportError(
            f"networks need {error.name}: pip install 'efficient-attention[models]'"
        ) from error
    try:
        return Network.from_pretrained(origin)
    except ImportError:
        raise
    # Whatever the hub or a damaged file raises, it is the network that does not serve.
    except Exception as error:
        raise InputError(
            f"--network must be one that can be loaded; got '{name}': {_line(error)}"
        ) from error


def _named(model: str, weights: Any, prefix: str, options: dict[str, Any]) -> Any:
    from ..models import create_model, load_checkpoint

    try:
        network = create_model(model, options.pop("attention", "none"), **options)
    except (ValueError, TypeError) as error:
        raise InputError(f"--model and --options must make a network; {_line(error)}") from error
    try:
        load_checkpoint(network, weights, prefix=prefix)
    except (OSError, ValueError) as error:
        hint = (
            """; weights with attention need --options '{"attention": "efficient"}'"""
            if "inserted_attention" in str(error)
            else ""
        )
        raise InputError(f"--weights must fit --model {model}: {_line(error)}{hint}") from error
    return network


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
