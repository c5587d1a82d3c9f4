"""How this project compares numbers: for its tests, its benchmark's gate, and whoever adds a backend.

A tolerance is never chosen by hand. An implementation may err from the float64 truth at most twice as much as the
plain equations do when they are run in the same low precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MODULE_RESULTS",
    "ModuleInputs",
    "assert_as_precise_as_plain",
    "assert_module_as_precise_as_plain",
    "attention_results",
    "layouts",
    "make_inputs",
    "make_module_inputs",
    "module_results",
    "plain_attention",
    "plain_module",
    "relative_error",
]

#: The output of a folded module, and what its gradients are of.
MODULE_RESULTS = (
    *("output", "x", "source"),
    *(f"{kind} {i}" for kind in ("weights", "biases") for i in range(4)),
)


def make_inputs(
    batch: int = 2,
    heads: int = 3,
    queries: int = 37,
    keys: int = 53,
    key_channels: int = 8,
    value_channels: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal ``query [B, H, N, Dk]``, ``key [B, H, M, Dk]`` and ``value [B, H, M, Dv]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, key_channels),
        (batch, heads, keys, key_channels),
        (batch, heads, keys, value_channels),
    )
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    for x in (query, key, value):
        x.requires_grad_(requires_grad)
    return query, key, value


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same ``[B, H, N, D]`` in every layout that has a way of its own; between strided numbers is NaN."""
    wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return {
        "contiguous": x.contiguous(),
        "token-major": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channel-major": x.mT.contiguous().mT,
        "strided": wide[..., 1::2],
    }


def attention_results(function: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The output of a function of query, key and value, and their gradients for one slope in every dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return output, *torch.autograd.grad(output, leaves, slope)


class ModuleInputs(NamedTuple):
    """What a folded module takes: ``x [B, C, N]``, ``source [B, S, M]`` (None: x), its four layers, its heads."""

    x: Tensor
    source: Tensor | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    heads: int


def make_module_inputs(
    batch: int,
    channels: int,
    source_channels: int | None,
    key_channels: int,
    value_channels: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokens: bool = False,
) -> ModuleInputs:
    """Layers as they are initialized, on standard normal inputs; ``tokens``: the channels of a position are neighbours.

    Every number is one that the dtype can hold, so that the truth starts from the same.
    """

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64) * scale
        return x.to(dtype).to(device)

    def features(channels: int, positions: int) -> Tensor:
        if tokens:
            return draw(batch, positions, channels).mT
        return draw(batch, channels, positions)

    x = features(channels, queries)
    source = None if source_channels is None else features(source_channels, keys)
    attended = channels if source_channels is None else source_channels
    shapes = (
        *((key_channels, channels), (key_channels, attended)),
        *((value_channels, attended), (channels, value_channels)),
    )
    weights = [draw(*shape, scale=shape[1] ** -0.5) for shape in shapes]
    return ModuleInputs(x, source, weights, [draw(len(w), scale=0.3) for w in weights], heads)


def module_results(
    function: Callable,
    inputs: ModuleInputs,
    key_mask: Tensor | None,
    normalization: str,
    *,
    residual: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """The output of a function of a folded module, and the gradients of all that has one, as ``MODULE_RESULTS``."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

    x, source = leaf(inputs.x), leaf(inputs.source)
    weights, biases = ([leaf(t) for t in ts] for ts in (inputs.weights, inputs.biases))
    output = function(x, source, key_mask, weights, biases, normalization, inputs.heads, residual)
    output = output[0] if isinstance(output, tuple) else output
    slope = torch.randn(output.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    variables = (x, source, *weights, *biases)
    leaves = [t for t in variables if t is not None]
    found = iter(torch.autograd.grad(output, leaves, slope.to(output)))
    return output, *(None if t is None else next(found) for t in variables)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    normalization: str = "softmax",
) -> Tensor:
    """The equations as a user would type them, every step in the inputs' dtype; ``key_mask`` is ``[B, M]``."""
    if normalization == "softmax":
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        return query.softmax(-1) @ (key.softmax(-2).mT @ value)
    if key_mask is None:
        return query @ ((key / key.shape[-2]).mT @ value)
    value = value.masked_fill(~key_mask[:, None, :, None], 0)
    count = key_mask.sum(-1)[:, None, None, None].to(key.dtype)
    return query @ ((key / count).mT @ value)


def plain_module(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    normalization: str,
    heads: int,
    residual: bool,
) -> Tensor:
    """The module as a user would type it, every step in the inputs' dtype; ``key_mask`` is ``[B, M]``."""
    attended = x if source is None else source
    if key_mask is not None:
        attended = attended.masked_fill(~key_mask.unsqueeze(1), 0)
    query, key, value = (
        (w @ y + b.unsqueeze(-1)).unflatten(1, (heads, -1))
        for w, b, y in zip(weights[:3], biases[:3], (x, attended, attended), strict=True)
    )
    count = key.shape[-1] if key_mask is None else key_mask.sum(-1)[:, None, None, None]
    hidden = torch.zeros((), dtype=torch.bool) if key_mask is None else ~key_mask[:, None, None]
    hidden = hidden.to(x.device)
    if normalization == "softmax":
        query, key = query.softmax(2), key.masked_fill(hidden, -torch.inf).softmax(-1)
    else:
        key = (key / count).masked_fill(hidden, 0).to(x.dtype)
    output = weights[3] @ ((key @ value.mT).mT @ query).flatten(1, 2) + biases[3].unsqueeze(-1)
    return x + output if residual else output


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``|got - truth| / |truth|`` in the Frobenius norm, computed in float64."""
    truth = truth.detach().double()
    distance = (got.detach().double() - truth).norm()
    return (distance / truth.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def assert_as_precise_as_plain(got: Tensor, plain: Tensor, truth: Tensor, what: str = "") -> None:
    """``got`` errs at most twice as much as ``plain`` from the float64 ``truth``, or by one rounding of its dtype.

    Raises:
        AssertionError: with both errors, and ``what`` was compared.
    """
    error, allowed = relative_error(got, truth), 2 * relative_error(plain, truth)
    allowed = max(allowed, torch.finfo(got.dtype).eps)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def assert_module_as_precise_as_plain(
    got: Sequence[Tensor | None], plain: Sequence[Tensor | None], truth: Sequence[Tensor | None]
) -> None:
    """As :func:`assert_as_precise_as_plain`, for all ``MODULE_RESULTS``; what is zero in truth has to be zero.

    The few numbers of one bias are right by chance now and then, by the order in which a processor's library sums them:
    what counts is the largest error that the plain equations make in any of the weights, or in any of the biases and
    the weight of the same layer.

    Raises:
        AssertionError: with both errors, and what was compared.
    """
    compared = {}
    for name, *results in zip(MODULE_RESULTS, got, plain, truth, strict=True):
        ours, low, exact = results
        if ours is None or low is None or exact is None:
            continue
        compared[name] = ours, low, exact
    size = compared["output"][2].norm()
    zeros = {name for name, (*_, exact) in compared.items() if exact.norm() < 1e-9 * size}
    twice = {
        name: max(2 * relative_error(low, exact), torch.finfo(ours.dtype).eps)
        for name, (ours, low, exact) in compared.items()
        if name not in zeros
    }

    def allowed(name: str) -> float:
        kind, *layer = name.split()
        of_layer = f"weights {layer[0]}" if kind == "biases" else name
        # Never as much as zeros would err.
        return min(
            max(x for other, x in twice.items() if other.startswith(kind) or other == of_layer), 0.5
        )

    for name, (ours, _, exact) in compared.items():
        if name in zeros:
            assert not ours.any(), f"{name}: not zero"
            continue
        error, limit = relative_error(ours, exact), allowed(name)
        assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.2e}"
