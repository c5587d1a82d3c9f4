"""Models and inputs as a command line names them: ours, timm's, torchvision's, or what any function returns."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .models import create_model, list_models

__all__ = ["find_model", "make_inputs"]

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")


def find_model(name: str) -> nn.Module:
    """A model of a name, without memory for its weights: on the meta device.

    Args:
        name: one of :func:`list_models`, without attention; ``timm:NAME``; ``torchvision:NAME``, as
            ``torchvision.models.get_model`` knows it; or ``package.module:function``, called without arguments.

    Raises:
        InputError: there is no such model.

    Example:
        >>> find_model("resnet_small").fc.out_features
        1000

    Not part of the paper.
    """
    library, _, rest = name.partition(":")
    try:
        with torch.device("meta"):
            model = _build(library, rest)
    except Exception as error:
        # Whatever a stranger's function raises, it is the name that does not serve.
        raise InputError(
            "MODEL must be one of list_models(), timm:NAME, torchvision:NAME or package.module:function; "
            f"got {name!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"MODEL must make an nn.Module; {name!r} makes a {type(model).__name__}")
    return model


def make_inputs(model: nn.Module, shapes: list[str]) -> tuple[Any, ...]:
    """Inputs of shapes, without memory; for a detector of torchvision's kind, the list of pictures that it takes.

    Args:
        model: that will get them.
        shapes: such as ``"1x3x800x1333"``, or ``"1x77:int64"`` for another dtype than float32.

    Raises:
        InputError: what is given is no shape.

    Example:
        >>> [x.shape for x in make_inputs(torch.nn.Identity(), ["1x3x8x8"])]
        [torch.Size([1, 3, 8, 8])]

    Not part of the paper.
    """
    inputs = tuple(_make_input(shape) for shape in shapes)
    if any(kind.__name__ == "GeneralizedRCNN" for kind in type(model).__mro__):
        return ([picture for batch in inputs for picture in batch],)
    return inputs


def _build(library: str, rest: str) -> Any:
    if not rest:
        return create_model(library, "none") if library in list_models() else _unknown(library)
    if library == "timm":
        return importlib.import_module("timm").create_model(rest)
    if library == "torchvision":
        options = {"weights_backbone": None} if "rcnn" in rest else {}
        return importlib.import_module("torchvision.models").get_model(
            rest, weights=None, **options
        )
    function: Any = importlib.import_module(library)
    for part in rest.split("."):
        function = getattr(function, part)
    return function()


def _unknown(name: str) -> Any:
    raise LookupError(f"{name!r} is not among {', '.join(list_models())}")


def _make_input(shape: str) -> Tensor:
    found = _SHAPE.fullmatch(shape)
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise InputError(
            f"--input must be a shape such as 1x3x800x1333 or 1x77:int64; got {shape!r}"
        )
    return torch.empty([int(size) for size in found[1].split("x")], dtype=dtype, device="meta")
