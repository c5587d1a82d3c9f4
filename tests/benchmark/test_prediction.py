"""Predicted times follow from counts and from what GPUs can; the documentation says what was recorded."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from efficient_attention.benchmark.compilation import compile_launch, launches_of
from efficient_attention.benchmark.gpu_model import GPUS, Resources, Work, occupancy, predict
from efficient_attention.benchmark.kernel_work import work_of
from efficient_attention.benchmark.prediction import kernel_table, prediction_table, times
from efficient_attention.ops import triton_launch, triton_module_launch

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
RECORD = ROOT / "benchmarks" / "results" / "predictions" / "kernels.json"
documented = pytest.mark.skipif(not DOCUMENT.exists(), reason="not a checkout")
KERNEL = Resources("kernel", 128, 0, 40 << 10, 8, True, True)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        # 256 threads of 128 registers are half of 65,536.
        ({}, 2),
        ({"registers": 129}, 1),
        ({"registers": 32}, 5),  # 228 KiB by 41 KiB
        ({"registers": 32, "shared": 0}, 8),  # 2,048 threads by 256
        ({"registers": 16, "shared": 0, "warps": 1}, 32),
    ],
    ids=str,
)
def test_programs_of_a_processor_are_bounded_by_what_runs_out_first(changes, programs):
    assert occupancy(KERNEL._replace(**changes), GPUS["H100"]) == programs


def test_what_takes_longest_is_the_time():
    gpu = GPUS["H100"]
    work = Work(
        programs=264, moved=0, read=0, operations=0, operands="ieee", numbers=0, ahead=1 << 20
    )
    # 3.35 TB/s, of which a copy has 90%; 2 us to start.
    copy = predict(work._replace(moved=3_015_000_000), KERNEL, gpu)
    assert (copy.limit, copy.seconds) == ("memory", pytest.approx(1.002e-3))
    # 60% of 989 TFLOPS.
    products = work._replace(operations=593_400_000_000, operands="bfloat16")
    assert predict(products, KERNEL, gpu)[:2] == (pytest.approx(1.002e-3), "products")
    # Half of the processors have a program.
    assert predict(products._replace(programs=66), KERNEL, gpu).seconds == pytest.approx(2.002e-3)
    # One program more than there are places: the second round is as long as the first.
    late = predict(products._replace(programs=265), KERNEL, gpu).seconds
    assert late == pytest.approx(2e-6 + 1e-3 * 528 / 265)
    # 132 x 2 programs with 4 KiB each on their way, of 2.68 MB that 0.8 us of latency take.
    waiting = predict(work._replace(moved=3_015_000_000, ahead=4096), KERNEL, gpu)
    assert waiting.limit == "latency"
    assert waiting.seconds == pytest.approx(2e-6 + 1e-3 * 2_680_000 / (264 * 4096))


def test_the_operators_work_is_counted_from_its_sizes():
    query, key, value = (empty(1, 8, 65536, 64) for _ in range(3))
    mean = empty(1, 8, 64, 64, dtype=torch.float32)
    (summarize, merge) = launches_of(lambda: triton_launch.summarize(key, value, None, "softmax"))
    (attend,) = launches_of(lambda: triton_launch.attend(query, mean, "softmax", 1))
    work = work_of(summarize)
    # 128 contexts of 512 keys for each head, of 64 x 64 numbers, and three of 64.
    sums = 8 * 128 * (64 * 64 + 3 * 64) * 4
    assert work.programs == 8 * 128
    assert work.moved == 2 * key.nbytes + sums
    assert work.operations == 2 * 8 * 65536 * 64 * 64
    assert work_of(merge).moved > sums - 8 * 128 * 64 * 4
    assert work_of(attend).moved == 2 * query.nbytes + mean.nbytes
    assert work_of(attend).operations == work.operations


def test_the_modules_work_is_counted_in_products_of_its_positions():
    x, slope = empty(1, 256, 4096), empty(1, 256, 4096)
    weights = [empty(128, 256), empty(128, 256), empty(256, 256), empty(256, 256)]
    module = (x, None, None, weights, [None] * 4, "softmax", 8, True)
    summary = []
    forward = launches_of(lambda: summary.extend(triton_module_launch.folded(*module)[1:]))
    backward = launches_of(
        lambda: triton_module_launch.folded_backward(slope, *module, *summary, (True,) * 3)
    )
    unit = 2 * 4096 * 128 * 256
    assert sum(work_of(launch).operations for launch in forward) == 4 * unit
    # Sums of the context, of both weights: their queries and keys again, and the slopes of these; gradients of X: 7.
    assert sum(work_of(launch).operations for launch in backward) == (2 + 3 + 3 + 7) * unit


def test_interpreted_kernels_are_not_compiled():
    if torch.cuda.is_available():
        pytest.skip("they are compiled here")
    key = empty(1, 1, 64, 16)
    (launch, *_) = launches_of(lambda: triton_launch.summarize(key, key, None, "softmax"))
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launch(launch, 80)


@documented
def test_tables_of_predictions_are_those_of_the_record():
    record, text = json.loads(RECORD.read_text()), DOCUMENT.read_text()
    assert prediction_table(record) in text
    assert kernel_table(record) in text


@documented
def test_recorded_times_follow_from_recorded_work_and_resources():
    record = json.loads(RECORD.read_text())
    assert record["gpus"] == json.loads(json.dumps({n: g._asdict() for n, g in GPUS.items()}))
    for one in record["passes"]:
        for kernel in one["kernels"]:
            assert times(kernel) == pytest.approx(kernel["seconds"])
