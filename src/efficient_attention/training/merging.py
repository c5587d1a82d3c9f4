"""Scores of what several processes have counted, each for its own samples."""

from __future__ import annotations

import io
from functools import reduce
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Metrics", "broadcast_buffers", "merged_scores"]


class Metrics(Protocol):
    """What counts predictions; those of this package all do it so."""

    def merge(self, other: Self) -> Self:
        """The metrics of the samples of both."""

    def compute(self) -> Any:
        """The scores, a NamedTuple."""


def merged_scores(metrics: Metrics) -> dict[str, Any]:
    """The scores of the samples of all processes, which all have to call this.

    The first process computes them, from whole states and not from the others' scores: it is the result of one process
    that has seen all samples.

    Args:
        metrics: what this process has counted.

    Returns:
        The scores by name, the same on all processes.

    Raises:
        ValueError: on all processes, if the scores cannot be computed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return metrics.compute()._asdict()
    states: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(states, _packed(metrics))
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [reduce(lambda a, b: a.merge(b), map(_unpacked, states)).compute()._asdict()]
        except ValueError as error:
            # The others wait for an answer, and should not wait for ever.
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], ValueError):
        raise result[0]
    return result[0]


def broadcast_buffers(network: nn.Module) -> None:
    """Give all processes the running statistics of the first, so that all evaluate one network.

    Args:
        network: changed in place. All processes have to call this.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def _packed(metrics: Metrics) -> bytes:
    buffer = io.BytesIO()
    torch.save(metrics, buffer)
    return buffer.getvalue()


def _unpacked(state: bytes) -> Metrics:
    # To the CPU, as this process may not see the device of the other one. It holds our own objects, not a user's file.
    return torch.load(io.BytesIO(state), map_location="cpu", weights_only=False)
