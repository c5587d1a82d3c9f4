"""Runs of one model, plain and with attention at its places, and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..surgery.inference import placement
from ..surgery.places import build_at
from .candidates import Place
from .costing import Arrival, Own, Run, levels_with, peak, run_alone, run_with_stand_ins
from .kinds import KINDS, build
from .result import Cost, PlannedPlace
from .simulation import Timeline, Twin, in_one_line, nbytes


class Runs:
    """Runs of a model on its input.

    Args:
        twin: the fake copy of the model.
        called: names of the modules at places, all of which a run with gradients has to call.
        temporaries: whether what CPU operators hold while they run is counted.
        optimizer_states: numbers that the optimizer keeps for each parameter.

    Attributes:
        notes: how training is planned, if not in training mode.
    """

    def __init__(
        self, twin: Twin, called: Collection[str], *, temporaries: bool, optimizer_states: int
    ):
        self._twin = twin
        self._called = called
        self._temporaries = temporaries
        self._states = optimizer_states
        self.notes: list[str] = []
        # By what a module prints and what it gets: the same at all places of one size.
        self._own: dict[tuple[str, Arrival], Own] = {}
        self._mode, self._shared = True, None
        found = self._run_training(True)
        if isinstance(found, str):
            training = "training is planned in evaluation mode, with gradients: in training mode"
            self.notes = [f"{training} {found}"]
            self._mode, found = False, self._run_training(False)
        if isinstance(found, str):
            self.notes = [f"training is not planned: {found}"]
        else:
            self._shared = found

    def plain(self) -> Cost:
        """What the model costs as it is."""
        self._twin.model.eval()
        timeline = Timeline(self._twin.resident(), temporaries=self._temporaries)
        self._twin.run(timeline, gradients=False)
        training = None
        if self._shared is not None:
            training = max(levels_with(self._shared)) + self._standing(gradients=True)
        return Cost(
            parameters=sum(p.numel() for p in self._twin.model.parameters()),
            multiply_adds=timeline.multiply_adds,
            inference=max(timeline.levels) + self._standing(gradients=False),
            training=training,
        )

    def at(self, place: Place, options: Mapping[str, Any]) -> PlannedPlace:
        """What the model costs with each kind of attention at a place."""
        self._twin.model.eval()
        inference = self._run([place.name], gradients=False)
        training = self._training_run(place)
        costs = {}
        for kind, attention in self._build(place, options).items():
            bytes_, multiply_adds = self._peak(inference, place, attention, gradients=False)
            costs[kind] = Cost(
                parameters=sum(p.numel() for p in attention.parameters()),
                multiply_adds=multiply_adds,
                inference=bytes_,
                training=training and self._peak(training, place, attention, gradients=True)[0],
            )
        return PlannedPlace(
            place.name, place.shape, place.positions, place.channels, len(place.shapes), costs
        )

    def _run_training(self, mode: bool) -> Run | str:
        """A run with gradients in a mode of the model, or why it does not do."""
        self._twin.model.train(mode)
        try:
            run = self._run(self._called, gradients=True)
        except Exception as error:
            return f"the model raises {in_one_line(error)}"
        missing = sorted(set(self._called) - {visit.name for visit in run.visits})
        if not missing:
            return run
        ends = (
            f"stops at {run.stop.module}, where {run.stop.reason}, and" if run.stop else "ends and"
        )
        return f"the model {ends} has not called {missing}"

    def _training_run(self, place: Place) -> Run | None:
        """A run with gradients in which what attention returns at a place needs one."""
        if self._shared is None:
            return None
        arrivals = [visit.arrival for visit in self._shared.visits if visit.name == place.name]
        if all(arrival.differentiable for arrival in arrivals if arrival.gradients):
            return self._shared
        # The layers before it are not trained: what follows is kept for the sake of the attention alone.
        self._twin.model.train(self._mode)
        return self._run([place.name], gradients=True, anchored=True)

    def _run(self, names: Collection[str], *, gradients: bool, anchored: bool = False) -> Run:
        return run_with_stand_ins(
            self._twin, names, gradients=gradients, temporaries=self._temporaries, anchored=anchored
        )

    def _build(self, place: Place, options: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Attention of every kind that there is with these options."""
        built = {}
        with self._twin.mode:
            own = {**options, **placement(self._twin.model, place.name)}
            for kind in KINDS:
                module = build_at(place.name, build, kind, place.dimensions, place.channels, own)
                if module is not None:
                    built[kind] = module
        return built

    def _peak(
        self, run: Run, place: Place, attention: nn.Module, *, gradients: bool
    ) -> tuple[int, int]:
        """Bytes of the model with attention at a place, and multiply-adds of the attention."""
        visits = [visit for visit in run.visits if visit.name == place.name]
        own = {}
        for arrival in {visit.arrival for visit in visits}:
            key = str(attention), arrival
            if key not in self._own:
                self._own[key] = run_alone(
                    self._twin, attention, arrival, temporaries=self._temporaries
                )
            own[arrival] = self._own[key]
        size = nbytes(attention.parameters())
        keeps_input = any(alone.keeps_input for alone in own.values())
        levels = levels_with(run, place.name, keeps_input=keeps_input)
        highest = peak(levels, visits, own, grown=size)
        standing = self._standing(gradients) + size * (1 + gradients * self._states)
        return highest + standing, sum(own[visit.arrival].multiply_adds for visit in visits)

    def _standing(self, gradients: bool) -> int:
        """Bytes that are there all the time: parameters, buffers, inputs, and what the optimizer keeps."""
        trained = [p for p in self._twin.model.parameters() if p.requires_grad]
        return nbytes(self._twin.resident()) + gradients * self._states * nbytes(trained)
