"""Attention that can be replaced, recognised by its parts and then by what it computes.

A family is a function that looks at a module and says how to replace it, or why it cannot be, or ``None``: not mine.
No library is imported; what is said of one is a fact about its interface.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import modules
from ..modules.folding import obstacle
from ..ops import dot_product_attention
from .probing import computes, random_copy, random_input

_NON_LOCAL: dict[type[nn.Module], Any] = {
    modules.NonLocal1d: modules.EfficientAttention1d,
    modules.NonLocal2d: modules.EfficientAttention2d,
    modules.NonLocal3d: modules.EfficientAttention3d,
}
# The parts of other libraries' non-local blocks: query, key, value, and what maps back.
_FOREIGN_NON_LOCAL = (
    ("theta", "phi", "g", ("W",)),
    ("theta", "phi", "g", ("conv_out",)),  # mmcv
    ("t", "p", "g", ("z", "norm")),  # timm
)
# Of the random inputs: odd, and more than what a window would hold.
_EXTENTS = (11, 9, 5)


class Candidate(NamedTuple):
    """A module that can be replaced.

    Attributes:
        dimensions: see :class:`Report`.
        channels: see :class:`Report`.
        build: makes the replacement over the module's own parameters, and says whether it is the same map; its
            arguments are the options that :func:`replace` takes for this module.
    """

    dimensions: int | str
    channels: int
    build: Callable[..., tuple[nn.Module, bool]]


def recognise(module: nn.Module) -> Candidate | str:
    """How to replace a module, or why it cannot be."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced; replace before that"
    for family in (_multihead, _non_local, _vision_transformer, _foreign_non_local, _diffusion):
        found: Candidate | str | None
        try:
            found = family(module)
        except ValueError as error:
            found = str(error)
        if found is not None:
            return obstacle(module, type(module)) or found
    return (
        f"it is a {type(module).__name__}, not one of nn.MultiheadAttention, NonLocal1d/2d/3d, attention of a vision "
        "transformer (qkv, proj, num_heads), a non-local block (theta, phi, g), linear attention of a diffusion model "
        "(to_qkv, to_out, heads)"
    )


def resembles_attention(module: nn.Module) -> bool:
    """Whether a user may have expected that this is recognised."""
    name = type(module).__name__.lower()
    return any(part in name for part in ("attention", "attn", "nonlocal", "non_local"))


def _multihead(old: Any) -> Candidate | str | None:
    if type(old) is not nn.MultiheadAttention:
        return None
    known = nn.MultiheadAttention(2, 1, add_bias_kv=True, device="meta").state_dict()
    separate = [f"{letter}_proj_weight" for letter in "qkv"]
    surplus = [key for key in old.state_dict() if key not in {*known, *separate}]
    if surplus:
        return f"it has {surplus} beside what nn.MultiheadAttention has"

    def build(
        normalization: str = "softmax", order: str = "auto", dropout: float | None = None
    ) -> tuple[nn.Module, bool]:
        _check_dropout(old.dropout, dropout)
        kind = modules.MultiheadEfficientAttention
        own = _same_options(old, kind)
        own |= {"bias": old.in_proj_bias is not None, "add_bias_kv": old.bias_k is not None}
        own |= {"normalization": normalization, "order": order, "dropout": 0.0}
        return _with_parameters_of(old, kind(**own, device="meta")), False

    return Candidate("tokens", old.embed_dim, build)


def _non_local(old: Any) -> Candidate | str | None:
    if type(old) not in _NON_LOCAL:
        return None
    kind, parts = _NON_LOCAL[type(old)], ("keys", "queries", "values", "reprojection")
    if reason := _surplus(old, parts):
        return reason

    def surround(block: nn.Module, **options: Any) -> nn.Module:
        new = kind(**{**_same_options(block, kind), **options}, device="meta")
        return _with_children_of(block, new, parts)

    # The layers may not be those that the block was built with. Under scaling both compute one map.
    twin: Any = random_copy(old)
    twin.normalization = "scaling"
    exchanged = surround(twin, order="linear")
    x = random_input(2, old.in_channels, *_EXTENTS[: old._dimensions])
    if computes(twin, x, exchanged) is None:
        return f"its {list(parts)} do not make a non-local block of {old.in_channels} channels"

    def build(
        normalization: str = old.normalization, order: str = "auto"
    ) -> tuple[nn.Module, bool]:
        exact = old.normalization == normalization == "scaling"
        return surround(old, normalization=normalization, order=order), exact

    return Candidate(old._dimensions, old.in_channels, build)


def _vision_transformer(old: Any) -> Candidate | str | None:
    if not (_has(old, "qkv", "proj") and isinstance(getattr(old, "num_heads", None), int)):
        return None
    dim, packed = getattr(old.qkv, "in_features", 0), getattr(old.qkv, "out_features", 0)
    dropout_layer = getattr(old, "attn_drop", nn.Identity())
    parts = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop")
    reason = (
        _surplus(old, parts)
        or _surplus_arguments(old, ("x", "attn_mask", "is_causal"))
        or (None if dim and packed else "its qkv is not a linear layer")
        or obstacle(dropout_layer, type(dropout_layer))
    )
    if reason:
        return reason

    def surround(block: Any, **options: Any) -> Any:
        heads = block.num_heads
        head_dim = packed // (3 * heads)
        new = modules.ViTEfficientAttention(dim, heads, head_dim, device="meta", **options)
        return _with_children_of(block, new, parts)

    twin = random_copy(old)
    around = surround(twin)
    dot_product = partial(dot_product_attention, scale=around.head_dim**-0.5)
    if computes(twin, random_input(2, 23, dim), partial(around.surround, dot_product)) is None:
        return "it does not compute dot-product attention of tokens [B, N, C], as its parts suggest"

    def build(
        normalization: str = "softmax", order: str = "auto", dropout: float | None = None
    ) -> tuple[nn.Module, bool]:
        _check_dropout(getattr(dropout_layer, "p", 0.0), dropout)
        return surround(old, normalization=normalization, order=order), False

    return Candidate("tokens", dim, build)


def _foreign_non_local(old: Any) -> Candidate | str | None:
    back = _has(old, "W") or _has(old, "conv_out")
    if back and _has(old, "g") and not _has(old, "theta"):
        return (
            "it is a Gaussian non-local block: exp(x^T x) has no linear form, and there are no projections theta and "
            "phi to be trained instead"
        )
    if back and _has(old, "g", "theta", "phi", "concat_project"):
        return "it is a concatenation non-local block: a ReLU for every pair has no linear form"
    found = [roles for roles in _FOREIGN_NON_LOCAL if _has(old, *roles[:3], *roles[3])]
    if not found:
        return None
    query, key, value, output = found[0]
    convolution = _first_convolution(old.get_submodule(query))
    reason = _surplus(old, (query, key, value, *output)) or _surplus_arguments(
        old, ("x", "return_nl_map")
    )
    if reason or convolution is None:
        return reason or f"its {query} has no convolution"
    dimensions, channels = convolution.weight.dim() - 2, convolution.in_channels

    def surround(block: nn.Module, **options: Any) -> modules.EfficientNonLocal:
        layers = dict(block.named_children())
        roles: dict[str, Any] = {"query": query, "key": key, "value": value, "output": output}
        new = modules.EfficientNonLocal(layers, **roles, **options)
        new.training = block.training
        return new

    form = _form_of_non_local(old, surround, channels, dimensions, convolution.out_channels)
    if form is None:
        return (
            "it computes neither dot-product nor embedded-Gaussian attention, as its parts suggest"
        )

    def build(normalization: str = form, order: str = "auto") -> tuple[nn.Module, bool]:
        new = surround(old, normalization=normalization, order=order)
        return new, form == normalization == "scaling"

    return Candidate(dimensions, channels, build)


def _form_of_non_local(
    old: Any, surround: Callable[..., Any], channels: int, dimensions: int, key_channels: int
) -> str | None:
    """The normalization under which a block is dot-product attention."""
    twin = random_copy(old)
    block = surround(twin, normalization="scaling")
    scales = (1.0, key_channels**-0.5, channels**-0.5)
    attentions: list[Callable[..., Tensor]] = [
        partial(dot_product_attention, normalization="scaling"),
        *(partial(dot_product_attention, scale=scale) for scale in scales),
    ]
    maps = [partial(block.surround, attention) for attention in attentions]
    found = computes(twin, random_input(2, channels, *_EXTENTS[:dimensions]), *maps)
    return None if found is None else "softmax" if found else "scaling"


def _diffusion(old: Any) -> Candidate | str | None:
    if not (_has(old, "to_qkv", "to_out") and isinstance(getattr(old, "heads", None), int)):
        return None
    parts = ("norm", "to_qkv", "to_out")
    reason = _surplus(old, (*parts, "mem_kv")) or _surplus_arguments(old, ("x",))
    convolution = _first_convolution(old.to_qkv)
    if reason or convolution is None:
        return reason or "its to_qkv is not a convolution"
    dimensions, channels = convolution.weight.dim() - 2, convolution.in_channels

    def surround(block: Any, residual: bool) -> nn.Module:
        new = modules.DiffusionEfficientAttention(
            channels,
            old.heads,
            convolution.out_channels // (3 * old.heads),
            dimensions=dimensions,
            device="meta",
        )
        new.residual, new.mem_kv = residual, getattr(block, "mem_kv", None)
        return _with_children_of(block, new, parts)

    twin = random_copy(old)
    maps = [surround(twin, residual) for residual in (False, True)]
    found = computes(twin, random_input(2, channels, *_EXTENTS[:dimensions]), *maps)
    if found is None:
        return "it does not compute linear attention over a memory, as its parts suggest"
    return Candidate(dimensions, channels, lambda: (surround(old, residual=bool(found)), True))


def _has(module: nn.Module, *children: str) -> bool:
    return {*children} <= {name for name, _ in module.named_children()}


def _first_convolution(module: nn.Module) -> Any:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((m for m in module.modules() if isinstance(m, kinds)), None)


def _surplus(module: nn.Module, parts: Collection[str]) -> str | None:
    """The reason against a module whose state is not all in the parts that its replacement has."""
    surplus = [key for key in module.state_dict() if key.split(".")[0] not in parts]
    return f"it has {surplus} beside {list(parts)}" if surplus else None


def _surplus_arguments(module: nn.Module, known: Collection[str]) -> str | None:
    surplus = [name for name in inspect.signature(module.forward).parameters if name not in known]
    return f"its forward takes {surplus} beside {list(known)}" if surplus else None


def _check_dropout(has: float, agreed: float | None) -> None:
    wanted = has if agreed is None else agreed
    if wanted:
        raise NotImplementedError(
            f"dropout must be 0: the N x M weights that it would drop from are never built; got {wanted}. "
            "Give dropout=0.0 to agree that it is lost"
        )


def _same_options(old: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    options = inspect.signature(kind).parameters
    return {option: getattr(old, option) for option in options if hasattr(old, option)}


def _with_parameters_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new``, whose parameters are those of ``old``, by name."""
    for key, parameter in list(old.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        setattr(new.get_submodule(owner), leaf, parameter)
    return new.train(old.training)


def _with_children_of(old: nn.Module, new: nn.Module, names: Collection[str]) -> nn.Module:
    """``new``, whose children are those of ``old``, in their order; one that ``old`` lacks does nothing."""
    lacking = [name for name in new._modules if not _has(old, name)]
    new._modules.clear()
    for name, child in old.named_children():
        if name in names:
            setattr(new, name, child)
    for name in lacking:
        setattr(new, name, nn.Identity())
    # The children's own modes stay: a normalization may be frozen.
    new.training = old.training
    return new
