"""How ``torch.fx`` sees the modules: as one operation each, like the layers of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

__all__ = ["one_operation"]

P = ParamSpec("P")
R = TypeVar("R")


def one_operation(
    forward: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Make a module's ``forward`` a single node of a symbolic trace, whoever traces.

    The order of a computation depends on the sizes of its inputs, which a symbolic trace does not know. A tracer asks
    itself which modules it goes into, and goes into all that PyTorch does not own; so the module answers for it.

    Raises:
        NotImplementedError: when called in a trace of the module itself, which has nothing around that one node.
    """

    @functools.wraps(forward)
    def traced_or_run(self: nn.Module, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        # A tracer hands the arguments over one by one, or, to the module that it was started with, all as one.
        given = (args,) if isinstance(args, torch.fx.Proxy) else (*args, *kwargs.values())
        proxy: Any = next((x for x in given if isinstance(x, torch.fx.Proxy)), None)
        if proxy is None:
            return forward(self, *args, **kwargs)
        name = proxy.tracer.path_of_module(self)
        if not name:
            raise NotImplementedError(
                f"{type(self).__name__} is one operation to torch.fx; trace the network around it"
            )
        return proxy.tracer.create_proxy("call_module", name, args, kwargs)

    return traced_or_run
