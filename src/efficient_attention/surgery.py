"""Attention put into somebody else's network, and taken out again; the network's own state_dict keys stay.

An inserted module is a child of its host, the module at the place: parameters, ``state_dict``, ``to`` and distributed
wrappers find it. ``nn.Sequential`` runs a last child on its output by itself; any other host gets a forward hook, a
function of this file that looks the child up in the host it is called with. Nothing is wrapped or renamed, no class is
made at run time and no hook holds state: copies, pickles, replicas, compiler and export see an ordinary module.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from . import modules
from .modules.folding import obstacle

__all__ = ["Change", "Report", "insert", "remove", "replace"]

Places = str | Callable[..., bool] | Iterable[Any] | Mapping[Any, Mapping[str, Any]]

_CHILD = "inserted_attention"
# Handles of hooks count from 0 in every process: in a model that was unpickled, the next hook to be registered may get
# the number of one that is there, and replace it. It never gets this one.
_HOOK = -1
_EFFICIENT: dict[Any, Any] = {n: getattr(modules, f"EfficientAttention{n}d") for n in (1, 2, 3)}
_EFFICIENT["tokens"] = modules.EfficientAttention
_NON_LOCAL: dict[Any, Any] = {n: getattr(modules, f"NonLocal{n}d") for n in (1, 2, 3)}
_KINDS = {"efficient": _EFFICIENT, "non_local": _NON_LOCAL}
_DIMENSIONS = {kind: n for family in _KINDS.values() for n, kind in family.items()}
_DIMENSIONS[nn.MultiheadAttention] = "tokens"
_REPLACEABLE = (nn.MultiheadAttention, *_NON_LOCAL.values())
_WHERE = ("kind", "dimensions", "in_channels")
_OWN = ("num_heads", "key_channels", "value_channels", "normalization", "residual", "init", "order")
_VALID = {"kind": tuple(_KINDS), "dimensions": tuple(_EFFICIENT)}


class Change(NamedTuple):
    """What was done at one place; see :class:`Report`."""

    name: str
    what: str
    dimensions: int | str
    channels: int
    parameters: int
    outputs: str


class Report(NamedTuple):
    """What :func:`insert`, :func:`replace` or :func:`remove` did, which is not in the paper; ``print`` shows a table.

    Args:
        changes: for each place its ``name``, ``what`` was done, ``dimensions`` (1, 2, 3 or ``"tokens"``), ``channels``,
            ``parameters`` added (negative: taken away), and what the model's ``outputs`` are now: ``"unchanged"`` bit
            for bit, ``"exact"`` up to rounding, ``"approximate"``, ``"changed"``, or ``"restored"``.
        new_keys: what the model's state_dict has gained.
        removed_keys: what it has lost.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = insert(model, "0", example=torch.randn(1, 3, 16, 16))
        >>> report.changes[0].parameters, report.new_keys[0]
        (216, '0.inserted_attention.keys.weight')
    """

    changes: tuple[Change, ...]
    new_keys: tuple[str, ...] = ()
    removed_keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [Change._fields, *(tuple(map(str, change)) for change in self.changes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for text, keys in (("new", self.new_keys), ("removed", self.removed_keys)):
            owners = dict.fromkeys(f"{key.rpartition(_CHILD)[0]}{_CHILD}.*" for key in keys)
            lines += [f"{len(keys)} {text} state_dict keys: {', '.join(owners)}"] if keys else []
        return "\n".join(lines)


def insert(model: nn.Module, places: Places, *, example: Any = None, **defaults: Any) -> Report:
    """Apply attention to what modules of a model return: ``attention(host(...))``.

    With a residual and ``init="zero"``, the defaults, the model computes right afterwards what it did, bit for bit.
    Its own state_dict keys stay: a checkpoint of the plain model loads with ``strict=False``, and what it lacks is
    ``report.new_keys``. Insert before compiling the model and building its optimizer. All positions take part: a place
    knows of no padding. Returns a :class:`Report`; after an error the model is as before.

    Args:
        model: any module; changed in place.
        places: ``{place: options}``, or places alone. A place is a module's qualified name, a pattern as in ``fnmatch``
            (``*`` crosses dots), or a predicate ``(name, module) -> bool``. Options: ``kind`` (``"efficient"`` or
            ``"non_local"``); ``in_channels`` and ``dimensions`` (1, 2, 3 or ``"tokens"``), inferred if not given; those
            of :class:`EfficientAttention2d`; on tokens ``bias``. Device and dtype are the host's.
        example: an input, a tuple of positional ones or a dict of keyword ones, to infer from: a copy of the model, in
            eval mode, runs on it in fake tensors, which have shapes but neither values nor memory.
        defaults: options for all places; a place's own go first.

    Raises:
        ValueError: a place that matches nothing, is taken, never called, shared or of unclear layout; unknown options.
        TypeError: a place returns no tensor.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> print(insert(model, {"0": {"num_heads": 2}}, example=torch.randn(1, 3, 32, 32)))
        name  what                           dimensions  channels  parameters  outputs
        0     EfficientAttention2d inserted  2           8         216         unchanged
        8 new state_dict keys: 0.inserted_attention.*

    Paper: Shen et al. 2021, Sec. 4: modules behind res3 and the levels of a feature pyramid.
    """
    chosen = _choose(model, places, defaults, (*_WHERE, *_OWN, "bias"), _not_open)
    unknown = [n for n, o in chosen.items() if not {"in_channels", "dimensions"} <= o.keys()]
    outputs = _dry_run(model, unknown, example) if unknown else {}
    built = {name: _build(model, name, chosen[name], outputs.get(name, [])) for name in chosen}
    keys = model.state_dict().keys()
    for name, attention in built.items():
        host = model.get_submodule(name)
        host.register_module(_CHILD, attention)
        if not _appends(host):
            host._forward_hooks[_HOOK] = _attend_to_output
    changes = [_change(name, attention, "inserted") for name, attention in built.items()]
    return Report(tuple(changes), new_keys=tuple(k for k in model.state_dict() if k not in keys))


def replace(model: nn.Module, places: Places, **defaults: Any) -> Report:
    """Replace attention of quadratic cost by efficient attention over the same parameters.

    ``nn.MultiheadAttention`` becomes :class:`MultiheadEfficientAttention`, ``NonLocal1d/2d/3d`` becomes
    ``EfficientAttention1d/2d/3d``. Parameters are moved, not copied, under the keys they had. A non-local block with
    ``normalization="scaling"`` is the same map in another order: ``"exact"``. All else is ``"approximate"``, and
    needs fine-tuning. Returns a :class:`Report`.

    Args:
        model: any module; changed in place.
        places: as in :func:`insert`; patterns and predicates consider what can be replaced. Options: ``normalization``
            (default: the block's own; ``"softmax"`` for ``nn.MultiheadAttention``), ``order``, and ``dropout=0.0`` to
            agree that ``nn.MultiheadAttention`` loses its dropout on weights, which are never built here.
        defaults: options for all places; a place's own go first.

    Raises:
        ValueError: a place that matches nothing, cannot be replaced or has several names; unknown options.
        NotImplementedError: the attention has something without a linear form.

    Example:
        >>> block = efficient_attention.NonLocal2d(8, normalization="scaling", init="official")
        >>> model, x = torch.nn.Sequential(block), torch.randn(1, 8, 16, 16)
        >>> replace(model, "0").changes[0].outputs
        'exact'
        >>> torch.allclose(model(x), block(x), atol=1e-5)
        True

    Paper: Shen et al. 2021, Sec. 3.3: equal to dot-product attention under scaling, approximate under softmax.
    """
    known = ("normalization", "order", "dropout")
    chosen = _choose(model, places, defaults, known, _not_replaceable)
    twins = {n: _call(n, _twin, model.get_submodule(n), options) for n, options in chosen.items()}
    changes = []
    for name, new in twins.items():
        parent, _, leaf = name.rpartition(".")
        old: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
        tokens = isinstance(old, nn.MultiheadAttention)
        exact = not tokens and old.normalization == new.normalization == "scaling"
        what = f"{type(old).__name__} -> {type(new).__name__}"
        where = (_DIMENSIONS[type(old)], old.embed_dim if tokens else old.in_channels)
        changes.append(Change(name, what, *where, 0, "exact" if exact else "approximate"))
    return Report(tuple(changes))


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
        places = [name for name, module in model.named_modules() if _CHILD in module._modules]
    changes, keys = [], model.state_dict().keys()
    unfit = "nothing is inserted there"
    for name in _choose(model, places, {}, (), lambda _, m: _CHILD not in m._modules and unfit):
        host = model.get_submodule(name)
        changes.append(_change(name, host.get_submodule(_CHILD), "removed"))
        delattr(host, _CHILD)
        host._forward_hooks.pop(_HOOK, None)
    left = model.state_dict().keys()
    return Report(tuple(changes), removed_keys=tuple(k for k in keys if k not in left))


def _attend_to_output(host: nn.Module, _inputs: tuple, output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.is_nested:
        way_out = "build nn.TransformerEncoder with enable_nested_tensor=False"
        raise NotImplementedError(f"inserted attention takes no nested tensors; {way_out}")
    return getattr(host, _CHILD)(output)


def _appends(host: nn.Module) -> bool:
    return isinstance(host, nn.Sequential) and type(host).forward is nn.Sequential.forward


def _not_open(_name: str, host: nn.Module) -> str | None:
    if hasattr(host, _CHILD):
        return "it has inserted attention already; see remove()"
    container = isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return _iterates(host) if container and not _appends(host) else None


def _not_replaceable(name: str, module: nn.Module) -> str | None:
    if type(module) not in _REPLACEABLE:
        return f"it is a {type(module).__name__}, not one of {[k.__name__ for k in _REPLACEABLE]}"
    return obstacle(module, type(module)) if name else "it is the model itself"


def _iterates(host: nn.Module) -> str:
    way_out = "would run one more as one of them; choose a module inside it or behind it"
    return f"it is a {type(host).__name__}, which goes over its children and {way_out}"


def _choose(
    model: nn.Module, places: Places, defaults: Mapping, known: tuple[str, ...], unfit: Callable
) -> dict[str, dict[str, Any]]:
    if isinstance(places, str) or callable(places):
        places = [places]
    if not isinstance(places, Mapping):
        places = {place: {} for place in places}
    named = dict(model.named_modules(remove_duplicate=False))
    named = {name: m for name, m in named.items() if _CHILD not in name.split(".")}
    # What cannot be replaced or removed is passed over by patterns; where insertion cannot be, it is an error.
    fit = {n: m for n, m in named.items() if unfit is _not_open or not unfit(n, m)}
    chosen: dict[str, dict[str, Any]] = {}
    for place, options in places.items():
        if callable(place):
            found = [name for name, module in fit.items() if place(name, module)]
        else:
            found = [place] if place in named else fnmatch.filter(filter(None, fit), place)
        said = place if isinstance(place, str) else getattr(place, "__name__", place)
        if not found:
            near = difflib.get_close_matches(str(said), fit, n=3, cutoff=0)
            raise ValueError(f"places must match modules; got {said!r}; near names: {near}")
        for name in found:
            same = [other for other, module in named.items() if module is named[name]]
            shared = f"{same} are one module; copy it first" if len(same) > 1 else None
            reason = "it is asked for twice" if name in chosen else unfit(name, named[name])
            if reason := shared or reason:
                raise ValueError(f"places must be fit; got {name!r} by {said!r}, but {reason}")
            chosen[name] = {**defaults, **options}
            _check_options(name, chosen[name], known)
    return chosen


def _check_options(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"options of {name!r} must be among {known}; got {option!r}")
        if value not in _VALID.get(option, (value,)):
            raise ValueError(f"{option} of {name!r} must be in {_VALID[option]}; got {value!r}")


def _dry_run(model: nn.Module, names: list[str], example: Any) -> dict[str, list[Any]]:
    """What modules return, call by call, when a copy of the model runs on fake tensors."""
    way = f"give in_channels= and dimensions= at {', '.join(map(repr, names))}"
    if example is None:
        raise ValueError(f"example must be an input of the model, to infer from; or {way}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    iterating = set()
    failure: Exception | None = None
    try:
        tensors = (*model.parameters(), *model.buffers())
        twin = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors}).eval()
        for name in names:
            host = twin.get_submodule(name)
            host.register_forward_hook(lambda _m, _i, out, name=name: outputs[name].append(out))
            if not _appends(host):
                probe = nn.Identity()
                probe.register_forward_pre_hook(lambda _m, _i, name=name: iterating.add(name))
                host.register_module(_CHILD, probe)
        fake = tree_map_only(Tensor, mode.from_tensor, example)
        args = fake if isinstance(fake, tuple) else () if isinstance(fake, dict) else (fake,)
        with mode, torch.no_grad():
            twin(*args, **(fake if isinstance(fake, dict) else {}))
    except Exception as error:
        # What needs values, as detection heads do, ends the run: no harm once all places were seen.
        failure = error
    for name in names:
        if name in iterating:
            raise ValueError(f"{name!r} is no place: {_iterates(model.get_submodule(name))}")
        if not outputs[name]:
            why = f" before {type(failure).__name__}: {failure}" if failure else " in eval mode"
            raise ValueError(f"example must call {name!r}; it does not{why}; or {way}") from failure
    return outputs


def _layout(model: nn.Module, name: str, options: dict[str, Any], output: Any) -> tuple[Any, int]:
    """Dimensions and channels of what a place returns."""
    if not isinstance(output, Tensor):
        got = type(output).__name__ + (f" of {list(output)}" if isinstance(output, Mapping) else "")
        raise TypeError(
            f"{name!r} must return a tensor; got {got}. Name one in or behind it; nn.MultiheadAttention: replace()"
        )
    shape, channels = tuple(output.shape), options.get("in_channels")
    dimensions: Any = options.get("dimensions")
    if dimensions is None:
        axis = _channel_axis(model.get_submodule(name), channels, shape)
        tokens = len(shape) == 3 and all(getattr(m, "batch_first", True) for m in model.modules())
        dimensions = "tokens" if axis == -1 else len(shape) - 2
        if axis == 0 or (axis == -1 and not tokens):
            raise ValueError(
                f"{name!r} must return [B, C, ...] of 1 to 3 dimensions or batch-first tokens [B, N, C]; got {shape}, "
                "which the layers in it do not show to be one. Give dimensions, or choose another place"
            )
    rank, axis = (3, -1) if dimensions == "tokens" else (2 + dimensions, 1)
    if len(shape) != rank or channels not in (None, shape[axis]):
        raise ValueError(f"{name!r} must return what fits {options}; got {shape}")
    return dimensions, shape[axis]


def _channel_axis(host: nn.Module, channels: Any, shape: tuple) -> int:
    """1 or -1, or 0 for unknown: ``[B, C, L]`` and ``[B, N, C]`` look alike, but the host's layers are made for C."""
    second, last = [channels], [channels]
    for module in host.modules():
        second += [getattr(module, a, None) for a in ("out_channels", "num_features")]
        last += [getattr(module, a, None) for a in ("out_features", "embedding_dim", "embed_dim")]
        last += getattr(module, "normalized_shape", ())[-1:]
    # Layers of the right kind count first; then any, as a convolution whose output is flattened to tokens.
    for of_second, of_last in ((second, last), (second + last, second + last)):
        if len(shape) in (3, 4, 5) and (shape[1] in of_second) != (shape[-1] in of_last):
            return 1 if shape[1] in of_second else -1
    return 1 if len(shape) in (4, 5) else 0


def _build(model: nn.Module, name: str, options: dict[str, Any], outputs: list[Any]) -> Any:
    found = {_layout(model, name, options, output) for output in outputs}
    if len(found) > 1:
        raise ValueError(f"{name!r} must return the same channels in all calls; got {found}")
    dimensions, channels = found.pop() if found else (options["dimensions"], options["in_channels"])
    family = _KINDS[options.get("kind", "efficient")]
    if dimensions not in family:
        raise ValueError(f"kind of {name!r} must be 'efficient' on tokens; got 'non_local'")
    own = {option: value for option, value in options.items() if option not in _WHERE}
    _check_options(name, own, tuple(inspect.signature(family[dimensions]).parameters))
    own = {"residual": True, "init": "zero", **own, **_placement(model, name)}
    attention = _call(name, family[dimensions], channels, **own)
    return attention.train(model.get_submodule(name).training)


def _placement(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the host's last parameter, or of what encloses it."""
    for parameter in reversed(list(model.get_submodule(name).parameters())):
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return _placement(model, name.rpartition(".")[0]) if name else {}


def _change(name: str, attention: Any, verb: str) -> Change:
    count = sum(parameter.numel() for parameter in attention.parameters())
    identity = "unchanged" if attention.residual and attention.init == "zero" else "changed"
    sign, outputs = (1, identity) if verb == "inserted" else (-1, "restored")
    kind, what = type(attention), f"{type(attention).__name__} {verb}"
    return Change(name, what, _DIMENSIONS[kind], attention.in_channels, sign * count, outputs)


def _twin(old: Any, options: Mapping[str, Any]) -> nn.Module:
    """The efficient module over the parameters of another."""
    efficient = {**_EFFICIENT, "tokens": modules.MultiheadEfficientAttention}
    kind = efficient[_DIMENSIONS[type(old)]]
    own = {o: getattr(old, o) for o in inspect.signature(kind).parameters if hasattr(old, o)}
    if isinstance(old, nn.MultiheadAttention):
        own |= {"bias": old.in_proj_bias is not None, "add_bias_kv": old.bias_k is not None}
    new = kind(**{**own, **options, "device": "meta"})
    for key, parameter in list(old.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        setattr(new.get_submodule(owner), leaf, parameter)
    return new


def _call(name: str, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return build(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"at {name!r}: {error}") from error
