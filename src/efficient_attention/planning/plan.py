"""The public function: where attention could go in a model, at what cost, within which memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..surgery.places import Places
from .candidates import Survey
from .result import Plan
from .runs import Runs
from .simulation import Twin, in_one_line
from .units import parse_bytes

__all__ = ["plan"]

_OPTIONS = ("key_channels", "value_channels", "num_heads", "normalization")
_DEVICES = ("cpu", "cuda")
# As many as still read at one glance.
_MOST_PLACES = 12


def plan(
    model: nn.Module,
    input: Any,  # noqa: A002 - the word that nn.Module uses
    *,
    places: Places | None = None,
    budget: int | str | None = None,
    optimizer_states: int = 2,
    device: str | None = None,
    **options: Any,
) -> Plan:
    """Tell where attention could go in a model, what it would cost, and what of it fits a memory.

    A copy of the model runs on fake tensors, which have shapes but neither values nor memory, while the bytes of all
    that lives are counted: in evaluation mode, and in training mode with the backward pass of the sum of what it
    returns. So a plan takes seconds and no memory, whatever the sizes; the model is not touched. On the CPU it agrees
    with measured peaks to a few percent. What allocators and cuDNN take beyond tensors is not in it.

    Args:
        model: any module, on any device, ``meta`` included: nothing is allocated.
        input: what it gets: a tensor, a tuple of positional arguments, a dict of keyword ones; anything else, as a list
            of images, is one positional argument.
        places: names, patterns or predicates as in :func:`insert`; default: those that a network of this package names,
            of other models the last block of each stage, where the positions change.
        budget: the memory that is there: ``"8 GiB"``, ``"500 MB"`` or a number of bytes.
        optimizer_states: numbers that the optimizer keeps for each parameter: 2 for Adam, 1 for SGD with momentum.
        device: ``"cpu"`` or ``"cuda"``, where it will run; default: where the model is, the CPU for ``meta``. What
            operators hold while they run, such as copies for convolutions, is counted on the CPU alone.
        options: of the attention, as in :func:`insert`: ``key_channels``, ``value_channels``, ``num_heads``,
            ``normalization``.

    Returns:
        A :class:`Plan`. Where shapes come to depend on values, as behind the proposals of a detector, the run ends:
        ``stopped_at`` says where, and what follows is not counted.

    Raises:
        ValueError: the model does not run on the input; places, a budget or options that cannot be.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU())
        >>> planned = plan(model, torch.randn(1, 3, 514, 514), places="0", budget="8 GiB")
        >>> for kind, cost in planned.places[0].costs.items():
        ...     print(kind, f"{cost.multiply_adds:.1e}", f"{cost.inference / 2**30:.1f} GiB", planned.fits(cost))
        efficient 2.1e+09 0.1 GiB training
        explicit 6.6e+12 512.2 GiB nothing
        fused 8.8e+12 0.4 GiB training

    Not part of the paper; its Sec. 4 places modules behind res3 and the levels of a feature pyramid.
    """
    available = None if budget is None else parse_bytes("budget", budget)
    _check(model, optimizer_states, device, options)
    twin = _twin(model, input)
    survey = _survey(model, twin)
    chosen = survey.default() if places is None else survey.chosen(places)
    kept = f"{optimizer_states} optimizer states per parameter"
    notes = [f"peaks are of the whole model, in training with gradients and {kept}"]
    if survey.stop:
        where, why = survey.stop
        notes.append(f"stopped at {where}, where {why}: what follows is not counted")
    if places is None and len(chosen) > _MOST_PLACES:
        notes.append(f"{len(chosen) - _MOST_PLACES} smaller places are left out; name them")
        largest = sorted(chosen, key=lambda place: -place.positions)[:_MOST_PLACES]
        chosen = [place for place in chosen if place in largest]
    if options.get("normalization") == "scaling":
        notes.append("there is no fused attention under scaling")

    names = [place.name for place in chosen]
    on_cpu = device != "cuda"
    runs = Runs(twin, names, temporaries=on_cpu, optimizer_states=optimizer_states)
    return Plan(
        plain=runs.plain(),
        places=tuple(runs.at(place, options) for place in chosen),
        budget=available,
        stopped_at=survey.stop.module if survey.stop else None,
        notes=(*notes, *runs.notes),
    )


def _twin(model: nn.Module, example: Any) -> Twin:
    try:
        return Twin(model, example)
    except Exception as error:
        # Whatever a stranger's modules hold that cannot be copied.
        message = "model must be one that copy.deepcopy takes"
        raise ValueError(f"{message}; it raises {in_one_line(error)}") from error


def _survey(model: nn.Module, twin: Twin) -> Survey:
    try:
        return Survey(model, twin)
    except Exception as error:
        where = twin.innermost(error.__traceback__)
        raise ValueError(f"model must run on input; {where} raises {in_one_line(error)}") from error


def _check(
    model: nn.Module, optimizer_states: int, device: str | None, options: Mapping[str, Any]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if not isinstance(optimizer_states, int) or optimizer_states < 0:
        raise ValueError(f"optimizer_states must be an integer from 0; got {optimizer_states!r}")
    if device not in (None, *_DEVICES):
        raise ValueError(f"device must be one of {_DEVICES} or None; got {device!r}")
    if device == "cpu" and any(parameter.is_cuda for parameter in model.parameters()):
        raise ValueError("device must be 'cuda' or None for a model that is there; got 'cpu'")
    for option in options:
        if option not in _OPTIONS:
            raise ValueError(f"options must be among {_OPTIONS}; got {option!r}")
