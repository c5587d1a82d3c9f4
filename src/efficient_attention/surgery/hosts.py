"""How an inserted module lives in its host, the module at the place.

It is a child of the host: parameters, ``state_dict``, ``to`` and distributed wrappers find it. ``nn.Sequential`` runs a
last child on its output by itself; any other host gets a forward hook, a function of this file that looks the child up
in the host it is called with. Nothing is wrapped or renamed, no class is made at run time and no hook holds state:
copies, pickles, replicas, compiler and export see an ordinary module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CHILD = "inserted_attention"
# Handles of hooks count from 0 in every process: in a model that was unpickled, the next hook to be registered may get
# the number of one that is there, and replace it. It never gets this one.
_HOOK = -1


def attach(host: nn.Module, attention: nn.Module) -> None:
    host.register_module(CHILD, attention)
    if not appends(host):
        host._forward_hooks[_HOOK] = _attend_to_output


def detach(host: nn.Module) -> None:
    delattr(host, CHILD)
    host._forward_hooks.pop(_HOOK, None)


def appends(host: nn.Module) -> bool:
    """Whether the host runs a last child on its output by itself."""
    return isinstance(host, nn.Sequential) and type(host).forward is nn.Sequential.forward


def unfit_to_host(_name: str, host: nn.Module) -> str | None:
    """Why nothing can be inserted here, or ``None``."""
    if hasattr(host, CHILD):
        return "it has inserted attention already; see remove()"
    container = isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return iterates(host) if container and not appends(host) else None


def iterates(host: nn.Module) -> str:
    """The reason against a host that goes over its children."""
    way_out = "would run one more as one of them; choose a module inside it or behind it"
    return f"it is a {type(host).__name__}, which goes over its children and {way_out}"


def _attend_to_output(host: nn.Module, _inputs: tuple, output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.is_nested:
        way_out = "build nn.TransformerEncoder with enable_nested_tensor=False"
        raise NotImplementedError(f"inserted attention takes no nested tensors; {way_out}")
    return getattr(host, CHILD)(output)
