"""How an inserted module lives in its host, the module at the place.

It is a child of the host: parameters, ``state_dict``, ``to`` and distributed wrappers find it. ``nn.Sequential`` runs a
last child on its output by itself; any other host gets a forward hook, a function of this file that looks the child up
in the host it is called with. Nothing is wrapped or renamed, no class is made at run time and no hook holds state:
copies, pickles, replicas, compiler and export see an ordinary module.
"""

from __future__ import annotations

from typing import Any

import torch
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


def cannot_host(name: str, host: nn.Module) -> str | None:
    """Why a module of this kind takes no attention, or ``None``."""
    if "parametrizations" in name.split("."):
        return "it makes a parametrized weight, not features; choose the layer that has the weight"
    if isinstance(host, torch.jit.ScriptModule):
        return "it is scripted or traced, a program that takes no more modules; insert before that"
    container = isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return iterates(host) if container and not appends(host) else None


def unfit_to_host(name: str, host: nn.Module) -> str | None:
    """Why nothing can be inserted here, or ``None``."""
    if hasattr(host, CHILD):
        return "it has inserted attention already; see remove()"
    return cannot_host(name, host)


def compiled_around(model: nn.Module, name: str) -> str | None:
    """The reason against a place in a compiled module: its program is not guarded against new hooks."""
    around = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)] if name else []
    for outer in (*around, ""):
        module = model.get_submodule(outer)
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            said = repr(outer) if outer else "the model"
            return f"{said} is compiled, and its program would not notice; insert, then compile"
    return None


def iterates(host: nn.Module) -> str:
    """The reason against a host that goes over its children."""
    way_out = "would run one more as one of them; choose a module inside it or behind it"
    return f"it is a {type(host).__name__}, which goes over its children and {way_out}"


def _attend_to_output(host: nn.Module, _inputs: tuple, output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.is_nested:
        way_out = "build nn.TransformerEncoder with enable_nested_tensor=False"
        raise NotImplementedError(f"inserted attention takes no nested tensors; {way_out}")
    return getattr(host, CHILD)(output)
