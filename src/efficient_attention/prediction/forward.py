"""A network run once: on which device, in which precision, and within which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..memory import available_bytes
from ..models import create_model
from ..planning.simulation import Timeline, Twin, nbytes

__all__ = [
    "DTYPES",
    "check_memory",
    "device_of",
    "find_device",
    "forward_bytes",
    "inference",
    "pictures_like",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_device(name: str | None) -> torch.device:
    """The device of a name; without one, the first GPU, or else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Of a build without CUDA, an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device must be one that is there; got {name!r}: {reason}") from error
    if device.type == "meta":
        raise InputError("--device must be one that computes; got 'meta'")
    return device


def device_of(network: nn.Module) -> torch.device:
    """Where the weights of a network are."""
    return next(network.parameters()).device


@contextmanager
def inference(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Without gradients, and under autocast if ``dtype`` is not float32.

    Raises:
        ValueError: another dtype than float32 and bfloat16, or a network in training mode.
        InputError: a GPU ran out of memory.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16; got {dtype}")
    if network.training:
        raise ValueError("network must be in evaluation mode; call network.eval()")
    kind = device_of(network).type
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype != torch.float32)
    try:
        with torch.inference_mode(), autocast:
            yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise InputError(f"the device must have memory for this: {reason}") from error


def forward_bytes(
    network: Any, inputs: tuple[Any, ...], *, dtype: torch.dtype, device: torch.device
) -> int:
    """The most bytes of tensors that a network will hold for inputs, itself and them included, without running it.

    A twin of it runs on tensors without memory; of a detector that is as far as shapes do not depend on values, which
    is where the most is held.

    Args:
        network: from :func:`efficient_attention.create_model`.
        inputs: of ``forward``, on the meta device.
        dtype: float32, or bfloat16 for autocast.
        device: where it will run. What operators hold while they run is counted on the CPU alone.

    Example:
        >>> network = create_model("resnet_small").eval()
        >>> picture = torch.empty(1, 3, 224, 224, device="meta")
        >>> 20 < forward_bytes(network, (picture,), dtype=torch.float32, device=torch.device("cpu")) / 2**20 < 60
        True
    """
    with torch.device("meta"):
        bare = create_model(**network.configuration).eval()
    twin = Twin(bare, inputs)
    timeline = Timeline(twin.resident(), temporaries=device.type == "cpu")
    # The twin is on the CPU, wherever the network will be.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        twin.run(timeline, gradients=False)
    return max(timeline.levels) + nbytes(twin.resident())


def check_memory(
    network: Any,
    inputs: tuple[Any, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    what: str,
    way_out: Callable[[float], str],
) -> None:
    """Refuse inputs for which the system might end the process.

    Args:
        network: see :func:`forward_bytes`.
        inputs: see there.
        dtype: see there.
        device: see there.
        what: names the inputs: ``"a pair of 3840 x 2160 pixels"``.
        way_out: given the share of the memory needed that there is, what to do instead.

    Raises:
        InputError: they need more memory than there is, both in numbers.
    """
    there = available_bytes(device)
    if there is None:
        return
    # The network is there already, if that is where it runs.
    standing = sum(x.nbytes for x in network.parameters() if x.device.type == device.type)
    needed = forward_bytes(network, inputs, dtype=dtype, device=device) - standing
    if needed > there:
        raise InputError(
            f"{what} takes {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{there / 2**30:.1f} GiB left; take {way_out(there / needed)}"
        )


def pictures_like(*sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Batches of one picture each ``[1, 3, H, W]``, without memory."""
    return tuple(torch.empty(1, 3, *size, device="meta") for size in sizes)
