"""What a plan says of memory is what is measured, and what cannot be is refused."""

import json

import pytest

pytest.importorskip("torchvision")

from efficient_attention.benchmark.capacity import capacity_table, measure_capacity
from efficient_attention.cli import main


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a small network, at one size where everything fits and one where the map does not."""
    folder = tmp_path_factory.mktemp("capacity")
    views = ((32, 64, 16), (512, 1024, 64))
    path = measure_capacity(
        limit="64 MiB", views=views, network="psmnet_small", output=folder / "new"
    )
    return json.loads(path.read_text())


def test_positions_are_a_quarter_of_disparities_rows_and_columns(record):
    assert [size["positions"] for size in record["views"]] == [4 * 8 * 16, 16 * 128 * 256]


def test_planned_peaks_are_those_measured(record):
    small = record["views"][0]
    assert [*small["kinds"]] == ["none", "efficient", "explicit", "fused"]
    for cost in small["kinds"].values():
        assert cost["measured"] == pytest.approx(cost["inference"], rel=0.02)


def test_the_map_is_larger_than_all_else_together(record):
    """Two numbers for each of N x N pairs, at 4 bytes, in inference: scores and weights."""
    kinds = record["views"][1]["kinds"]
    positions = record["views"][1]["positions"]
    assert kinds["explicit"]["inference"] > 2 * 4 * positions**2
    assert kinds["efficient"]["inference"] < kinds["explicit"]["inference"] / 1000
    # Fused, it fits in memory, at the same work as with the map or more, which is no less than N x N.
    assert kinds["fused"]["inference"] < kinds["explicit"]["inference"] / 1000
    assert kinds["fused"]["multiply_adds"] > positions**2 > kinds["efficient"]["multiply_adds"]


def test_what_is_beyond_the_limit_is_not_measured(record):
    large = record["views"][1]
    assert [cost["measured"] for cost in large["kinds"].values()] == [None] * 4


def test_the_non_local_module_says_that_its_map_does_not_fit(record):
    small, large = record["views"]
    assert small["refusal"] is None
    # 524,288 squared, at 4 bytes.
    assert "takes 1,024.0 GiB" in large["refusal"]
    assert capacity_table(record).endswith(f"512 x 1024, 64: {large['refusal']}")


def test_a_limit_that_is_no_size_is_told_in_one_line(capsys):
    assert main(["bench", "capacity", "--limit", "much"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "efficient-attention bench capacity: error: limit must be a positive size"
    )
    assert err.count("\n") == 1
