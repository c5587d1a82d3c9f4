"""Where attention could go in a model: which modules return features, and which of them to show.

A network has far more such modules than ways to go on from them. A stage is a run of modules, called one after another
by the same module, whose outputs have the same positions; its last block stands for it. What a stage is made of is not
looked into, and inside a block only positions count that are neither those of its input nor of its output.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..surgery.hosts import CHILD, unfit_to_host
from ..surgery.inference import layout
from ..surgery.places import Places, choose
from .simulation import Stop, Timeline, Twin


class Place(NamedTuple):
    """A module whose output attention could take.

    Attributes:
        name: of the module.
        dimensions: 1, 2, 3, ``"tokens"`` or ``"channels_last"``, as in :func:`insert`.
        channels: C.
        shapes: of what it returns, call by call.
    """

    name: str
    dimensions: int | str
    channels: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The largest that it returns."""
        return max(self.shapes, key=math.prod)

    @property
    def positions(self) -> int:
        """N, of one sample of the largest."""
        return math.prod(self.sides(self.shape))

    def sides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of a shape that count positions."""
        return tuple(shape[2:] if isinstance(self.dimensions, int) else shape[1:-1])


class _Call(NamedTuple):
    """One call of a module: the shape of the first tensor that it got, and what it returned."""

    name: str
    got: tuple[int, ...]
    output: Any


class Survey:
    """What every module of a model returns in evaluation, and where that run ended.

    Args:
        model: the model.
        twin: its fake copy.

    Attributes:
        stop: where the run ended early, or ``None``.
    """

    def __init__(self, model: nn.Module, twin: Twin):
        self._model = model
        self._calls: list[_Call] = []
        self.stop = self._run(twin)

    def _run(self, twin: Twin) -> Stop | None:
        twin.model.eval()
        handles = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in twin.model.named_modules()
            if CHILD not in name.split(".")
        ]
        try:
            return twin.run(Timeline(twin.resident()), gradients=False)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self._calls.append(_Call(name, shapes[0] if shapes else (), output))

        return note

    def chosen(self, places: Places) -> list[Place]:
        """The places that a caller means, in the order of the network.

        Raises:
            ValueError: as :func:`insert`, and for modules that return no features.
        """
        own = self._named_by_model
        if isinstance(places, str) or callable(places):
            places = [places]
        asked = [own.get(place, place) if isinstance(place, str) else place for place in places]
        names = choose(self._model, asked, self._unfit, passes_over=True)
        return [place for name, place in self._features.items() if name in names]

    def default(self) -> list[Place]:
        """The places that the model names, or else those that stand for its stages, in the order of the network."""
        features = self._features
        shown = {name for name in self._named_by_model.values() if name in features}
        shown = shown or set(self._stages())
        return [place for name, place in features.items() if name in shown]

    @cached_property
    def _named_by_model(self) -> dict[str, str]:
        """Modules by the names that a network of this package gives to its places."""
        places = getattr(self._model, "places", None)
        if not isinstance(places, Mapping):
            return {}
        return {name: place.module for name, place in places.items() if hasattr(place, "module")}

    @cached_property
    def _outputs(self) -> dict[str, list[Any]]:
        outputs = defaultdict(list)
        for call in self._calls:
            outputs[call.name].append(call.output)
        return dict(outputs)

    @cached_property
    def _found(self) -> dict[str, Place | str]:
        """For every module that was called its place, or why it is none, in the order of first returns."""
        return {name: self._place(name) for name in self._outputs}

    @cached_property
    def _features(self) -> dict[str, Place]:
        return {name: found for name, found in self._found.items() if isinstance(found, Place)}

    def _place(self, name: str) -> Place | str:
        outputs = self._outputs[name]
        try:
            found = {layout(self._model, name, {}, output) for output in outputs}
        except (ValueError, TypeError) as error:
            return str(error)
        if len(found) > 1:
            return f"it returns different channels: {found}"
        if not all(output.is_floating_point() for output in outputs):
            return f"it returns {outputs[0].dtype}"
        return Place(name, *found.pop(), tuple(tuple(output.shape) for output in outputs))

    def _unfit(self, name: str, module: nn.Module) -> str | None:
        """Why a module is no place, or ``None``."""
        before = f" before {self.stop.module}, where {self.stop.reason}" if self.stop else ""
        found = self._found.get(name, f"it is not called{before}")
        return unfit_to_host(name, module) or (found if isinstance(found, str) else None)

    def _stages(self) -> Iterator[str]:
        """Modules that stand for a stage, of two positions and two channels at least."""
        calls: dict[str, list[_Call]] = defaultdict(list)
        for call in self._calls:
            if call.name:
                calls[self._caller(call.name)].append(call)
        names = Counter(map(id, dict(self._model.named_modules(remove_duplicate=False)).values()))
        top = self._below_wrappers(calls)
        for caller in calls:
            if self._depth(caller, top, calls) > 1:
                continue
            for run in self._runs(caller, top, calls[caller]):
                # The last block; where there is none, the last layer.
                for name in sorted(run, key=lambda name: name in calls, reverse=True):
                    module, place = self._model.get_submodule(name), self._features[name]
                    single = names[id(module)] == 1 and not self._unfit(name, module)
                    if single and place.positions > 1 and place.channels > 1:
                        yield name
                        break

    def _caller(self, name: str) -> str:
        """The module around one that was seen to return, or the model."""
        name = name.rpartition(".")[0]
        return name if name in self._outputs or not name else self._caller(name)

    def _below_wrappers(self, calls: Mapping[str, list[_Call]]) -> str:
        """The model, or what it does nothing but call."""
        name = ""
        while not self.stop and len(inner := {call.name for call in calls.get(name, ())}) == 1:
            (name,) = inner
        return name

    def _depth(self, name: str, top: str, calls: Mapping[str, list[_Call]]) -> int:
        """How many blocks a module is in, itself included: what returns features and calls more than one module."""
        if not name or name == top:
            return 0
        block = name in self._features and len({call.name for call in calls.get(name, ())}) > 1
        return block + self._depth(self._caller(name), top, calls)

    def _runs(self, caller: str, top: str, calls: list[_Call]) -> Iterator[list[str]]:
        """Names of modules that return the same positions, one after another; the last one first."""
        ends: set[Any] = {None}
        if caller not in ("", top) and caller in self._features:
            around = [call for call in self._calls if call.name == caller]
            shapes = [shape for call in around for shape in (call.got, tuple(call.output.shape))]
            ends |= {self._features[caller].sides(shape) for shape in shapes}
        for sides, run in groupby(calls, key=self._sides):
            if sides not in ends:
                yield list(dict.fromkeys(call.name for call in reversed(list(run))))

    def _sides(self, call: _Call) -> tuple[int, ...] | None:
        place = self._features.get(call.name)
        return place and place.sides(tuple(call.output.shape))
