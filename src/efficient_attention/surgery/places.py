"""Which modules of a model a place means, and with which options."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from .hosts import CHILD

# Of different ones, in one message.
_MOST_REASONS = 3

Places = str | Callable[..., bool] | Iterable[Any] | Mapping[Any, Mapping[str, Any]]


def choose(
    model: nn.Module,
    places: Places,
    unfit: Callable[[str, nn.Module], str | None],
    *,
    passes_over: Literal[True] | Callable[[str, nn.Module], str | None],
    is_near: Callable[[nn.Module], bool] = lambda module: False,
    inside_inserted: bool = False,
    options: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The names that places mean, each with its options.

    Args:
        model: the model.
        places: see :func:`insert`.
        unfit: why a module cannot be a place, or ``None``.
        passes_over: what of it patterns and predicates pass over; ``True``: all; otherwise it is an error.
        is_near: whether it is worth telling why an unfit module is unfit, before others.
        inside_inserted: whether inserted attention itself can be a place.
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
    if not inside_inserted:
        named = {name: m for name, m in named.items() if CHILD not in name.split(".")}
    passed = unfit if passes_over is True else passes_over
    fit = {name: m for name, m in named.items() if not passed(name, m)}
    chosen: dict[str, dict[str, Any]] = {}
    for place, own in places.items():
        found = [place] if place in named else _matching(place, fit)
        said = place if isinstance(place, str) else getattr(place, "__name__", place)
        if not found:
            near = difflib.get_close_matches(str(said), fit, n=3, cutoff=0)
            unfitting = _why_unfit(place, named, unfit, is_near)
            raise ValueError(
                f"places must match modules; got {said!r}; near names: {near}{unfitting}"
            )
        for name in found:
            same = [other for other, module in named.items() if module is named[name]]
            shared = f"{same} are one module; copy it first" if len(same) > 1 else None
            twice = "it is asked for twice" if name in chosen else None
            if reason := shared or twice or unfit(name, named[name]):
                raise ValueError(f"places must be fit; got {name!r} by {said!r}, but {reason}")
            chosen[name] = {**(defaults or {}), **own}
            check_options(name, chosen[name], options)
    return chosen


def _matching(place: Any, named: Mapping[str, nn.Module]) -> list[str]:
    if callable(place):
        return [name for name, module in named.items() if place(name, module)]
    return fnmatch.filter(filter(None, named), place)


def _why_unfit(
    place: Any, named: Mapping[str, nn.Module], unfit: Callable, is_near: Callable
) -> str:
    """What matches and is unfit, the nearest misses before others, one of a kind."""
    matches = _matching(place, named)
    nearest = [name for name in matches if is_near(named[name])] or matches[:1]
    reasons = {unfit(name, named[name]): name for name in reversed(nearest)}
    said = [f"; {name!r} matches, but {reason}" for reason, name in reversed(reasons.items())]
    return "".join(said[:_MOST_REASONS])


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
