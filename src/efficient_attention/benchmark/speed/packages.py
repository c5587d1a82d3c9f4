"""Other people's packages, imported where they are used: ``pip install 'efficient-attention[peers]'``."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor, nn

from .entries import Call, Unavailable
from .problems import Module, Task

__all__ = [
    "denoising_diffusion",
    "flash_linear_attention",
    "linear_attention_transformer_module",
    "linear_attention_transformer_operator",
    "sana",
]


def linear_attention_transformer_operator(task: Task) -> Call:
    """Its function for sequences, which takes our layout, with as many key as value channels."""
    package = _installed("linear_attention_transformer.linear_attention_transformer")
    leaves = task.leaves()
    if leaves["query"].shape[-1] != leaves["value"].shape[-1]:
        raise Unavailable("it needs as many value as key channels")
    return Call(package.linear_attn, tuple(leaves.values()), leaves)


def flash_linear_attention(task: Task) -> Call:
    """Its causal kernel, ``[B, N, H, D]``, which is given copies in that layout."""
    if task.problem.device == "cpu":
        raise Unavailable("its kernels are for GPUs")
    package = _installed("fla.ops.linear_attn")
    leaves = {
        name: x.transpose(1, 2).contiguous().requires_grad_(task.trains)
        for name, x in task.inputs.items()
    }

    def first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, _ = package.chunk_linear_attn(query, key, value, normalize=False)
        return output

    return Call(first, tuple(leaves.values()), leaves)


def denoising_diffusion(task: Task) -> Call:
    """The attention of its U-Net."""
    package = _installed("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    problem = _of(task)
    head = problem.key_channels // problem.heads
    return _with_weights(
        task, package.LinearAttention(problem.channels, heads=problem.heads, dim_head=head)
    )


def linear_attention_transformer_module(task: Task) -> Call:
    """Its module for pictures."""
    package = _installed("linear_attention_transformer.images")
    problem = _of(task)
    module = package.ImageLinearAttention(
        problem.channels,
        key_dim=problem.key_channels // problem.heads,
        value_dim=problem.value_channels // problem.heads,
        heads=problem.heads,
    )
    return _with_weights(task, module)


def sana(task: Task) -> Call:
    """Its processor in the attention layer of its library, on tokens ``[B, N, C]``, which it is given as such."""
    package = _installed("diffusers.models.attention_processor")
    problem = _of(task)
    module = package.Attention(
        problem.channels,
        heads=problem.heads,
        dim_head=problem.key_channels // problem.heads,
        bias=True,
        processor=package.SanaLinearAttnProcessor2_0(),
    )
    call = _with_weights(task, module)
    tokens = task.inputs["x"].flatten(2).mT.contiguous().requires_grad_(task.trains)
    return call._replace(inputs=(tokens,), leaves={**call.leaves, "x": tokens})


def _with_weights(task: Task, module: nn.Module) -> Call:
    """A module with the weights that it began with."""
    dtype = task.inputs["x"].dtype
    module = module.to(task.problem.device, dtype).train(task.trains).requires_grad_(task.trains)
    leaves = task.leaves()
    return Call(module, tuple(leaves.values()), {**leaves, **dict(module.named_parameters())})


def _installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"not installed ({error.name}): pip install 'efficient-attention[peers]'"
        ) from error


def _of(task: Task) -> Module:
    assert isinstance(task.problem, Module)
    return task.problem
