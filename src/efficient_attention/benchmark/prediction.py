"""Times that the kernels would take on GPUs that are not at hand, recorded with all that they follow from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compilation import Launch, compile_launch, launches_of
from .gpu_model import ASSUMPTIONS, GPUS, Resources, Work, copy_bandwidth, predict
from .kernel_work import work_of
from .provenance import describe, write_record
from .tables import markdown

__all__ = ["kernel_table", "predict_kernels", "prediction_table", "times"]

# On what, and of which calls, kernels are told one by one.
_EXAMPLE = "H100"
_TOLD = ("operator, bfloat16", "module 256 x 256, bfloat16")


class _Pass(NamedTuple):
    """A call, and the bytes that it cannot do without."""

    name: str
    call: Callable[[], Any]
    least_bytes: int


def predict_kernels(
    *,
    output: str | Path = "benchmarks/results/predictions",
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compile the kernels for GPUs of three generations, and predict and record what they would take.

    Args:
        output: folder of the record.
        report: called with lines of Markdown.

    Returns:
        The path of the record: for every pass of the operator and of the module its kernels, for each of these its
        work, its resources by compute capability and its predicted seconds by GPU.

    Raises:
        RuntimeError: triton interprets its kernels in this process.

    Not part of the paper.
    """
    record = {
        "name": "kernels",
        "assumptions": ASSUMPTIONS,
        "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()},
        "passes": [_described(one) for one in _passes()],
        "triton": metadata.version("triton"),
        "provenance": describe(),
    }
    path = Path(output) / "kernels.json"
    write_record(path, record)
    report(
        f"Predictions, not measurements:\n\n{prediction_table(record)}\n\n{kernel_table(record)}"
    )
    report(f"\n{path}")
    return path


def prediction_table(record: Mapping[str, Any]) -> str:
    """Predicted microseconds of every pass, and which share of a copy's bandwidth its least bytes are then moved at.

    Not part of the paper.
    """
    rows = []
    for one in record["passes"]:
        cells = []
        for name, gpu in GPUS.items():
            seconds = sum(kernel["seconds"][name] for kernel in one["kernels"])
            share = one["least_bytes"] / copy_bandwidth(gpu) / seconds
            cells.append(f"{1e6 * seconds:,.0f}, {share:.0%}")
        rows.append([one["name"], f"{one['least_bytes'] / 2**20:,.0f}", *cells])
    return markdown(["predicted: µs, share of a copy", "least MiB", *GPUS], rows)


def kernel_table(record: Mapping[str, Any]) -> str:
    """What the kernels of two calls take on an H100, and what is predicted to limit them.

    Not part of the paper.
    """
    rows = []
    for one in record["passes"]:
        if not one["name"].startswith(_TOLD):
            continue
        for kernel in one["kernels"]:
            resources = _resources(kernel, _EXAMPLE)
            time = predict(Work(**kernel["work"]), resources, GPUS[_EXAMPLE])
            rows.append(
                [
                    f"{one['name']}: {kernel['name']}",
                    *(f"{resources.registers}", f"{resources.stack}", f"{resources.shared >> 10}"),
                    *(f"{kernel['work']['programs']:,}", f"{time.resident}"),
                    *(f"{time.ahead >> 10}", f"{1e6 * time.seconds:,.0f}", time.limit),
                ]
            )
    headings = ["registers", "stack", "KiB shared", "programs", "of them on a processor"]
    return markdown([f"predicted, {_EXAMPLE}", *headings, "KiB on their way", "µs", "limit"], rows)


def times(kernel: Mapping[str, Any]) -> dict[str, float]:
    """The predicted seconds of a kernel in a record, by GPU, from its work and resources.

    Not part of the paper.
    """
    work = Work(**kernel["work"])
    return {
        name: predict(work, _resources(kernel, name), gpu).seconds for name, gpu in GPUS.items()
    }


def _resources(kernel: Mapping[str, Any], gpu: str) -> Resources:
    return Resources(**kernel["resources"][str(GPUS[gpu].capability)])


def _described(one: _Pass) -> dict[str, Any]:
    launches = launches_of(one.call)
    kernels = [
        _kernel(launch, name) for launch, name in zip(launches, _names(launches), strict=True)
    ]
    return {"name": one.name, "least_bytes": one.least_bytes, "kernels": kernels}


def _names(launches: Sequence[Launch]) -> list[str]:
    """The names of kernels, with what they are of, and how often they have come."""
    found: Counter[str] = Counter()
    names = []
    for launch in launches:
        name = launch.kernel.__name__.removesuffix("_kernel").replace("_", " ")
        name = " ".join([name, *([launch.sizes["OF"]] if "OF" in launch.sizes else [])])
        found[name] += 1
        names.append(name if found[name] == 1 else f"{name} {found[name]}")
    return names


def _kernel(launch: Launch, name: str) -> dict[str, Any]:
    capabilities = sorted({gpu.capability for gpu in GPUS.values()})
    resources = {str(c): compile_launch(launch, c)._asdict() for c in capabilities}
    kernel = {"name": name, "work": work_of(launch)._asdict(), "resources": resources}
    return kernel | {"seconds": times(kernel)}


def _passes() -> list[_Pass]:
    """What the documentation tells of: the operator, and the folded module on feature maps."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    return [
        *_operator("operator, bfloat16", bfloat16),
        *_operator("operator, float32", float32),
        *_module("module 256 x 256, bfloat16", bfloat16, 256 * 256, heads=8),
        *_module("module 1024 x 1024, bfloat16", bfloat16, 1024 * 1024, heads=8),
        *_module("module 1024 x 1024, one head, bfloat16", bfloat16, 1024 * 1024, heads=1),
        *_module("module 256 x 256, float32", float32, 256 * 256, heads=8),
    ]


def _operator(name: str, dtype: torch.dtype) -> list[_Pass]:
    """Both passes for N = M = 65,536, 8 heads of 64 and 64 channels."""
    # They import triton, as this command does.
    from ..ops import triton_launch

    query, key, value, d_output = (_empty(dtype, 1, 8, 65536, 64) for _ in range(4))

    def forward() -> tuple[Tensor, ...]:
        mean, _, shift, total = triton_launch.summarize(key, value, None, "softmax")
        return triton_launch.attend(query, mean, "softmax", 1), mean, shift, total

    _, mean, shift, total = _without_launching(forward)

    def backward() -> None:
        triton_launch.attend_backward(d_output, query, mean, "softmax", 1, (True, True))
        summary = (None, mean, shift, total, "softmax", (True, True))
        triton_launch.summarize_backward(mean, None, key, value, *summary)

    return [
        _Pass(f"{name}, forward", forward, 4 * query.nbytes),
        _Pass(f"{name}, backward", backward, 7 * query.nbytes),
    ]


def _module(name: str, dtype: torch.dtype, positions: int, *, heads: int) -> list[_Pass]:
    """Both passes of 256 channels and 128 key channels: X twice and Y; X and d_Y twice and d_X."""
    from ..ops import triton_module_launch

    channels, keys = 256, 128
    x, d_output = (_empty(dtype, 1, channels, positions) for _ in range(2))
    shapes = ((keys, channels), (keys, channels), (channels, channels), (channels, channels))
    weights = [_empty(dtype, *shape) for shape in shapes]
    biases = [_empty(dtype, len(weight)) for weight in weights]
    module = (x, None, None, weights, biases, "softmax", heads, True)

    def forward() -> tuple[Tensor, ...]:
        return triton_module_launch.folded(*module)

    _, pooled, shift, total, column_sums = _without_launching(forward)

    def backward() -> None:
        summary = (pooled, shift, total, column_sums, (True, True, True))
        triton_module_launch.folded_backward(d_output, *module, *summary)

    return [
        _Pass(f"{name}, forward", forward, 3 * x.nbytes),
        _Pass(f"{name}, backward", backward, 5 * x.nbytes),
    ]


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _without_launching(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    launches_of(lambda: results.append(call()))
    return results[0]
