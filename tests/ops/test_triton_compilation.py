"""What the kernels become on GPUs of three generations: they compile, and fit registers and shared memory.

No GPU is needed. What the launcher would run is compiled as the launcher would, in a process of its own, for this one's
kernels are for Triton's interpreter where there is no GPU.
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

# Compiles kernels as triton's just-in-time compiler would for calls of the launcher, and prints what they take.
PROGRAM = '''
import json, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from efficient_attention.ops import triton_launch

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}


class Kernel:
    """Stands for a kernel in the launcher: compiles it for the arguments of a launch in place of launching it."""

    def __init__(self, kernel, capability, found):
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps, num_stages, **constants):
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        types = {}
        for i, (name, x) in enumerate(zip(self.kernel.arg_names, arguments)):
            tensor = isinstance(x, torch.Tensor)
            types[name] = "*" + TYPES[x.dtype] if tensor else "i32" if x < 1 << 31 else "i64"
            if not tensor and x == 1:
                types[name], constants[name] = "constexpr", 1
            elif tensor or x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types | signature, constants, attributes)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        self.found.append(resources(compiled, self.kernel.__name__))


def resources(compiled, name):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", report).groups()
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "tensor cores": any(x in ptx for x in ("mma.sync", "wgmma", "tcgen05.mma")),
        "vectors": "cp.async.cg.shared.global" in ptx or "ld.global.v4" in ptx,
    }


def train(dtype, channels, channel_major=False, masked=False, normalization="softmax"):
    """Forward and backward of the operator, with tensors that have no memory."""
    shape = (1, 8, 65536, channels)
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channel_major:
        x = x.mT.contiguous().mT
    mask = torch.empty(1, 1, 65536, dtype=torch.bool, device="meta") if masked else None
    mean, _, shift, total = triton_launch.summarize(x, x, mask, normalization)
    triton_launch.attend(x, mean, normalization, 1)
    triton_launch.attend_backward(x, x, mean, normalization, 1, (True, True))
    weights = (mask, mean, shift, total, normalization)
    triton_launch.summarize_backward(mean, None, x, x, *weights, (True, True))


capability, dtype, options = json.loads(sys.argv[1])
found = []
for name in [name for name in vars(triton_launch.kernels) if name.endswith("_kernel")]:
    kernel = Kernel(getattr(triton_launch.kernels, name), capability, found)
    setattr(triton_launch.kernels, name, kernel)
train(getattr(torch, dtype), **options)
print(json.dumps(found))
'''


def compiled(capability, dtype, cache, **options):
    """Resources of the kernels of one training step."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(efficient_attention.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", PROGRAM, json.dumps([capability, dtype, options])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if f"sm_{capability}" in run.stderr and "not defined for option 'gpu-name'" in run.stderr:
        pytest.skip(f"the assembler of this triton does not know sm_{capability}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def check(found, capability, dtype):
    names = {one["kernel"] for one in found}
    assert names == {
        "summarize_kernel",
        "merge_kernel",
        "attend_kernel",
        "attend_backward_kernel",
        "add_kernel",
        "summarize_backward_kernel",
    }
    for one in found:
        assert one["shared"] <= SHARED[capability], one
        # A spilled register or two; the kernels never index registers, which would need a stack too.
        assert one["stack"] <= 32, one
        assert one["vectors"], one
        products = one["kernel"] not in ("merge_kernel", "add_kernel")
        assert one["tensor cores"] == (products and dtype != "float32"), one


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, "bfloat16"), (80, "float32"), (90, "bfloat16"), (100, "bfloat16")],
)
def test_kernels_compile_without_spilling(capability, dtype, tmp_path):
    check(compiled(capability, dtype, tmp_path, channels=64), capability, dtype)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", {"channels": 128, "channel_major": True, "masked": True}),
        ("bfloat16", {"channels": 256, "normalization": "scaling"}),
    ],
    ids=str,
)
def test_variants_compile_without_spilling(dtype, options, tmp_path):
    check(compiled(80, dtype, tmp_path, **options), 80, dtype)
