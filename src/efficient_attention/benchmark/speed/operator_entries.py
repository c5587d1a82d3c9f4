"""Who computes the operator, or stands in its place, on ``query``, ``key`` and ``value``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ...ops import dot_product_attention, efficient_attention, native_launch
from ...testing import plain_attention
from . import floors, packages
from .compiling import compiled
from .entries import OURS, Call, Entry, Unavailable
from .problems import Operator, Task

__all__ = ["OPERATOR"]


def _calling(function: Callable[..., Tensor], task: Task) -> Call:
    leaves = task.leaves()
    return Call(function, tuple(leaves.values()), leaves)


def _triton(task: Task) -> Call:
    if task.problem.device == "cpu":
        raise Unavailable("its kernels are for GPUs")
    return _calling(partial(efficient_attention, backend="triton"), task)


def _native(task: Task) -> Call:
    if reason := native_launch.why_not(task.inputs["query"]):
        raise Unavailable(reason)
    return _calling(partial(efficient_attention, backend="native"), task)


def _compiled(task: Task) -> Call:
    return _calling(compiled(plain_attention, task.problem.device), task)


def _fused(task: Task) -> Call:
    problem = task.problem
    assert isinstance(problem, Operator)
    if problem.key_channels == problem.value_channels:
        return _calling(F.scaled_dot_product_attention, task)
    # Its fused kernels take no others; ours fills up with zeros, as anybody would.
    return _calling(partial(dot_product_attention, scale=problem.key_channels**-0.5), task)


OPERATOR = {
    OURS: Entry(
        "efficient_attention, with all its defaults; nothing built",
        partial(_calling, efficient_attention),
    ),
    "triton": Entry('efficient_attention(..., backend="triton")', _triton),
    "native": Entry(
        'efficient_attention(..., backend="native"): in C, where somebody has built it', _native
    ),
    "plain": Entry(
        "the equations, line by line: q.softmax(-1) @ (k.softmax(-2).mT @ v)",
        partial(_calling, plain_attention),
    ),
    "compiled": Entry("the same by torch.compile, for each shape anew", _compiled),
    "SDPA": Entry(
        "dot-product attention, fused: F.scaled_dot_product_attention", _fused, "other", 2
    ),
    "LAT": Entry(
        "linear-attention-transformer, linear_attn: divides by the root of Dk besides",
        packages.linear_attention_transformer_operator,
        "other",
    ),
    "FLA": Entry(
        "flash-linear-attention, chunk_linear_attn: causal, without softmax; the nearest it has",
        packages.flash_linear_attention,
        "other",
    ),
    "products": Entry(
        "floor: the two products alone, into memory that is there; six in training",
        floors.operator_products,
        "floor",
    ),
    "copy": Entry("floor: copying what must be read and written once", floors.copy, "floor"),
}
