"""What the kernels become on GPUs of three generations: they compile, and fit registers and shared memory.

No GPU is needed. What the launchers would run is compiled in a process of its own, for this one's kernels are for
Triton's interpreter where there is no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import efficient_attention

pytest.importorskip("triton", reason="triton is not installed")

# Bytes of shared memory that a program may take, by compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
OPERATOR = {
    "summarize_kernel",
    "merge_kernel",
    "attend_kernel",
    "attend_backward_kernel",
    "add_kernel",
    "summarize_backward_kernel",
}
MODULE = {
    "pool_kernel",
    "merge_kernel",
    "output_kernel",
    "sum_gradient_kernel",
    "add_kernel",
    "input_gradient_kernel",
}

# Compiles every kernel of one training step, once, and prints what it takes.
PROGRAM = """
import json, sys
import torch
from efficient_attention.benchmark.compilation import compile_launch, launches_of
from efficient_attention.ops import triton_launch, triton_module_launch


def empty(*shape, dtype=torch.bool):
    return torch.empty(shape, dtype=dtype, device="meta")


def operator(dtype, channels, channel_major=False, masked=False, normalization="softmax"):
    x = empty(1, 8, 65536, channels, dtype=dtype)
    if channel_major:
        x = x.mT.contiguous().mT
    mask = empty(1, 1, 65536) if masked else None
    mean, _, shift, total = triton_launch.summarize(x, x, mask, normalization)
    triton_launch.attend(x, mean, normalization, 1)
    triton_launch.attend_backward(x, x, mean, normalization, 1, (True, True))
    weights = (mask, mean, shift, total, normalization)
    triton_launch.summarize_backward(mean, None, x, x, *weights, (True, True))


def module(dtype, channels, key_channels, heads, tokens=False, masked=False, normalization="softmax"):
    x = empty(1, channels, 65536, dtype=dtype)
    if tokens:
        x = x.mT.contiguous().mT
    shapes = 2 * [(key_channels, channels)] + 2 * [(channels, channels)]
    weights = [empty(*shape, dtype=dtype) for shape in shapes]
    biases = [empty(len(weight), dtype=dtype) for weight in weights]
    mask = empty(1, 65536) if masked else None
    arguments = (x, None, mask, weights, biases, normalization, heads, True)
    _, *summary = triton_module_launch.folded(*arguments)
    triton_module_launch.folded_backward(x, *arguments, *summary, (True, True, True))


capability, what, dtype, options = json.loads(sys.argv[1])
launches = launches_of(lambda: globals()[what](getattr(torch, dtype), **options))
found = {(x.kernel.__name__, x.sizes.get("OF"), x.tile): x for x in launches}
print(json.dumps([compile_launch(x, capability)._asdict() for x in found.values()]))
"""


def compiled(capability, what, dtype, cache, **options):
    """Resources of the kernels of one training step."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(efficient_attention.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(cache)
    arguments = json.dumps([capability, what, dtype, options])
    command = [sys.executable, "-c", PROGRAM, arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if f"sm_{capability}" in run.stderr and "not defined for option 'gpu-name'" in run.stderr:
        pytest.skip(f"the assembler of this triton does not know sm_{capability}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def check(found, names, capability, dtype):
    assert {one["kernel"] for one in found} == names
    for one in found:
        assert one["shared"] <= SHARED[capability], one
        # A spilled register or two; the kernels never index registers, which would need a stack too.
        assert one["stack"] <= 32, one
        assert one["vectors"], one
        products = one["kernel"] not in ("merge_kernel", "add_kernel")
        assert one["tensor_cores"] == (products and dtype != "float32"), one


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [
        (80, "float32", {"channels": 64}),
        (90, "bfloat16", {"channels": 64}),
        (100, "bfloat16", {"channels": 64}),
        (80, "float16", {"channels": 128, "channel_major": True, "masked": True}),
        (80, "bfloat16", {"channels": 256, "normalization": "scaling"}),
    ],
    ids=str,
)
def test_the_operators_kernels_compile_without_spilling(capability, dtype, options, tmp_path):
    found = compiled(capability, "operator", dtype, tmp_path, **options)
    check(found, OPERATOR, capability, dtype)


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [
        (80, "float16", {"channels": 256, "key_channels": 128, "heads": 8, "tokens": True}),
        (90, "bfloat16", {"channels": 256, "key_channels": 128, "heads": 8, "masked": True}),
        (100, "bfloat16", {"channels": 256, "key_channels": 128, "heads": 1}),
        (90, "bfloat16", {"channels": 512, "key_channels": 256, "heads": 1}),
        (90, "float32", {"channels": 96, "key_channels": 48, "heads": 4}),
    ],
    ids=str,
)
def test_the_modules_kernels_compile_without_spilling(capability, dtype, options, tmp_path):
    found = compiled(capability, "module", dtype, tmp_path, **options)
    check(found, MODULE, capability, dtype)
