"""Which modules of a model a place means, and with which options."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .hosts import CHILD

Places = str | Callable[..., bool] | Iterable[Any] | Mapping[Any, Mapping[str, Any]]


def choose(
    model: nn.Module,
    places: Places,
    unfit: Callable[[str, nn.Module], str | None],
    *,
    passes_over: bool,
    options: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The names that places mean, each with its options.

    Args:
        model: the model.
        places: see :func:`insert`.
        unfit: why a module cannot be a place, or ``None``.
        passes_over: whether patterns and predicates pass over what is unfit; otherwise it is an error.
        options: names of the options that a place may have.
        defaults: options for all places; a place's own go first.

    Raises:
        ValueError: a place that matches nothing, is unfit, or has several names; unknown options.
    """
    if isinstance(places, str) or callable(places):
        places = [places]
    if not isinstance(places, Mapping):
        places = {place: {} for place in places}
    named = dict(model.named_modules(remove_duplicate=False))
    named = {name: m for name, m in named.items() if CHILD not in name.split(".")}
    fit = {name: m for name, m in named.items() if not (passes_over and unfit(name, m))}
    chosen: dict[str, dict[str, Any]] = {}
    for place, own in places.items():
        found = [place] if place in named else _matching(place, fit)
        said = place if isinstance(place, str) else getattr(place, "__name__", place)
        if not found:
            near = difflib.get_close_matches(str(said), fit, n=3, cutoff=0)
            unfitting = _first_unfitting(place, named, unfit)
            raise ValueError(
                f"places must match modules; got {said!r}; near names: {near}{unfitting}"
            )
        for name in found:
            same = [other for other, module in named.items() if module is named[name]]
            shared = f"{same} are one module; copy it first" if len(same) > 1 else None
            reason = "it is asked for twice" if name in chosen else unfit(name, named[name])
            if reason := shared or reason:
                raise ValueError(f"places must be fit; got {name!r} by {said!r}, but {reason}")
            chosen[name] = {**(defaults or {}), **own}
            check_options(name, chosen[name], options)
    return chosen


def _matching(place: Any, named: Mapping[str, nn.Module]) -> list[str]:
    if callable(place):
        return [name for name, module in named.items() if place(name, module)]
    return fnmatch.filter(filter(None, named), place)


def _first_unfitting(place: Any, named: Mapping[str, nn.Module], unfit: Callable) -> str:
    for name in _matching(place, named):
        return f"; {name!r} matches, but {unfit(name, named[name])}"
    return ""


def check_options(name: str, got: Iterable[str], known: tuple[str, ...]) -> None:
    for option in got:
        if option not in known:
            raise ValueError(f"options of {name!r} must be among {known}; got {option!r}")


def build_at(name: str, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``build`` makes, for a place: its errors name the place."""
    try:
        return build(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"at {name!r}: {error}") from error
