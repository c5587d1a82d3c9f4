"""Attention of quadratic cost replaced by efficient attention over the same parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import modules
from ..modules.folding import obstacle
from .places import Places, build_at, choose
from .report import Change, Report

__all__ = ["replace"]

_EFFICIENT: dict[Any, Any] = {
    nn.MultiheadAttention: modules.MultiheadEfficientAttention,
    modules.NonLocal1d: modules.EfficientAttention1d,
    modules.NonLocal2d: modules.EfficientAttention2d,
    modules.NonLocal3d: modules.EfficientAttention3d,
}


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
    options = ("normalization", "order", "dropout")
    chosen = choose(
        model, places, _unfit_to_replace, passes_over=True, options=options, defaults=defaults
    )
    twins = {n: build_at(n, _twin, model.get_submodule(n), given) for n, given in chosen.items()}
    changes = []
    for name, new in twins.items():
        parent, _, leaf = name.rpartition(".")
        old: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
        tokens = isinstance(old, nn.MultiheadAttention)
        exact = not tokens and old.normalization == new.normalization == "scaling"
        what = f"{type(old).__name__} -> {type(new).__name__}"
        where = ("tokens", old.embed_dim) if tokens else (old._dimensions, old.in_channels)
        changes.append(Change(name, what, *where, 0, "exact" if exact else "approximate"))
    return Report(tuple(changes))


def _unfit_to_replace(name: str, module: nn.Module) -> str | None:
    if type(module) not in _EFFICIENT:
        return f"it is a {type(module).__name__}, not one of {[k.__name__ for k in _EFFICIENT]}"
    return obstacle(module, type(module)) if name else "it is the model itself"


def _twin(old: Any, options: Mapping[str, Any]) -> nn.Module:
    """The efficient module over the parameters of another."""
    kind = _EFFICIENT[type(old)]
    own = {o: getattr(old, o) for o in inspect.signature(kind).parameters if hasattr(old, o)}
    if isinstance(old, nn.MultiheadAttention):
        own |= {"bias": old.in_proj_bias is not None, "add_bias_kv": old.bias_k is not None}
    new = kind(**{**own, **options, "device": "meta"})
    for key, parameter in list(old.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        setattr(new.get_submodule(owner), leaf, parameter)
    return new
