"""Attention behind modules of a model, and its removal."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .. import modules
from .hosts import CHILD, attach, cannot_host, compiled_around, detach, unfit_to_host
from .inference import layout, observe_outputs, placement
from .places import Places, build_at, check_options, choose
from .report import Change, Report

__all__ = ["insert", "remove"]

_EFFICIENT: dict[Any, Any] = {n: getattr(modules, f"EfficientAttention{n}d") for n in (1, 2, 3)}
_EFFICIENT["tokens"] = modules.EfficientAttention
_EFFICIENT["channels_last"] = modules.EfficientAttentionChannelsLast
_NON_LOCAL: dict[Any, Any] = {n: getattr(modules, f"NonLocal{n}d") for n in (1, 2, 3)}
_KINDS = {"efficient": _EFFICIENT, "non_local": _NON_LOCAL}
_DIMENSIONS = {kind: n for family in _KINDS.values() for n, kind in family.items()}
_WHERE = ("kind", "dimensions", "in_channels")
_OWN = ("num_heads", "key_channels", "value_channels", "normalization", "residual", "init", "order")
_VALID = {"kind": tuple(_KINDS), "dimensions": tuple(_EFFICIENT)}


def insert(model: nn.Module, places: Places, *, example: Any = None, **defaults: Any) -> Report:
    """Apply attention to what modules of a model return: ``attention(host(...))``.

    With a residual and ``init="zero"``, the defaults, the model computes right afterwards what it did, bit for bit.
    Its own state_dict keys stay: a checkpoint of the plain model loads with ``strict=False``, and what it lacks is
    ``report.new_keys``. Insert before compiling the model and building its optimizer. All positions take part: a place
    knows of no padding. Returns a :class:`Report`; after an error the model is as before.

    One process that compiles both the plain model and this one has to set
    ``torch._dynamo.config.skip_nnmodule_hook_guards = False`` first: by default PyTorch does not tell modules with
    hooks, by which attention is applied, from those without, and runs the program that was compiled first for both.

    Args:
        model: any module; changed in place.
        places: ``{place: options}``, or places alone. A place is a module's qualified name, a pattern as in ``fnmatch``
            (``*`` crosses dots), or a predicate ``(name, module) -> bool``; the latter two pass over modules of kinds
            that cannot be hosts, as ``nn.ModuleList``. Options: ``kind`` (``"efficient"`` or
            ``"non_local"``); ``in_channels`` and ``dimensions``, inferred if not given: 1, 2 or 3, ``"tokens"``, or
            ``"channels_last"`` for features ``[B, ..., C]``, as Swin transformers have them; those of
            :class:`EfficientAttention2d`; where channels are last ``bias``. The device is the host's, and so is the
            dtype, of its parameters or, with ``example``, of its output.
        example: an input, a tuple of positional ones or a dict of keyword ones, to infer from: a copy of the model, in
            eval mode, runs on it in fake tensors, which have shapes but neither values nor memory. Hooks are part of
            what a model computes, and run too. What is given is checked against it.
        defaults: options for all places; a place's own go first.

    Raises:
        ValueError: a place that matches nothing, is taken, never called, shared or of unclear layout; one that is
            scripted, traced or in a compiled model; unknown options; an example that contradicts them.
        TypeError: a place returns no tensor of real numbers.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> print(insert(model, {"0": {"num_heads": 2}}, example=torch.randn(1, 3, 32, 32)))
        name  what                           dimensions  channels  parameters  outputs
        0     EfficientAttention2d inserted  2           8         216         unchanged
        8 new state_dict keys: 0.inserted_attention.*

    Paper: Shen et al. 2021, Sec. 4: modules behind res3 and the levels of a feature pyramid.
    """
    options = (*_WHERE, *_OWN, "bias")

    def unfit(name: str, host: nn.Module) -> str | None:
        return unfit_to_host(name, host) or compiled_around(model, name)

    chosen = choose(
        model, places, unfit, passes_over=cannot_host, options=options, defaults=defaults
    )
    for name, given in chosen.items():
        _check_values(name, given)
    known = [n for n, given in chosen.items() if {"in_channels", "dimensions"} <= given.keys()]
    needed = example is not None or len(known) < len(chosen)
    outputs = observe_outputs(model, [*chosen], example, known) if needed else {}
    built = {name: _build(model, name, chosen[name], outputs.get(name, [])) for name in chosen}
    keys = model.state_dict().keys()
    for name, attention in built.items():
        attach(model.get_submodule(name), attention)
    changes = [_change(name, attention, "inserted") for name, attention in built.items()]
    return Report(tuple(changes), new_keys=tuple(k for k in model.state_dict() if k not in keys))


def remove(model: nn.Module, places: Places | None = None) -> Report:
    """Take out what :func:`insert` put in: modules, state_dict and outputs are those of before.

    Returns a :class:`Report`. Not part of the paper.

    Args:
        model: the model, or a copy of it; changed in place.
        places: as in :func:`insert`, without options; default: all that was inserted.

    Raises:
        ValueError: nothing is inserted at a place.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = insert(model, "0", in_channels=8, dimensions=2)
        >>> remove(model).removed_keys == report.new_keys
        True
    """
    if places is None:
        places = [name for name, module in model.named_modules() if CHILD in module._modules]
    changes, keys = [], model.state_dict().keys()
    for name in choose(model, places, _unfit_to_remove, passes_over=True):
        host = model.get_submodule(name)
        changes.append(_change(name, host.get_submodule(CHILD), "removed"))
        detach(host)
    left = model.state_dict().keys()
    return Report(tuple(changes), removed_keys=tuple(k for k in keys if k not in left))


def _unfit_to_remove(_name: str, host: nn.Module) -> str | None:
    return None if CHILD in host._modules else "nothing is inserted there"


def _check_values(name: str, options: dict[str, Any]) -> None:
    for option, valid in _VALID.items():
        if options.get(option, valid[0]) not in valid:
            raise ValueError(f"{option} of {name!r} must be in {valid}; got {options[option]!r}")


def _build(model: nn.Module, name: str, options: dict[str, Any], outputs: list[Any]) -> Any:
    found = {(*layout(model, name, options, output), output.dtype) for output in outputs}
    if len(found) > 1:
        raise ValueError(f"{name!r} must return the same channels in all calls; got {found}")
    placed = placement(model, name)
    if found:
        dimensions, channels, placed["dtype"] = found.pop()
    else:
        dimensions, channels = options["dimensions"], options["in_channels"]
    family = _KINDS[options.get("kind", "efficient")]
    if dimensions not in family:
        raise ValueError(f"kind of {name!r} must be 'efficient' on {dimensions}; got 'non_local'")
    own = {option: value for option, value in options.items() if option not in _WHERE}
    check_options(name, own, tuple(inspect.signature(family[dimensions]).parameters))
    own = {"residual": True, "init": "zero", **own, **placed}
    attention = build_at(name, family[dimensions], channels, **own)
    return attention.train(model.get_submodule(name).training)


def _change(name: str, attention: Any, verb: str) -> Change:
    count = sum(parameter.numel() for parameter in attention.parameters())
    identity = "unchanged" if attention.residual and attention.init == "zero" else "changed"
    sign, outputs = (1, identity) if verb == "inserted" else (-1, "restored")
    kind, what = type(attention), f"{type(attention).__name__} {verb}"
    return Change(name, what, _DIMENSIONS[kind], attention.in_channels, sign * count, outputs)
