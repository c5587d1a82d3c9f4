"""Products of tiles in the native kernels, in the processor's registers or emulated ones, against those of vectors."""

import ctypes
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from efficient_attention import efficient_attention
from efficient_attention.ops import library, native_build
from efficient_attention.testing import (
    assert_as_precise_as_plain,
    assert_module_as_precise_as_plain,
    attention_results,
    layouts,
    make_inputs,
    make_module_inputs,
    module_results,
    plain_attention,
    plain_module,
    relative_error,
)

EMULATION = Path(__file__).with_name("emulated_tiles.h")
# The registers, the instructions that they need, and flags with which the kernels are compiled for them.
REGISTERS = {
    "the processor's": ("amx_bf16", ()),
    "emulated": ("avx512_bf16", (f"-I{native_build.SOURCE}", "-include", str(EMULATION))),
}


def compiler_knows_tiles():
    command = [native_build._compiler(), "-march=native", "-dM", "-E", "-x", "c", "/dev/null"]
    return "__AMX_BF16__" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture(params=REGISTERS)
def use_tiles(request, libraries, monkeypatch):
    """Switches tiles on and off."""
    instructions, flags = REGISTERS[request.param]
    reason = native_build.why_not()
    if reason is None and instructions not in native_build._processor().split():
        reason = f"the processor has no {instructions}"
    if reason is not None:
        pytest.skip(reason)
    kernels = libraries("native", *flags)
    if not (flags or compiler_knows_tiles()):
        pytest.skip("the compiler knows of no tiles")
    switch = ctypes.c_int.in_dll(kernels, "may_use_tiles")
    allowed = switch.value
    if not flags:
        # Asked once more, and not by the kernels: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
        assert allowed == (ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
        if not allowed:
            pytest.skip("the system lets nobody use the registers")
    monkeypatch.setattr(native_build, "load", lambda: kernels)
    yield lambda on: setattr(switch, "value", on)
    switch.value = allowed


def by_tiles_and_vectors(use_tiles, compute):
    results = []
    for on in (True, False):
        use_tiles(on)
        results.append(compute())
    return results


# Of float32 sums in another order, which seldom round to another bfloat16.
ROUNDING = 2**-9

# B, H, N, M, Dk, Dv: less than a tile; single ones, pairs of them and what is left over each way; sums longer than are
# turned at once; the quadratic order.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 20, 70, 32, 16),
    (2, 1, 100, 300, 48, 80),
    (1, 1, 37, 2500, 72, 64),
    (1, 1, 130, 80, 300, 272),
    (2, 2, 100, 53, 96, 80),
    (1, 1, 20, 600, 64, 48),
]


def native_attention(*inputs, **options):
    return efficient_attention(*inputs, backend="native", **options)


@pytest.mark.parametrize(
    ("normalization", "masked"), [("softmax", False), ("softmax", True), ("scaling", True)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channel-major"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_and_its_gradients(sizes, layout, normalization, masked, use_tiles, way):
    inputs = [layouts(x)[layout] for x in make_inputs(*sizes, dtype=torch.bfloat16)]
    mask = torch.rand(sizes[0], sizes[3]) > 0.3 if masked else None
    if masked:
        mask[:, 0] = True
    options = {"normalization": normalization, "key_mask": mask}
    native, plain = (partial(f, **options) for f in (native_attention, plain_attention))
    tiles, vectors = by_tiles_and_vectors(use_tiles, lambda: attention_results(native, inputs))
    exact = attention_results(plain, [x.double() for x in inputs])
    low = attention_results(plain, inputs)
    names = ("output", "d_query", "d_key", "d_value")
    for got, other, *results in zip(tiles, vectors, low, exact, names, strict=True):
        assert relative_error(got, other.double()) < ROUNDING
        assert_as_precise_as_plain(got, *results)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 40, 64, 0, 64), (1, 2, 40, 70, 64, 0), (1, 1, 9, 3000, 0, 32)]
)
def test_without_channels_all_is_zero(sizes, normalization, use_tiles):
    use_tiles(True)
    # What the kernels' memory has held before shows in what they do not write.
    attention_results(native_attention, make_inputs(1, 2, 3000, 3000, 64, 64, dtype=torch.bfloat16))
    for order in ("auto", "linear"):
        native = partial(native_attention, normalization=normalization, order=order)
        results = attention_results(native, make_inputs(*sizes, dtype=torch.bfloat16))
        assert not any(result.any() for result in results)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 33, 15, 32, 24, 2, 37, 153), (1, 300, None, 48, 20, 4, 300, 300)], ids=str
)
def test_module_and_its_gradients(sizes, tokens, masked, use_tiles):
    given = make_module_inputs(*sizes, dtype=torch.bfloat16, tokens=tokens)

    def native(*args):
        return library.folded(*args, backend="native")

    mask = torch.rand(sizes[0], sizes[-1]) > 0.3 if masked else None
    options = {"key_mask": mask, "normalization": "scaling" if masked else "softmax"}
    tiles, vectors = by_tiles_and_vectors(
        use_tiles, lambda: module_results(native, given, **options)
    )
    assert relative_error(tiles[0], vectors[0].double()) < ROUNDING
    low = module_results(plain_module, given, **options)
    exact = module_results(plain_module, given, **options, dtype=torch.float64)
    assert_module_as_precise_as_plain(tiles, low, exact)


def test_tiles_are_used_and_threads_change_no_bit(use_tiles):
    inputs = make_inputs(1, 2, 5000, 5000, 64, 64, dtype=torch.bfloat16)

    def compute():
        return efficient_attention(*inputs, order="linear", backend="native")

    tiles, vectors = by_tiles_and_vectors(use_tiles, compute)
    assert not torch.equal(tiles, vectors)
    use_tiles(True)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(compute(), tiles)
