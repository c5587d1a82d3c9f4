"""Memory of a model with attention at a place, from two runs: of the model with a stand-in there, and of attention.

A stand-in returns a tensor of its own, as every attention does, and saves a marker for its backward pass. The bytes of
the model with it, H, and those of attention by itself, A, add up. After t operators, for a call that begins at b and
whose gradient comes at g, there are::

    t = b            H(b) + the peak of A's forward pass, in place of the stand-in's output
    t > b            H(t) + what A keeps, its input and more, as long as the marker is kept
    t = g            H(g) + the same + what A's backward pass takes on top
    t > g            H(t) + the gradients of A's parameters

so that one run of the model serves all kinds of attention, and checkpointing and hooks on saved tensors do to the
marker what they would do to A. It serves all places too: where a stand-in is not wanted, what it got and what it
returned are one tensor in truth, which lives as long as either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .simulation import Life, Stop, Timeline, Twin


class Arrival(NamedTuple):
    """What a call of attention gets.

    Attributes:
        shape: of the features, as the others.
        stride: of their memory.
        dtype: of their numbers.
        device: of their memory.
        differentiable: whether they need a gradient.
        gradients: whether gradients are recorded at all.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    differentiable: bool
    gradients: bool


@dataclass
class Visit:
    """One call of a place.

    Attributes:
        name: of the module there.
        arrival: what attention would get.
        x: the life of that; ``None`` if it is not counted, as what was there before the model ran.
        y: the life of what the stand-in returned.
        marker: the life of what it saved.
        begin: how many operators ran before.
        gradient: how many ran before its gradient came, if it did.
    """

    name: str
    arrival: Arrival
    x: Life | None
    y: Life
    marker: Life
    begin: int
    gradient: int | None = None


class Run(NamedTuple):
    """A run of a model with stand-ins: levels of its timeline, the calls of its places, and where it ended early."""

    levels: list[int]
    visits: list[Visit]
    stop: Stop | None


class Own(NamedTuple):
    """What a call of attention takes by itself, in bytes.

    Attributes:
        forward: the peak of the forward pass beyond the input, the output included.
        kept: between the passes, beyond input and output.
        keeps_input: whether the input is kept too; not if it had to be copied first.
        backward: the peak of the backward pass beyond what was kept, the input and the gradient of the output.
        multiply_adds: of the forward pass.
    """

    forward: int
    kept: int
    keeps_input: bool
    backward: int
    multiply_adds: int


def run_with_stand_ins(
    twin: Twin,
    names: Collection[str],
    *,
    gradients: bool,
    temporaries: bool,
    anchored: bool = False,
) -> Run:
    """Run a model with a stand-in behind each named module.

    Args:
        twin: the model.
        names: of the modules.
        gradients: whether to run backward too.
        temporaries: whether what CPU operators hold while they run is counted.
        anchored: whether what stand-ins return needs a gradient even if nothing before them does.
    """
    visits: list[Visit] = []
    timeline = Timeline(twin.resident(), temporaries=temporaries)
    with twin.mode:
        anchor = torch.empty(0, requires_grad=True) if anchored else None

    def stand_in(name: str) -> Any:
        def hook(_host: nn.Module, _inputs: tuple, x: Tensor) -> Tensor:
            grad = torch.is_grad_enabled()
            differentiable = x.requires_grad and grad
            arrival = Arrival(x.shape, x.stride(), x.dtype, x.device, differentiable, grad)
            return _StandIn.apply(x, anchor, partial(Visit, name, arrival), timeline, visits)

        return hook

    handles = [twin.model.get_submodule(n).register_forward_hook(stand_in(n)) for n in names]
    try:
        stop = twin.run(timeline, gradients=gradients)
    finally:
        for handle in handles:
            handle.remove()
    return Run(timeline.levels, visits, stop)


def run_alone(twin: Twin, attention: nn.Module, arrival: Arrival, *, temporaries: bool) -> Own:
    """What attention takes by itself, on fakes of what arrives."""
    with twin.mode:
        source = torch.empty(0, requires_grad=arrival.differentiable)
    timeline = Timeline(attention.parameters(), temporaries=temporaries)
    with twin.mode, timeline, torch.set_grad_enabled(arrival.gradients):
        x = _Input.apply(source, arrival)
        life, before = timeline.life(x), timeline.alive
        y = attention(x)
        size = y.nbytes
        forward, multiply_adds = max(timeline.levels) - before, timeline.multiply_adds
        end = _Output.apply(y)
        del x, y
        keeps_input = life is not None and life.death is None
        kept = timeline.alive
        if not arrival.gradients:
            return Own(forward, 0, False, 0, multiply_adds)
        begun = len(timeline.levels)
        end.backward()
        attention.zero_grad(set_to_none=True)
    backward = max(timeline.levels[begun:]) - kept - size
    return Own(forward, kept - before * keeps_input, keeps_input, backward, multiply_adds)


def levels_with(run: Run, name: str | None = None, *, keeps_input: bool = False) -> list[int]:
    """The levels of a run if only one of its stand-ins were there, or none of them.

    Args:
        run: the run.
        name: of the stand-in's module.
        keeps_input: whether it keeps what it gets, as long as its marker.
    """
    changes = _Changes(len(run.levels))
    # What the plain model has in place of a stand-in's output, and how long that lives.
    truth: dict[int, Life | None] = {}
    ends: dict[int, int] = {}

    def keep(x: Life | None, end: int) -> None:
        if x is not None:
            so_far = ends.get(id(x), changes.end_of(x))
            changes.add(x.size, so_far, end)
            ends[id(x)] = max(so_far, end)

    for visit in run.visits:
        x = truth.get(id(visit.x), visit.x)
        if visit.name != name:
            end = changes.end_of(visit.y)
            changes.add(-visit.y.size, visit.y.birth, end)
            keep(x, end)
            truth[id(visit.y)] = x
        elif keeps_input:
            keep(x, changes.end_of(visit.marker))
    return changes.applied_to(run.levels)


def peak(
    levels: Sequence[int], visits: Sequence[Visit], own: Mapping[Arrival, Own], grown: int
) -> int:
    """The most bytes alive in a model with attention at a place.

    Args:
        levels: of the model with the stand-in there.
        visits: the calls of the place.
        own: what attention takes, for all that arrives.
        grown: bytes of the gradients of its parameters.
    """
    changes = _Changes(len(levels))
    for visit in visits:
        end = changes.end_of(visit.marker)
        changes.add(own[visit.arrival].kept, visit.marker.birth, end)
    gradients = [visit.gradient for visit in visits if visit.gradient is not None]
    if gradients:
        changes.add(grown, min(gradients) + 1, len(levels))
    levels = changes.applied_to(levels)
    during = [levels[v.begin] - v.y.size + own[v.arrival].forward for v in visits]
    during += [
        levels[v.gradient] + own[v.arrival].backward for v in visits if v.gradient is not None
    ]
    return max(*levels, *during)


class _Changes:
    """Bytes added to levels over intervals of operators, ``[start, end)``."""

    def __init__(self, length: int):
        self._length = length
        self._steps = [0] * (length + 1)

    def end_of(self, life: Life) -> int:
        return self._length if life.death is None else life.death

    def add(self, size: int, start: int, end: int) -> None:
        if start < end:
            self._steps[start] += size
            self._steps[end] -= size

    def applied_to(self, levels: Sequence[int]) -> list[int]:
        return [level + more for level, more in zip(levels, accumulate(self._steps), strict=False)]


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _anchor: Tensor | None,
        build_visit: Callable[..., Visit],
        timeline: Timeline,
        visits: list[Visit],
    ) -> Tensor:
        begin, y = len(timeline.levels), torch.empty_like(x)
        marker = x.new_empty(1, dtype=torch.uint8)
        lives = [timeline.life(tensor) for tensor in (x, y, marker)]
        ctx.visit = build_visit(*lives, begin)
        ctx.timeline = timeline
        ctx.save_for_backward(marker)
        visits.append(ctx.visit)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        # Unpacked here, as attention does: a checkpoint computes it anew.
        (_marker,) = ctx.saved_tensors
        ctx.visit.gradient = len(ctx.timeline.levels)
        # Without memory, but an operator: a moment of its own.
        d_x = d_y.view_as(d_y)
        return d_x if ctx.needs_input_grad[0] else None, None, None, None, None


class _Input(torch.autograd.Function):
    """What arrives, as something computed: nobody but attention keeps it, or its gradient."""

    @staticmethod
    def forward(ctx: Any, _source: Tensor, arrival: Arrival) -> Tensor:
        shape, stride, dtype, device, *_ = arrival
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx: Any, _d_x: Tensor) -> Any:
        return None, None


class _Output(torch.autograd.Function):
    """An end to begin backward from: the gradient of ``y`` is there, and nobody else keeps it, or ``y``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.like = (tuple(y.shape), y.stride(), y.dtype, y.device)
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        shape, stride, dtype, device = ctx.like
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
