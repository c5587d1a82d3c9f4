"""What must not be tried: an N x M map that the device cannot hold, for which the system may end the process."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import refuse_beyond


def refuse_impossible_map(query: Tensor, key: Tensor, *, itemsize: int, way_out: str) -> None:
    """Raise MemoryError if one number for each of the N x M pairs of positions is more than the device has.

    Only where the map would really be allocated now: not for fake tensors and other subclasses, on the meta device,
    or while a program is compiled or exported. Transforms of ``torch.func`` are left to themselves, since their
    tensors do not tell how large they are.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if type(query) not in (Tensor, torch.nn.Parameter):
        return
    sizes = (*query.shape[:3], key.shape[2])
    if all(type(size) is int for size in sizes):
        batch, heads, queries, keys = sizes
        refuse_beyond(
            batch * heads * queries * keys * itemsize,
            query.device,
            f"the N x M map of attention for B, H, N, M = {tuple(sizes)}",
            way_out,
        )
