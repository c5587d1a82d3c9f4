"""The native kernels (native/operators.c) as the operators of ``blocked.py``: their signatures, gradients and shapes.

Storage is float32 or bfloat16. Sums are float32, and products take bfloat16 as it is where the processor can, so that
then weights are rounded to it, as in the plain equations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native_build
from .chunks import chunk_length
from .layout import empty_gradient, empty_output
from .native_calls import DTYPES, Argument, Sizes, address, mask_view, run, view


def why_not(x: Tensor) -> str | None:
    """Why the native kernels cannot serve queries or keys ``x [B, H, N, Dk]``, or ``None`` if they can."""
    if x.device.type != "cpu":
        return f"it runs on CPUs; got {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it takes float32 and bfloat16; got {x.dtype}"
    return None if native_build.is_built() else native_build.why_not()


def is_preferred(x: Tensor) -> bool:
    """Whether ``"auto"`` takes the native kernels for ``x [B, H, N, Dk]``: they have been built, and serve it."""
    return x.device.type == "cpu" and x.dtype in DTYPES and native_build.is_preferred()


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean ``[B, H, Dk, Dv]`` and log_weight, shift, total ``[B, H, Dk]``, as :func:`.blocked.summarize`."""
    batch, heads, positions, key_channels = key.shape
    shape, sizes = (batch, heads, key_channels), _sizes(key, value.shape[-1], normalization)
    weighted = key.new_empty(*shape, value.shape[-1], dtype=torch.float32)
    shift, total = (key.new_empty(shape, dtype=torch.float32) for _ in range(2))
    sums = sizes.sums()
    run(
        "summarize",
        *(sizes.problem(), view(key), view(value), _mask(key_mask, key)),
        *(address(weighted), address(shift), address(total), address(sums)),
    )
    if normalization == "scaling":
        total.fill_(positions)
        if key_mask is not None:
            total.copy_(key_mask.sum(-1, keepdim=True))
    # 1 where nothing has any weight: the heaviest key alone weighs 1, as does each that is counted.
    mean = weighted.div_(total.clamp(min=1).unsqueeze(-1))
    return mean, total.log() + shift, shift, total


def summarize_backward(
    d_mean: Tensor,
    d_log_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    mean: Tensor,
    shift: Tensor,
    total: Tensor,
    normalization: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to key and value, in their dtypes and layouts, as :func:`.blocked.summarize_backward`."""
    d_key, d_value = empty_gradient(key, needs[0]), empty_gradient(value, needs[1])
    total = total.clamp(min=1)
    correction = (d_mean * mean).sum(-1)  # [B, H, Dk]
    if d_log_weight is not None:
        correction = correction - d_log_weight
    correction = (correction / total).contiguous()
    d_mean = (d_mean / total.unsqueeze(-1)).contiguous()
    shift = shift.contiguous()
    run(
        "summarize_backward",
        _sizes(key, value.shape[-1], normalization).problem(),
        *(view(key), view(value), _mask(key_mask, key)),
        *(address(d_mean), address(shift), address(correction)),
        *(view(d_key if needs[0] else None), view(d_value if needs[1] else None)),
    )
    return d_key, d_value


def attend(
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    out: Tensor | None = None,
) -> Tensor:
    """``rho_q(Q) C`` for a context C, ``[B, H, N, Dv]``, as :func:`.blocked.attend`; ``out`` may be the query."""
    output = empty_output(query, mean.shape[-1]) if out is None else out
    mean = mean.contiguous()
    run(
        "attend",
        _sizes(query, mean.shape[-1], normalization, num_groups).problem(),
        *(view(query), address(mean), view(output)),
    )
    return output


def attend_backward(
    d_output: Tensor,
    query: Tensor,
    mean: Tensor,
    normalization: str,
    num_groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to query and the context's mean, as :func:`.blocked.attend_backward`."""
    d_query, d_mean = empty_gradient(query, needs[0]), empty_gradient(mean, needs[1])
    whole, mean = d_mean.contiguous(), mean.contiguous()
    sizes = _sizes(query, mean.shape[-1], normalization, num_groups)
    sums = sizes.sums() if needs[1] else None
    run(
        "attend_backward",
        *(sizes.problem(), view(d_output), view(query), address(mean)),
        *(view(d_query if needs[0] else None), address(whole if needs[1] else None), address(sums)),
    )
    return d_query, d_mean if whole is d_mean else d_mean.copy_(whole)


def _sizes(x: Tensor, value_channels: int, normalization: str, num_groups: int = 1) -> Sizes:
    positions, key_channels = x.shape[2:]
    length = chunk_length(positions)
    return Sizes(x, length, key_channels, value_channels, normalization, num_groups)


def _mask(mask: Tensor | None, key: Tensor) -> Argument:
    return mask_view(mask, key.shape[:3])
