"""Networks by name: one explicit table, and builders that are imported when they are used."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..surgery import insert

__all__ = ["create_model", "list_models"]

# name: module, function, and the options that make the name.
_BUILDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mask_rcnn_resnet50_fpn": ("mask_rcnn", "mask_rcnn", {"body": "resnet50"}),
    "mask_rcnn_resnet50_fpn_v2": ("mask_rcnn", "mask_rcnn", {"body": "resnet50", "heads": "v2"}),
    "mask_rcnn_resnet101_fpn": ("mask_rcnn", "mask_rcnn", {"body": "resnet101"}),
    "mask_rcnn_resnext101_32x8d_fpn": ("mask_rcnn", "mask_rcnn", {"body": "resnext101_32x8d"}),
    "mask_rcnn_small": ("mask_rcnn", "mask_rcnn", {"body": "resnet10", "heads": "thin"}),
    "psmnet": ("psmnet", "PSMNet", {"head": "stacked_hourglass"}),
    "psmnet_basic": ("psmnet", "PSMNet", {"head": "basic"}),
    "psmnet_small": ("psmnet", "psmnet_small", {}),
    "resnet50": ("resnet", "resnet", {"body": "resnet50"}),
    "resnet101": ("resnet", "resnet", {"body": "resnet101"}),
    "resnet_small": ("resnet", "resnet", {"body": "resnet10"}),
}
_ATTENTION = ("efficient", "non_local", "none")


def create_model(
    name: str,
    attention: str = "efficient",
    *,
    at: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    attention_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a network of the paper, with attention at the paper's places or at others.

    The network computes at first what it does without attention, bit for bit (``init="zero"``), and its own state_dict
    keys are those of the plain network: see :func:`load_checkpoint`.

    Args:
        name: one of :func:`list_models`.
        attention: ``"efficient"``; ``"non_local"``, dot-product attention over the same parameters; or ``"none"``.
        at: names of places, of ``network.places``, or ``{name: options}``; default: ``network.paper_places``.
        attention_options: options of every module, as :func:`efficient_attention.insert` takes them; those of ``at`` go
            first. Default: ``key_channels`` half the channels and ``value_channels`` all, one head, the paper's.
        options: of the builder, whose docstring has them.

    Returns:
        The network, an ``nn.Module`` in training mode. ``network.configuration`` is what was asked for, and what
        ``save_pretrained`` writes.

    Raises:
        ValueError: an unknown name, place or option.
        ImportError: the network needs an extra that is not installed.

    Example:
        >>> network = create_model("resnet_small", at={"res3": {"num_heads": 2}}, num_classes=10)
        >>> network(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Paper: Shen et al. 2021, Sec. 4.
    """
    builder, named = _builder(name)
    known = tuple(o for o in inspect.signature(builder).parameters if o not in named)
    for option in options:
        if option not in known:
            raise ValueError(f"options of {name!r} must be among {known}; got {option!r}")
    if attention not in _ATTENTION:
        raise ValueError(f"attention must be one of {_ATTENTION}; got {attention!r}")
    if attention == "none" and (at or attention_options):
        raise ValueError("at and attention_options must not be given for attention='none'")
    network = builder(**named, **options)
    placed: dict[str, dict[str, Any]] = {}
    if attention != "none":
        chosen = network.paper_places if at is None else [at] if isinstance(at, str) else at
        own = chosen if isinstance(chosen, Mapping) else {place: {} for place in chosen}
        placed = {place: {**(attention_options or {}), **own[place]} for place in own}
        _insert(network, attention, placed)
    network.configuration = {"name": name, "attention": attention, "at": placed, **options}
    return network


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows.

    Args:
        pattern: those that match, as in ``fnmatch``.

    Example:
        >>> list_models("psmnet*")
        ['psmnet', 'psmnet_basic', 'psmnet_small']

    The networks of the paper, Sec. 4, and small ones of the same making.
    """
    return fnmatch.filter(_BUILDERS, pattern)


def _builder(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=3, cutoff=0.3) or list(_BUILDERS)
        raise ValueError(f"name must be one of list_models(), such as {near}; got {name!r}")
    module, function, named = _BUILDERS[name]
    try:
        return getattr(importlib.import_module(f".{module}", __package__), function), named
    except ModuleNotFoundError as error:
        message = f"{name!r} needs {error.name}: pip install 'efficient-attention[models]'"
        raise ImportError(message) from error


def _insert(network: Any, attention: str, placed: Mapping[str, Mapping[str, Any]]) -> None:
    places = network.places
    unknown = [place for place in placed if place not in places]
    if unknown:
        raise ValueError(f"at must be among {list(places)}; got {unknown}")
    for place, options in placed.items():
        taken = sorted(options.keys() & {"kind", "dimensions", "in_channels"})
        if taken:
            raise ValueError(f"options of place {place!r} must be those of attention; got {taken}")
    where = {
        places[place].module: {
            "kind": attention,
            "dimensions": places[place].dimensions,
            "in_channels": places[place].channels,
            **options,
        }
        for place, options in placed.items()
    }
    if where:
        assert isinstance(network, nn.Module)
        insert(network, where)
