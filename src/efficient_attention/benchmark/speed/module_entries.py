"""Who computes the module, or stands in its place, on a feature map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ...modules import EfficientAttention2d, NonLocal2d
from ...ops import native_launch
from . import floors, packages
from .authors import PaperModule
from .compiling import compiled
from .entries import OURS, Call, Entry, Unavailable
from .problems import Module, Task

__all__ = ["MODULE", "calling", "paper_module"]


def calling(task: Task, module: nn.Module, function: Callable[..., Tensor] | None = None) -> Call:
    """A module with the weights of the task, on its map.

    Args:
        task: of a module.
        module: with the keys of ours; or any, which keeps its weights.
        function: in place of the module itself, such as the module compiled.
    """
    weights = task.weights
    module = module.to(task.problem.device, next(iter(weights.values())).dtype)
    if weights.keys() == module.state_dict().keys():
        module.load_state_dict(weights)
    module.train(task.trains).requires_grad_(task.trains)
    leaves = task.leaves()
    return Call(
        module if function is None else function,
        tuple(leaves.values()),
        {**leaves, **dict(module.named_parameters())},
    )


def paper_module(problem: Module) -> PaperModule:
    """The authors' formulation, of a problem's sizes."""
    return PaperModule(
        problem.channels, problem.key_channels, problem.value_channels, problem.heads
    )


def _ours(task: Task, kind: type[nn.Module] = EfficientAttention2d) -> Call:
    problem = _of(task)
    module = kind(
        problem.channels, problem.key_channels, problem.value_channels, num_heads=problem.heads
    )
    return calling(task, module)


def _in_place(task: Task) -> Call:
    if task.trains:
        raise Unavailable("gradients need the input that it would write over")
    call, x = _ours(task), task.inputs["x"]
    call.function.inplace = True  # type: ignore[attr-defined]
    overwritten = x.clone()
    return call._replace(inputs=(overwritten,), before=lambda: overwritten.copy_(x))


def _triton(task: Task) -> Call:
    if task.problem.device == "cpu":
        raise Unavailable("its kernels are for GPUs")
    call = _ours(task)
    call.function.backend = "triton"  # type: ignore[attr-defined]
    return call


def _native(task: Task) -> Call:
    if reason := native_launch.why_not(task.inputs["x"]):
        raise Unavailable(reason)
    call = _ours(task)
    call.function.backend = "native"  # type: ignore[attr-defined]
    return call


def _paper(task: Task) -> Call:
    return calling(task, paper_module(_of(task)))


def _paper_compiled(task: Task) -> Call:
    module = paper_module(_of(task))
    return calling(task, module, compiled(module, task.problem.device))


def _of(task: Task) -> Module:
    assert isinstance(task.problem, Module)
    return task.problem


MODULE = {
    OURS: Entry("EfficientAttention2d, with all its defaults", _ours),
    "in place": Entry("the same with inplace = True, in evaluation", _in_place),
    "native": Entry('the same with backend = "native": in C, where somebody has built it', _native),
    "triton": Entry('the same with backend = "triton"', _triton),
    "authors": Entry(
        "the paper authors' formulation: convolutions, a loop over heads, concatenation", _paper
    ),
    "compiled": Entry("the same by torch.compile, for each shape anew", _paper_compiled),
    "non-local": Entry(
        "NonLocal2d: the same layers around fused dot-product attention",
        partial(_ours, kind=NonLocal2d),
        "other",
        2,
    ),
    "DDP": Entry(
        "denoising-diffusion-pytorch, LinearAttention: two norms and four learned tokens besides, as many value as "
        "key channels, no residual",
        packages.denoising_diffusion,
        "other",
    ),
    "LAT": Entry(
        "linear-attention-transformer, ImageLinearAttention: logits scaled, no residual",
        packages.linear_attention_transformer_module,
        "other",
    ),
    "Sana": Entry(
        "diffusers, SanaLinearAttnProcessor2_0 on tokens: ReLU in place of softmax, no residual, as many value as "
        "key channels",
        packages.sana,
        "other",
    ),
    "products": Entry(
        "floor: the four products of the folded order, into memory that is there; twelve in training",
        floors.module_products,
        "floor",
    ),
    "copy": Entry("floor: copying what must be read and written", floors.copy, "floor"),
}
