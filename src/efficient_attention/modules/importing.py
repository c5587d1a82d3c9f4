"""Attention from the state_dicts of other implementations, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .diffusion import DiffusionEfficientAttention
from .spatial import EfficientAttention2d

__all__ = ["import_attention"]

_AUTHORS = tuple(
    f"{layer}.{leaf}"
    for layer in ("keys", "queries", "values", "reprojection")
    for leaf in ("weight", "bias")
)
_DIFFUSION = (
    "norm.g",
    "mem_kv",
    "to_qkv.weight",
    "to_out.0.weight",
    "to_out.0.bias",
    "to_out.1.g",
)


def import_attention(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, prefix: str = ""
) -> EfficientAttention2d | DiffusionEfficientAttention:
    """The module that computes what another implementation did, from its state_dict.

    Known are the module of the paper's authors (``keys``, ``queries``, ``values``, ``reprojection``: 1x1 convolutions
    with biases, softmax, a residual), which becomes :class:`EfficientAttention2d`, and ``LinearAttention`` of
    denoising-diffusion-pytorch (``norm.g``, ``mem_kv``, ``to_qkv``, ``to_out``), which becomes
    :class:`DiffusionEfficientAttention`. Outputs are the same up to rounding. Other attention in a live network is
    exchanged by :func:`replace`.

    Args:
        state_dict: of the module, or of a network that has it.
        num_heads: how many heads it had; not recorded by the authors' module, so to be given; inferred for the other.
        prefix: the attention's name in the network, such as ``"backbone.attention"``. The ``module.`` that
            data-parallel wrappers put before all names is passed over.

    Returns:
        The module, with copies of the weights, in their dtype and on their device.

    Raises:
        TypeError: a value is not a tensor.
        ValueError: keys that are unknown or missing under ``prefix``, shapes or ``num_heads`` that do not fit.

    Example:
        >>> checkpoint = {f"module.a.{k}": v for k, v in EfficientAttention2d(8).state_dict().items()}
        >>> import_attention(checkpoint, num_heads=2, prefix="a").num_heads
        2

    Paper: Shen et al. 2021, Sec. 3.2.
    """
    state = _under(prefix, state_dict)
    kind = max((_AUTHORS, _DIFFUSION), key=lambda kind: len(state.keys() & kind))
    missing, unknown = [k for k in kind if k not in state], [k for k in state if k not in kind]
    if missing or unknown:
        raise ValueError(
            f"state_dict must hold, under prefix {prefix!r}, all of {list(_AUTHORS)} or all of {list(_DIFFUSION)}, and "
            f"nothing else; {missing} are missing and {unknown[:20]} are unknown. In a live network use replace()"
        )
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict must hold tensors; got {type(tensor).__name__} as {key!r}")
    build = _build_authors if kind is _AUTHORS else _build_diffusion
    module = build(state, num_heads)
    for key, parameter in module.state_dict().items():
        if parameter.shape != state[key].shape:
            expected, got = tuple(parameter.shape), tuple(state[key].shape)
            raise ValueError(f"{key!r} must have shape {expected} beside the others; got {got}")
    module.load_state_dict(state)
    return module


def _under(prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{prefix.removesuffix('.')}.".removeprefix("module.") if prefix else ""
    names = {key: key.removeprefix("module.") for key in state_dict}
    found = {
        name.removeprefix(start): state_dict[key]
        for key, name in names.items()
        if name.startswith(start)
    }
    if len(found) != sum(name.startswith(start) for name in names.values()):
        raise ValueError(
            f"state_dict must not hold keys both with and without 'module.'; got both under {prefix!r}"
        )
    return found


def _build_authors(state: dict[str, Tensor], num_heads: int | None) -> EfficientAttention2d:
    if num_heads is None:
        raise ValueError("num_heads must be given: the state_dict does not record it; got None")
    keys, values = (_convolution(state, f"{name}.weight") for name in ("keys", "values"))
    return nn.utils.skip_init(
        EfficientAttention2d,
        keys.shape[1],
        keys.shape[0],
        values.shape[0],
        num_heads=num_heads,
        init="official",
        device=keys.device,
        dtype=keys.dtype,
    )


def _build_diffusion(
    state: dict[str, Tensor], num_heads: int | None
) -> DiffusionEfficientAttention:
    packed, memory = _convolution(state, "to_qkv.weight"), state["mem_kv"]
    if memory.dim() != 4:
        raise ValueError(f"'mem_kv' must have shape [2, H, Dk, n]; got {tuple(memory.shape)}")
    _, heads, channels, number = memory.shape
    if num_heads not in (None, heads):
        raise ValueError(f"num_heads must be {heads}, as in 'mem_kv', or None; got {num_heads}")
    return nn.utils.skip_init(
        DiffusionEfficientAttention,
        packed.shape[1],
        heads,
        channels,
        num_memory=number,
        device=packed.device,
        dtype=packed.dtype,
    )


def _convolution(state: dict[str, Tensor], key: str) -> Tensor:
    if state[key].dim() != 4:
        raise ValueError(f"{key!r} must have shape [out, in, 1, 1]; got {tuple(state[key].shape)}")
    return state[key]
