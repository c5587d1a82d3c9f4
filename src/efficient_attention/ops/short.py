"""Short problems on a CPU, where starting operators is what costs: few of them, or one kernel, past the dispatcher.

Serves plain tensors that nobody watches, but for gradients. Whatever it does not serve, it leaves alone, errors included.
"""

from __future__ import annotations

from torch import Tensor

from . import native_launch, native_short, plain
from .arguments import canonical_mask
from .planner import plain_is_cheaper, quadratic_is_cheaper
from .precision import DTYPES, product_dtype
from .watching import are_plain, records


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    order: str,
) -> Tensor | None:
    """``rho_q(Q) rho_k(K)^T V``, ``[B, H, N, Dv]``, in the order named or with fewer multiply-adds; or ``None``."""
    given = (query, key, value) if key_mask is None else (query, key, value, key_mask)
    if order not in ("auto", "linear") or normalization not in ("softmax", "scaling"):
        return None
    if not (are_plain(*given) and _are_right(query, key, value)):
        return None
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    quadratic = order == "auto" and quadratic_is_cheaper(queries, keys, channels, value.shape[3])
    recorded, kernels = records(query, key, value), native_launch.is_preferred(query)
    if kernels and not recorded:
        if max(queries, keys) > native_short.LONGEST:
            return None
        mask = canonical_mask(key_mask, key)
        return native_short.efficient_attention(query, key, value, mask, normalization, quadratic)
    itemsize = product_dtype(query.dtype).itemsize
    sizes = batch * heads, queries, keys, channels, itemsize
    if key_mask is None and plain_is_cheaper(*sizes, kept=recorded, fused=kernels):
        return plain.efficient_attention(query, key, value, normalization, quadratic)
    return None


def _are_right(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the arguments are what they must be, and there are keys."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return False
    batch, heads, _, channels = query.shape
    keys, dtype = key.shape[2], query.dtype
    return (
        key.shape == (batch, heads, keys, channels)
        and value.shape[:3] == (batch, heads, keys)
        and keys > 0
        and dtype in DTYPES
        and dtype == key.dtype == value.dtype
    )
