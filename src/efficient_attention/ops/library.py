"""The private operators: schemas, shapes and gradients, for PyTorch's dispatcher, compiler and exporters.

``torch.ops.efficient_attention.{summarize, attend, folded}`` and their backwards are the seam between the public
functions and modules and the implementations; backends.py has what the dispatcher picks from.
Arguments arrive checked by functional.py. ``needs`` says which of its gradients a backward is asked for; the others are
neither computed nor allocated, but empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import AUTO_ON_CUDA, implementation
from .differentiation import pull_back
from .flops import register_when_counting
from .layout import empty_gradient, empty_output
from .precision import accumulation_dtype

_LIBRARY = torch.library.Library("efficient_attention", "DEF")
_MODULE = "Tensor? key_mask, Tensor[] weights, Tensor?[] biases, str normalization, int num_heads, bool residual"
_SCHEMAS = {
    "summarize": "(Tensor key, Tensor value, Tensor? key_mask, str normalization, *, "
    "str backend='auto') -> (Tensor mean, Tensor log_weight, Tensor shift, Tensor total)",
    "summarize_backward": "(Tensor d_mean, Tensor? d_log_weight, Tensor key, Tensor value, Tensor? key_mask, "
    "Tensor mean, Tensor shift, Tensor total, str normalization, bool[2] needs, *, "
    "str backend='auto') -> (Tensor d_key, Tensor d_value)",
    "attend": "(Tensor query, Tensor mean, str normalization, int num_groups, *, str backend='auto') "
    "-> Tensor output",
    "attend_backward": "(Tensor d_output, Tensor query, Tensor mean, str normalization, int num_groups, "
    "bool[2] needs, *, str backend='auto') -> (Tensor d_query, Tensor d_mean)",
    "folded": f"(Tensor x, Tensor? source, {_MODULE}, *, str backend='auto') "
    "-> (Tensor output, Tensor pooled, Tensor shift, Tensor total, Tensor column_sums)",
    "folded_": f"(Tensor(a!) x, Tensor? source, {_MODULE}, *, str backend='auto') -> ()",
    "folded_backward": f"(Tensor d_output, Tensor x, Tensor? source, {_MODULE}, Tensor pooled, Tensor shift, "
    f"Tensor total, Tensor column_sums, bool[3] needs, *, str backend='auto') "
    f"-> ({', '.join(['Tensor'] * 10)})",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.efficient_attention
summarize = _ops.summarize.default
summarize_backward = _ops.summarize_backward.default
attend = _ops.attend.default
attend_backward = _ops.attend_backward.default
folded = _ops.folded.default
folded_ = _ops.folded_.default
folded_backward = _ops.folded_backward.default


def serves_plain_tensors_only() -> str | None:
    """Why the operators cannot serve the call in progress, or ``None`` if they can.

    Under forward-mode differentiation and the transforms of ``torch.func`` tensors carry more than their values;
    only the plain equations follow them there.
    """
    # torch.autograd.Function asks the same question by the same private name.
    if torch._C._are_functorch_transforms_active():
        return "it cannot run inside a transform of torch.func (vmap, grad, jvp, ...)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    return None


for _name in _SCHEMAS:
    _LIBRARY.impl(_name, implementation("blocked", _name), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, implementation(AUTO_ON_CUDA, _name), "CUDA")


@torch.library.register_fake("efficient_attention::summarize", lib=_LIBRARY)
def _(key, value, key_mask, normalization, *, backend="auto"):
    batch, heads, _, key_channels = key.shape
    dtype = accumulation_dtype(key.dtype)
    mean = key.new_empty(batch, heads, key_channels, value.shape[-1], dtype=dtype)
    weights = [key.new_empty(batch, heads, key_channels, dtype=dtype) for _ in range(3)]
    return mean, *weights


@torch.library.register_fake("efficient_attention::summarize_backward", lib=_LIBRARY)
def _(d_mean, d_log_weight, key, value, *others, backend="auto"):
    needs = others[-1]
    return empty_gradient(key, needs[0]), empty_gradient(value, needs[1])


@torch.library.register_fake("efficient_attention::attend", lib=_LIBRARY)
def _(query, mean, normalization, num_groups, *, backend="auto"):
    return empty_output(query, mean.shape[-1])


@torch.library.register_fake("efficient_attention::attend_backward", lib=_LIBRARY)
def _(d_output, query, mean, normalization, num_groups, needs, *, backend="auto"):
    return empty_gradient(query, needs[0]), empty_gradient(mean, needs[1])


@torch.library.register_fake("efficient_attention::folded", lib=_LIBRARY)
def _(x, source, key_mask, weights, biases, normalization, num_heads, residual, *, backend="auto"):
    dtype = accumulation_dtype(x.dtype)
    key_channels, channels = weights[1].shape
    pooled = x.new_empty(x.shape[0], key_channels, channels, dtype=dtype)
    numbers = [x.new_empty(x.shape[0], key_channels, dtype=dtype) for _ in range(3)]
    return torch.empty_like(x), pooled, *numbers


@torch.library.register_fake("efficient_attention::folded_", lib=_LIBRARY)
def _(x, *_, backend="auto"):
    return None


@torch.library.register_fake("efficient_attention::folded_backward", lib=_LIBRARY)
def _(d_output, x, source, key_mask, weights, biases, *others, backend="auto"):
    needs = others[-1]
    d_source = x.new_empty(0) if source is None else empty_gradient(source, needs[1])
    parameters = (
        x.new_empty(0) if p is None else x.new_empty(p.shape if needs[2] else 0)
        for p in (*weights, *biases)
    )
    return empty_gradient(x, needs[0]), d_source, *parameters


class _Summarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, value, key_mask, normalization, backend):
        with torch._C._AutoDispatchBelowAutograd():
            mean, log_weight, shift, total = summarize(
                key, value, key_mask, normalization, backend=backend
            )
        ctx.save_for_backward(key, value, key_mask, mean, shift, total)
        ctx.normalization, ctx.backend = normalization, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(shift, total)
        return mean, log_weight, shift, total

    @staticmethod
    def backward(ctx, d_mean, d_log_weight, *_):
        key, value, key_mask, mean, shift, total = ctx.saved_tensors
        d_mean = torch.zeros_like(mean) if d_mean is None else d_mean
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            d_log_weight = torch.zeros_like(total) if d_log_weight is None else d_log_weight
            gradients = pull_back(
                lambda k, v: reference.summarize(k, v, key_mask, ctx.normalization),
                (key, value),
                (d_mean, d_log_weight),
                needs,
            )
        else:
            weights = (key_mask, mean, shift, total, ctx.normalization)
            gradients = summarize_backward(
                d_mean, d_log_weight, key, value, *weights, needs, backend=ctx.backend
            )
            gradients = _needed(gradients, needs)
        return *gradients, None, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, mean, normalization, num_groups, backend):
        with torch._C._AutoDispatchBelowAutograd():
            output = attend(query, mean, normalization, num_groups, backend=backend)
        ctx.save_for_backward(query, mean)
        ctx.options, ctx.backend = (normalization, num_groups), backend
        return output

    @staticmethod
    def backward(ctx, d_output):
        query, mean = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            gradients = pull_back(
                lambda q, c: reference.attend(q, c, *ctx.options), (query, mean), d_output, needs
            )
        else:
            gradients = attend_backward(
                d_output, query, mean, *ctx.options, needs, backend=ctx.backend
            )
            gradients = _needed(gradients, needs)
        return *gradients, None, None, None


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, backend, x, source, key_mask, *parameters):
        weights, biases = parameters[:4], parameters[4:]
        with torch._C._AutoDispatchBelowAutograd():
            output, *summary = folded(
                x, source, key_mask, weights, biases, *options, backend=backend
            )
        ctx.save_for_backward(x, source, key_mask, *parameters, *summary)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*summary)
        return output, *summary

    @staticmethod
    def backward(ctx, d_output, *_):
        if d_output is None:
            return (None,) * 13
        x, source, key_mask, *saved = ctx.saved_tensors
        parameters, summary = saved[:8], saved[8:]
        needs = ctx.needs_input_grad[2:4]
        inputs, needed = (x, source, *parameters), (*needs, *ctx.needs_input_grad[5:])
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            gradients = _pull_back_module(inputs, key_mask, ctx.options, d_output, needed)
        else:
            weights, biases = parameters[:4], parameters[4:]
            module = (x, source, key_mask, weights, biases, *ctx.options)
            asked = (*needs, any(needed[2:]))
            gradients = _needed(
                folded_backward(d_output, *module, *summary, asked, backend=ctx.backend), needed
            )
        return None, None, *gradients[:2], None, *gradients[2:]


def _pull_back_module(
    inputs: tuple[Tensor | None, ...],
    key_mask: Tensor | None,
    options: tuple[str, int, bool],
    d_output: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of the plain module; that of the key bias is zero under softmax, not rounding noise."""
    key_bias = 7
    idle = options[0] == "softmax" and needed[key_bias]

    def plain(x: Tensor, source: Tensor | None, *parameters: Tensor) -> Tensor:
        return reference.module(x, source, key_mask, parameters[:4], parameters[4:], *options)

    differentiable = [n and not (idle and i == key_bias) for i, n in enumerate(needed)]
    gradients = list(pull_back(plain, inputs, d_output, differentiable))
    bias = inputs[key_bias]
    if idle and bias is not None:
        gradients[key_bias] = torch.zeros_like(bias)
    return tuple(gradients)


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(x if n else None for x, n in zip(gradients, needs, strict=True))


def _differentiable(
    operator: Callable, function: type[torch.autograd.Function], plain: Callable
) -> Callable:
    def dispatch(first: Tensor, second: Tensor, *args: Any, backend: str = "auto") -> Any:
        # Reached from compiled programs too: without this a tangent would be lost without a word.
        if torch.autograd.forward_ad._current_level >= 0:
            return plain(first, second, *args)
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            return function.apply(first, second, *args, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(first, second, *args, backend=backend)

    return dispatch


def _differentiable_module(
    x: Tensor,
    source: Tensor | None,
    key_mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *options: Any,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    # Reached from compiled programs too: without this a tangent would be lost without a word.
    if torch.autograd.forward_ad._current_level >= 0:
        return _plain_module(x, source, key_mask, weights, biases, *options)
    given = (x, source, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Folded.apply(options, backend, x, source, key_mask, *weights, *biases)
    with torch._C._AutoDispatchBelowAutograd():
        return folded(x, source, key_mask, weights, biases, *options, backend=backend)


def _plain_module(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # Only the backward operator asks for the summary, which runs for plain tensors alone.
    return reference.module(x, *args), *(x.new_empty(0) for _ in range(4))


def _plain_summarize(key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    mean, log_weight = reference.summarize(key, value, *args)
    # Only the backward operator asks for these, which runs for plain tensors alone.
    return mean, log_weight, torch.zeros_like(log_weight), torch.ones_like(log_weight)


_LIBRARY.impl("summarize", _differentiable(summarize, _Summarize, _plain_summarize), "Autograd")
_LIBRARY.impl("folded", _differentiable_module, "Autograd")
_LIBRARY.impl("attend", _differentiable(attend, _Attend, reference.attend), "Autograd")


register_when_counting()
