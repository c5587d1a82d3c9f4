"""How long kernels would take on GPUs that are not at hand: counted, not measured.

A kernel is compiled (compilation.py) and its work counted (kernel_work.py); its programs are laid out on the processors
of a GPU as far as registers, shared memory and warps go, and what it moves and computes is divided by what the GPU can.
The longest of four times counts: memory, whose bandwidth takes enough bytes on their way; the second-level cache, for
what is read again; products; and what is done to single numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = [
    "ASSUMPTIONS",
    "GPUS",
    "Gpu",
    "Resources",
    "Time",
    "Work",
    "copy_bandwidth",
    "occupancy",
    "predict",
]

#: What only a clock could tell. Shares of what a GPU could do: of the bandwidth of memory by a copy; of the peak of
#: products by kernels like these. Seconds: from asking memory to having; from one kernel's end to the next one's work.
ASSUMPTIONS = {
    "copy_share": 0.9,
    "product_share": 0.6,
    "latency": 0.8e-6,
    "start": 2e-6,
}
# What a processor does in a clock, and ordinary instructions for each number that is exponentiated.
_EXPONENTIALS, _INSTRUCTIONS = 16, 128
_INSTRUCTIONS_OF_A_NUMBER = 12


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        kernel: its name.
        registers: of a thread.
        stack: bytes of a thread, in memory: what did not fit into its registers.
        shared: bytes of shared memory of a program.
        warps: of 32 threads each.
        tensor_cores: whether its products are theirs.
        vectors: whether it loads 16 bytes at a time.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    tensor_cores: bool
    vectors: bool


class Gpu(NamedTuple):
    """What its vendor says about a GPU.

    Attributes:
        capability: such as 90.
        processors: streaming multiprocessors.
        clock: of a processor under load, Hz.
        memory: bytes per second.
        cache: bytes per second of the second-level cache; an estimate, for no vendor says it.
        products: floating-point operations per second, two for each multiply-add, by how operands are taken.
        shared: bytes of shared memory of a processor.
    """

    capability: int
    processors: int
    clock: float
    memory: float
    cache: float
    products: dict[str, float]
    shared: int


def _products(bfloat16: float, tf32: float, ieee: float) -> dict[str, float]:
    return {"bfloat16": bfloat16 * 1e12, "tf32": tf32 * 1e12, "ieee": ieee * 1e12}


GPUS = {
    "A100": Gpu(80, 108, 1.41e9, 2.04e12, 4.5e12, _products(312, 156, 19.5), 164 << 10),
    "H100": Gpu(90, 132, 1.83e9, 3.35e12, 5.6e12, _products(989, 495, 67), 228 << 10),
    "H200": Gpu(90, 132, 1.83e9, 4.8e12, 5.6e12, _products(989, 495, 67), 228 << 10),
    "B200": Gpu(100, 148, 1.85e9, 8.0e12, 10e12, _products(2250, 1125, 75), 228 << 10),
}


class Work(NamedTuple):
    """What a launch has to do.

    Attributes:
        programs: that run.
        moved: bytes of memory that are read or written once.
        read: bytes that programs ask the cache for, again and again.
        operations: of products.
        operands: how products take them, as ``tiling.OPERANDS`` says.
        numbers: that are exponentiated or added one by one.
        ahead: bytes that one program has on their way from memory at a time.
    """

    programs: int
    moved: int
    read: int
    operations: int
    operands: str
    numbers: int
    ahead: int


class Time(NamedTuple):
    """A prediction: seconds, what they are for, programs on a processor, bytes on their way for each."""

    seconds: float
    limit: str
    resident: int
    ahead: int


def occupancy(resources: Resources, gpu: Gpu) -> int:
    """Programs that run on one processor at a time.

    Example:
        >>> occupancy(Resources("kernel", 128, 0, 48 << 10, 8, True, True), GPUS["H100"])
        2

    Not part of the paper.
    """
    threads = 32 * resources.warps
    registers = -(-resources.registers // 8) * 8 * threads
    # The system keeps 1 KiB of each program's.
    shared = resources.shared + 1024
    return min(65536 // registers, gpu.shared // shared, 2048 // threads, 32)


def copy_bandwidth(gpu: Gpu) -> float:
    """Bytes per second that a copy reads and writes.

    Example:
        >>> round(copy_bandwidth(GPUS["H100"]) / 1e9)
        3015

    Not part of the paper.
    """
    return gpu.memory * ASSUMPTIONS["copy_share"]


def predict(work: Work, resources: Resources, gpu: Gpu) -> Time:
    """The time of a launch on a GPU.

    Example:
        >>> copy = Work(10_000, 1 << 30, 1 << 30, 0, "ieee", 0, 16 << 10)
        >>> time = predict(copy, Resources("copy", 32, 0, 0, 8, False, True), GPUS["H100"])
        >>> time.limit, round(1e6 * time.seconds)
        ('memory', 358)

    Not part of the paper.
    """
    resident = occupancy(resources, gpu)
    places = gpu.processors * resident
    running = min(work.programs, places)
    busy = min(1.0, work.programs / gpu.processors)
    # Programs that do not divide evenly leave processors idle in the end.
    rounds = work.programs / places
    even = rounds / math.ceil(rounds) if rounds > 1 else 1.0
    enough = min(1.0, running * work.ahead / (gpu.memory * ASSUMPTIONS["latency"]))
    clocks = work.numbers * (1 / _EXPONENTIALS + _INSTRUCTIONS_OF_A_NUMBER / _INSTRUCTIONS)
    operations = gpu.products[work.operands] * ASSUMPTIONS["product_share"]
    seconds = {
        "memory": work.moved / (copy_bandwidth(gpu) * enough),
        "cache": work.read / (gpu.cache * busy),
        "products": work.operations / (operations * busy * even),
        "numbers": clocks / (gpu.processors * gpu.clock * busy * even),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    if limit == "memory" and enough < 1:
        limit = "latency"
    return Time(
        max(seconds.values()) + ASSUMPTIONS["start"], limit, resident, resident * work.ahead
    )
