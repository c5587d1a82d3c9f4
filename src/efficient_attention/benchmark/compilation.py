"""What the kernels of a call become on a GPU, which need not be there: registers, shared memory, instructions.

Tensors without memory go through the launchers, and every launch is noted in place of run: the same kernel, the same
sizes, the same tiles. Then it is compiled as triton's just-in-time compiler would, for any generation of GPUs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..ops import triton_programs
from ..ops.tiling import Tile
from .gpu_model import Resources

__all__ = ["Launch", "compile_launch", "launches_of"]

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}


class Launch(NamedTuple):
    """A kernel as it would have been run: with so many programs, in blocks of a tile."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: Sequence[Any]
    sizes: dict[str, Any]


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches of a call, none of which runs.

    Example:
        >>> launches_of(lambda: None)
        []

    Not part of the paper.
    """
    found: list[Launch] = []
    with patch.object(triton_programs, "run", lambda *launch: found.append(Launch(*launch))):
        call()
    return found


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile a kernel for the types and sizes of a launch.

    Args:
        launch: of :func:`launches_of`.
        capability: of the GPU, such as 90.

    Raises:
        RuntimeError: triton interprets its kernels in this process: ``TRITON_INTERPRET`` is set.

    Not part of the paper.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    types, constants, attributes = _signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.tile.warps, "num_stages": launch.tile.stages},
    )
    registers, stack = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=launch.kernel.__name__,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        # Those that triton added for itself are counted.
        warps=compiled.metadata.num_warps,
        tensor_cores=any(name in ptx for name in ("mma.sync", "wgmma", "tcgen05.mma")),
        vectors="cp.async.cg.shared.global" in ptx or "ld.global.v4" in ptx,
    )


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and divisibility of arguments, as the just-in-time compiler sees them."""
    constants = dict(launch.sizes)
    types, attributes = {}, {}
    names = launch.kernel.arg_names
    for i, (name, x) in enumerate(zip(names, launch.arguments, strict=False)):
        tensor = isinstance(x, torch.Tensor)
        types[name] = "*" + _TYPES[x.dtype] if tensor else "i32" if x < 1 << 31 else "i64"
        if not tensor and x == 1:
            types[name], constants[name] = "constexpr", 1
        elif tensor or x % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types | dict.fromkeys(launch.sizes, "constexpr"), constants, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])
