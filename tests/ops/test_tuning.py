"""Tiles are timed only if asked for, once for each kind of call, and remembered by other processes."""

import json

import pytest
import torch

from efficient_attention.ops import tiling, tuning
from efficient_attention.testing import make_inputs, relative_error

TILE = tiling.Tile(positions=32, key_channels=64, value_channels=64, warps=4, stages=2)
CPU = torch.device("cpu")


class TooLarge(Exception):
    pass


@pytest.fixture
def folder(tmp_path):
    tuning.autotune(folder=tmp_path / "tiles")
    yield tmp_path / "tiles"
    tuning.autotune(False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a run puts forward by what its tile takes."""
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    return now


def test_candidates_are_few_and_differ_in_one_thing_that_changes_no_memory():
    for tile in (TILE, TILE._replace(positions=16, warps=8, stages=1)):
        found = tiling.candidates(tile)
        assert found[0] == tile
        assert len(set(found)) == len(found) <= 7
        for other in found[1:]:
            changed = [name for name in tile._fields if getattr(other, name) != getattr(tile, name)]
            assert len(changed) == 1
            assert changed[0] in ("positions", "warps", "stages")
            assert other.positions >= 16
            assert other.stages >= 1


def test_the_fastest_that_fits_is_taken_and_remembered(folder, clock):
    runs = []

    def run(tile):
        runs.append(tile)
        if tile.positions == 64:
            raise TooLarge
        clock[0] += 1.0 if tile.warps == 8 else 2.0

    def choose(kind, runner=run):
        return tuning.chosen(TILE, kind, CPU, runner, TooLarge)

    best = TILE._replace(warps=8)
    assert choose({"kernel": "a"}) == best
    # Each twice, to compile and to time, but for what does not fit.
    assert len(runs) == 2 * len(tiling.candidates(TILE)) - 1
    runs.clear()
    assert choose({"kernel": "a"}) == best
    tuning.autotune(folder=folder)  # as a new process would
    assert choose({"kernel": "a"}) == best
    assert not runs
    (record,) = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert record["kind"]["device"] == "cpu"
    assert record["kind"]["triton"]
    assert record["seconds"][1] == [64, 64, 64, 4, 2, 64, None]
    choose({"kernel": "b"})
    assert runs


def test_what_must_not_be_repeated_is_not_timed(folder):
    assert tuning.chosen(TILE, {"kernel": "a"}, CPU, None, TooLarge) == TILE
    assert not folder.exists()


def test_kernels_are_right_in_every_tile_and_timed_only_if_asked(folder, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from efficient_attention import efficient_attention

    if torch.cuda.is_available():
        pytest.skip("times the interpreter's kernels, on a CPU")
    query, key, value = make_inputs(1, 1, 20, 40, 4, 4, dtype=torch.float32)
    timed = []
    monkeypatch.setattr(
        tuning, "_seconds", lambda run, *_: (run(), timed.append(run), len(timed))[2]
    )
    got = efficient_attention(query, key, value, backend="triton", order="linear")
    expected = efficient_attention(query.double(), key.double(), value.double(), order="linear")
    assert relative_error(got, expected) < 1e-6
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    assert len(list(folder.iterdir())) == 2  # summarize and attend
    count = len(timed)
    efficient_attention(query, key, value, backend="triton", order="linear")
    tuning.autotune(False)
    efficient_attention(query[:, :, :7], key, value, backend="triton", order="linear")
    assert len(timed) == count
