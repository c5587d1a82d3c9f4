"""A model run on fake tensors, which have shapes and no values: it takes no memory, and what it would is counted."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .arithmetic import multiply_adds
from .temporaries import bytes_during

_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(eq=False)
class Life:
    """When the memory behind tensors was there: after how many operators it came and, perhaps, went."""

    size: int
    birth: int
    death: int | None = None


class Timeline(TorchDispatchMode):
    """What is alive while operators run; resident tensors, which were there before, are not counted.

    Attributes:
        alive: bytes of tensors now.
        levels: the most bytes that were alive during each operator, in order.
        multiply_adds: of the operators so far, as PyTorch's counter has them.
    """

    def __init__(self, resident: Iterable[Tensor], *, temporaries: bool = True):
        super().__init__()
        self.alive = 0
        self.levels: list[int] = []
        self.multiply_adds = 0
        self._temporaries = temporaries
        self._lives: dict[int, Life | None] = {_identity(x): None for x in resident}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Half of all calls, and nothing that takes memory.
            return args[0].fake_device
        kwargs = kwargs or {}
        before = self.alive
        result = operator(*args, **kwargs)
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self._watch(x)
        during = bytes_during(operator, args, result) if self._temporaries else 0
        self.levels.append(max(self.alive, before + during))
        if not torch.is_grad_enabled():
            self.multiply_adds += multiply_adds(operator, args, kwargs, result)
        return result

    def life(self, x: Tensor) -> Life | None:
        """Of the memory behind ``x``; ``None`` for what is not counted."""
        return self._lives.get(_identity(x))

    def _watch(self, x: Tensor) -> None:
        storage, identity = x.untyped_storage(), _identity(x)
        if identity not in self._lives:
            self._lives[identity] = Life(storage.nbytes(), birth=len(self.levels))
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._release, identity)

    def _release(self, identity: int) -> None:
        life = self._lives.pop(identity)
        assert life is not None, "resident tensors are not watched"
        life.death = len(self.levels)
        self.alive -= life.size


class Stop(NamedTuple):
    """Where a run ended early, and why: what follows depends on values."""

    module: str
    reason: str


class Twin:
    """A fake copy of a model with its inputs, to be run again and again; the model is not touched.

    Parameters and buffers on ``meta`` become fake ones on the CPU.

    Args:
        model: the model.
        example: an input, a tuple of positional ones or a dict of keyword ones.
    """

    def __init__(self, model: nn.Module, example: Any):
        # Autograd starts its threads with its first pass, one for each device. Under fake tensors it would find devices
        # that are not there, and a process with such threads cannot be forked.
        with torch.inference_mode(False):
            torch.ones((), requires_grad=True).backward()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with _FakeCopies(self):
            self.model = copy.deepcopy(model)
        inputs = tree_map_only(Tensor, self.fake, example)
        self.args = inputs if isinstance(inputs, tuple) else ()
        self.kwargs = inputs if isinstance(inputs, dict) else {}
        if not self.args and not self.kwargs:
            self.args = (inputs,)

    def fake(self, x: Tensor) -> Tensor:
        """Shape, strides, dtype and device of ``x``, without memory."""
        if x.is_meta:
            with self.mode:
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
            return like.requires_grad_(x.requires_grad)
        return self.mode.from_tensor(x, static_shapes=True)

    def resident(self) -> list[Tensor]:
        """What is there before the model runs: parameters, buffers, inputs."""
        inputs = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *inputs]

    def run(self, timeline: Timeline, *, gradients: bool) -> Stop | None:
        """Run the model, and with ``gradients`` the backward pass of the sum of what it returns.

        Where the model ends early, the backward pass starts from what it held there.

        Raises:
            ValueError: parameters need gradients, and nothing that is returned leads to them.
        """
        stop = None
        with _unlogged(), self.mode, timeline, torch.set_grad_enabled(gradients):
            try:
                outputs = self.model(*self.args, **self.kwargs)
            except _UNKNOWN as error:
                stop = Stop(self.innermost(error.__traceback__), _reason(error))
                outputs = _held(error.__traceback__)
            if gradients:
                self._pull_back(outputs, stop)
                self.model.zero_grad(set_to_none=True)
        return stop

    def _pull_back(self, outputs: Any, stop: Stop | None) -> None:
        roots = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if roots:
            torch.autograd.backward([x.sum() for x in roots])
        elif stop is None and any(parameter.requires_grad for parameter in self.model.parameters()):
            got = type(outputs).__name__
            raise ValueError(f"outputs must hold tensors that need a gradient; got {got} without")

    def innermost(self, traceback: TracebackType | None) -> str:
        """The name of the last module that was interrupted."""
        names = {id(module): name for name, module in self.model.named_modules()}
        callers = [id(variables.get("self")) for variables in _frames(traceback)]
        inside = [names[caller] for caller in callers if caller in names]
        return inside[-1] if any(inside[-1:]) else "the model"


@contextmanager
def _unlogged() -> Iterator[None]:
    """Errors are raised, and not written to the log before, as fake tensors do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, that of several counted once."""
    return sum({_identity(x): x.untyped_storage().nbytes() for x in tensors}.values())


class _FakeCopies(TorchFunctionMode):
    """Copies that are made meanwhile are fake."""

    def __init__(self, twin: Twin):
        super().__init__()
        self._twin = twin

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__:
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = self._twin.fake(x)
            return memo[id(x)]
        # What parameters call to be copied.
        if function is torch._C.TensorBase.clone:
            return self._twin.fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, Any]]:
    """The variables of interrupted functions, from the outermost."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _held(traceback: TracebackType | None) -> list[Tensor]:
    """Tensors in the variables of interrupted functions: what the rest of the model would go on with."""
    variables = [list(frame.values()) for frame in _frames(traceback)]
    held = {id(x): x for x in tree_leaves(variables) if isinstance(x, Tensor) and x.requires_grad}
    return [x for x in held.values() if not x.is_leaf]


def _reason(error: Exception) -> str:
    operator = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, UnsupportedOperatorException):
        return f"shapes of {operator} are unknown"
    return f"{operator} needs values"


def _identity(x: Tensor) -> int:
    return x.untyped_storage()._cdata
