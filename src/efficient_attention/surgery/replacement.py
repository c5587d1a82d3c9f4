"""Attention of quadratic cost replaced by efficient attention over the same parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from .places import Places, build_at, check_options, choose
from .recognition import Candidate, recognise, resembles_attention
from .report import Change, Report

__all__ = ["replace"]


def replace(model: nn.Module, places: Places, **defaults: Any) -> Report:
    """Replace attention of quadratic cost by efficient attention over the same parameters.

    A module is known by its parts and by what a small random copy of it computes, whatever its class:

    ================================================= ============================================= =================
    module                                            becomes                                       outputs
    ================================================= ============================================= =================
    ``nn.MultiheadAttention``                         :class:`MultiheadEfficientAttention`          approximate
    timm's ``Attention`` of vision transformers       :class:`ViTEfficientAttention`                approximate
    :class:`NonLocal1d`, ``2d``, ``3d``               :class:`EfficientAttention1d`, ``2d``, ``3d`` exact for scaling
    non-local blocks of mmcv, timm, Non-local_pytorch :class:`EfficientNonLocal`                    exact for scaling
    denoising-diffusion-pytorch's ``LinearAttention`` :class:`DiffusionEfficientAttention`          exact
    ================================================= ============================================= =================

    Parameters and layers are moved, not copied, under the keys they had. The dot-product form of a non-local block is
    ``normalization="scaling"``, the same map in another order: ``"exact"``. The embedded Gaussian, and all that is
    ``"approximate"``, needs fine-tuning. ``nn.TransformerEncoder`` around a place stops using nested tensors, which
    the report notes. Returns a :class:`Report`; after an error the model is as before.

    Args:
        model: any module; changed in place.
        places: as in :func:`insert`, and ``*.inserted_attention``; patterns and predicates pass over what cannot be
            replaced. Options, where the new
            module has them: ``normalization`` (default: the block's own; ``"softmax"`` for transformers), ``order``,
            and ``dropout=0.0`` to agree that a transformer's attention loses its dropout on weights, which are never
            built here.
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
    recognised = cache(recognise)

    def unfit(name: str, module: nn.Module) -> str | None:
        found = recognised(module)
        return found if isinstance(found, str) else None if name else "it is the model itself"

    chosen = choose(
        model,
        places,
        unfit,
        passes_over=True,
        is_near=resembles_attention,
        inside_inserted=True,
        options=("normalization", "order", "dropout"),
        defaults=defaults,
    )
    built = {}
    for name, given in chosen.items():
        candidate: Any = recognised(model.get_submodule(name))
        check_options(name, given, tuple(inspect.signature(candidate.build).parameters))
        built[name] = (candidate, *build_at(name, candidate.build, **given))
    changes = tuple(_exchange(model, name, *found) for name, found in built.items())
    return Report(changes, notes=tuple(_without_nested_tensors(model, built)))


def _exchange(
    model: nn.Module, name: str, candidate: Candidate, new: nn.Module, exact: bool
) -> Change:
    parent, _, leaf = name.rpartition(".")
    what = f"{type(model.get_submodule(name)).__name__} -> {type(new).__name__}"
    setattr(model.get_submodule(parent), leaf, new)
    outputs = "exact" if exact else "approximate"
    return Change(name, what, candidate.dimensions, candidate.channels, 0, outputs)


def _without_nested_tensors(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Turn them off in every ``nn.TransformerEncoder`` around the places, and say so."""
    for name, encoder in model.named_modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not encoder.use_nested_tensor:
            continue
        if any(place.startswith(f"{name}." if name else "") for place in names):
            encoder.use_nested_tensor = False
            yield (
                f"{name or 'the model'} makes no nested tensors of padded batches any more (use_nested_tensor=False); "
                "outputs on padding are no longer zeroed"
            )
