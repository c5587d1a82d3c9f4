"""State that every test starts from: a seed, one precision, and memory that is poisoned where it is not written."""

import functools
import os

import pytest
import torch

from efficient_attention.ops import (
    native_build,
    native_module_launch,
    native_short,
    precision,
    short,
    watching,
)

if torch.cuda.is_available():
    # Without it cuBLAS refuses deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Has to be known before anything imports triton, whose kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _nothing_built():
    # "auto" is here what it is where nobody has built the native kernels, whatever this machine has.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "is_built", functools.cache(lambda: False))
        yield


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # What follows from limits that a test may have changed.
    for remembered in (short._way, native_module_launch._plan):
        remembered.cache_clear()
    short._lately._known.clear()
    # Fills torch.empty with NaN: whatever is returned without having been written shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # That of compiled programs does not know of it.
    monkeypatch.setattr(native_short, "empty_strided", watching._empty_strided)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.fixture(params=[True, False], ids=["as it is", "in float32"])
def bfloat16_products(request, monkeypatch):
    """How bfloat16 is multiplied, by processors with products of it and by others."""
    if request.param and not precision.multiplies_bfloat16():
        pytest.skip("the processor has no products of bfloat16")
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: request.param)


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 16 positions and of one sample, so that small inputs take many of them."""
    monkeypatch.setattr("efficient_attention.ops.planner.BLOCK_BYTES", 1)
    monkeypatch.setattr("efficient_attention.ops.planner.SHORTEST_BLOCK", 16)
    for limit in ("PLAIN_BYTES", "PLAIN_BYTES_KEPT"):
        monkeypatch.setattr(f"efficient_attention.ops.planner.{limit}", -1)
