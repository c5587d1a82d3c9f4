"""A history only grows, and says the numbers that were measured."""

import json

import pytest

pytest.importorskip("pytorch_lightning")

import torch

from efficient_attention.training.history import History, provenance


def lines(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_second_start_goes_on_in_the_same_file(tmp_path):
    History(tmp_path).log_metrics({"a": 1}, step=0)
    History(tmp_path).log_metrics({"b": 2.5}, step=0)
    assert lines(tmp_path) == [{"step": 0, "a": 1.0}, {"step": 0, "b": 2.5}]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a"')
    History(tmp_path).log_metrics({"a": 3}, step=1)
    kept = (tmp_path / "history.jsonl").read_text().splitlines()
    assert kept == ['{"step": 0, "a": 1}', '{"step": 1, "a"', '{"step": 1, "a": 3.0}']


def test_numbers_are_the_shortest_that_are_the_measured_ones(tmp_path):
    value = torch.tensor(0.1)
    History(tmp_path).log_metrics({"a": value, "b": torch.tensor(1 / 3)}, step=0)
    (line,) = lines(tmp_path)
    assert line["a"] == 0.1
    assert torch.equal(torch.tensor(line["b"]), torch.tensor(1 / 3))


def test_infinite_and_undefined_values_are_said_as_such(tmp_path):
    History(tmp_path).log_metrics({"a": float("nan"), "b": float("inf")}, step=0)
    (line,) = lines(tmp_path)
    assert line["a"] != line["a"]
    assert line["b"] == float("inf")


def test_provenance_says_where_numbers_are_from():
    assert set(provenance()) == {
        "time",
        "command",
        "device",
        "python",
        "torch",
        "efficient_attention",
    }
