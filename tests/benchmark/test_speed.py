"""Speed is compared in turns, among those who are right, and what would take too long is computed."""

import json
import os
import platform
import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from efficient_attention.benchmark.speed import timing
from efficient_attention.benchmark.speed.allocators import in_process
from efficient_attention.benchmark.speed.compiling import compiled
from efficient_attention.benchmark.speed.entries import OURS, Call, Entry, Unavailable
from efficient_attention.benchmark.speed.measurement import ENTRIES, measure
from efficient_attention.benchmark.speed.problems import MODES, Module, Operator
from efficient_attention.benchmark.speed.timing import Effort, Work, take_rounds
from efficient_attention.cli import main
from efficient_attention.testing import plain_attention

ONCE = Effort(rounds=1, shortest=0, budget=100)
SMALL = Operator(positions=24, heads=2, key_channels=8, value_channels=8)
SMALL_MAP = Module(height=5, width=6, channels=16, key_channels=8, value_channels=8, heads=2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the works of a test move on, by ``clock.now += seconds``."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "_clock", lambda: clock)
    monkeypatch.setattr(timing, "_others", lambda *_: 0.0)
    return clock


def calling(function, task):
    leaves = task.leaves()
    return Call(function, tuple(leaves.values()), leaves)


def entry(function, formula="same", power=1):
    return Entry("for a test", partial(calling, function), formula, power)


def test_fewest_bytes_are_those_counted_by_hand():
    # 2 heads of 10 positions, 4 bytes a number. Forward q, k, v, o: 3 + 3 + 5 + 5.
    # Backward q, k, v, do read and dq, dk, dv written: 4 x 3 + 3 x 5.
    sizes = {"positions": 10, "heads": 2, "key_channels": 3, "value_channels": 5}
    counts = {mode: Operator(**sizes, mode=mode).minimal_bytes for mode in MODES}
    assert counts == {"forward": 80 * 16, "backward": 80 * 27, "training": 80 * 43}
    # A map of 4 x 5 x 6 numbers of 2 bytes.
    sizes = {"height": 5, "width": 6, "channels": 4, "dtype": "bfloat16"}
    counts = {mode: Module(**sizes, mode=mode).minimal_bytes for mode in MODES}
    assert counts == {"forward": 3 * 240, "backward": 5 * 240, "training": 8 * 240}


@pytest.mark.parametrize(
    ("problem", "mode", "dtype"),
    list(product((SMALL, SMALL_MAP), MODES, ("float32", "bfloat16"))),
    ids=lambda x: getattr(x, "subject", x),
)
def test_whoever_has_our_formula_is_right(problem, mode, dtype):
    problem = type(problem)(**{**problem.__dict__, "mode": mode, "dtype": dtype})
    # What torch.compile makes takes a minute to make.
    names = set(ENTRIES[problem.subject]) - {"compiled"}
    found = measure(problem, ONCE, among=names)["entries"]
    assert set(found) == names
    for name, row in found.items():
        if "reason" in row:
            assert re.search("for GPUs|not installed|write over", row["reason"]), (name, row)
        else:
            assert row["times_ours"][1] > 0
            assert ("error" in row) == (ENTRIES[problem.subject][name].formula == "same")
    assert found[OURS]["times_ours"] == [1, 1, 1]
    assert {"products", "copy"} <= {name for name, row in found.items() if "times_ours" in row}


def test_who_is_wrong_is_not_timed():
    def wrong(query, key, value):
        return 1.001 * plain_attention(query, key, value)

    found = measure(SMALL, ONCE, entries={OURS: entry(plain_attention), "wrong": entry(wrong)})
    row = found["entries"]["wrong"]
    assert set(row) == {"reason"}
    assert re.fullmatch(
        r"wrong: output is off by 1\.0e-03 of its norm; at most \d\.\de-07 is right", row["reason"]
    )


def test_who_has_a_wrong_gradient_is_not_timed():
    def wrong(query, key, value):
        output = plain_attention(query, key, value)
        # The same value, half of the gradient.
        return (output + output.detach()) / 2

    problem = Operator(**{**SMALL.__dict__, "mode": "training"})
    found = measure(problem, ONCE, entries={OURS: entry(plain_attention), "wrong": entry(wrong)})
    assert re.match("wrong: .* is off by 5.0e-01", found["entries"]["wrong"]["reason"])


def test_another_formula_must_give_as_many_finite_numbers():
    entries = {
        OURS: entry(plain_attention),
        "fewer": entry(lambda q, k, v: v[:, :1], "other"),
        "not a number": entry(lambda q, k, v: v / 0 * 0, "other"),
        "other": entry(lambda q, k, v: v.transpose(1, 2), "other"),
    }
    found = measure(SMALL, ONCE, entries=entries)["entries"]
    assert found["fewer"]["reason"].startswith("wrong: 384 finite numbers expected; got (1, 1, 24")
    assert found["not a number"]["reason"].endswith("384 are not finite")
    assert "times_ours" in found["other"]


def test_nobody_is_compared_with_ours_if_it_is_wrong():
    """Its ratios would be those of a computation of something else."""
    entries = {OURS: entry(lambda q, k, v: v), "plain": entry(plain_attention)}
    found = measure(SMALL, ONCE, entries=entries)["entries"]
    assert found[OURS]["reason"].startswith("wrong: output")
    assert found["plain"]["reason"] == "ours cannot be compared with"


def test_works_take_turns_and_a_sample_is_long_enough(clock):
    order = []

    def work(name, seconds):
        def run(_):
            order.append(name)
            clock.now += seconds

        return Work(run)

    effort = Effort(rounds=3, shortest=0.02)
    rounds = take_rounds({"a": work("a", 0.01), "b": work("b", 0.5)}, device="cpu", effort=effort)
    assert rounds.seconds == {"a": pytest.approx([0.01] * 3), "b": pytest.approx([0.5] * 3)}
    # One call of each tells how many make a sample: two of a, one of b. Before each sample one more, untimed; another
    # begins each round.
    a, b = ["a", "a", "a"], ["b", "b"]
    assert order == ["a", "b", *a, *b, *b, *a, *a, *b]


def test_rounds_in_which_others_were_busy_are_taken_again(clock, monkeypatch):
    shares = iter([0.0, 0.5, 0.0, 0.3])
    monkeypatch.setattr(timing, "_others", lambda *_: next(shares))
    taken = iter(range(1, 9))

    def run(_):
        clock.now += next(taken)

    works = {"a": Work(run)}
    quiet = take_rounds(works, device="cpu", effort=Effort(rounds=2))
    # The first call was for the number of calls, and one before each sample; the third round was the second quiet one.
    assert quiet == ({"a": [3, 7]}, False)


def test_the_backward_pass_is_timed_without_the_forward_pass(clock):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            clock.now += 1
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock.now += 3
            return gradient

    def slow(query, key, value):
        return Slow.apply(plain_attention(query, key, value))

    def fast(query, key, value):
        output = plain_attention(query, key, value)
        clock.now += 1
        return output

    # Ours takes 1 forward and nothing backward but what is added here.
    def ours(query, key, value):
        output = fast(query, key, value)
        output.register_hook(lambda _: setattr(clock, "now", clock.now + 1))
        return output

    entries = {OURS: entry(ours), "slow": entry(slow)}
    for mode, times in (("backward", 3), ("training", 2)):
        problem = Operator(**{**SMALL.__dict__, "mode": mode})
        found = measure(problem, Effort(rounds=2, shortest=0), entries=entries)["entries"]
        assert found["slow"]["times_ours"] == pytest.approx([times] * 3)


def test_what_would_take_too_long_is_computed_from_fewer_positions(clock):
    def quadratic(query, key, value):
        # A second for each million of pairs.
        clock.now += query.shape[2] ** 2 / 1e6
        return plain_attention(query, key, value)

    def ours(query, key, value):
        clock.now += 2
        return plain_attention(query, key, value)

    entries = {OURS: entry(ours), "quadratic": entry(quadratic, "other", power=2)}
    problem = Operator(positions=8192, heads=1, key_channels=1, value_channels=1)
    found = measure(problem, Effort(rounds=1, shortest=0, budget=60), entries=entries)
    row = found["entries"]["quadratic"]
    assert row["computed"]
    assert row["times_ours"][1] == pytest.approx(8.192**2 / 2)
    # Memory grows with the positions: four times that of 2,048.
    short = measure(problem.at(2048), ONCE, entries=entries)["entries"]["quadratic"]
    assert row["bytes"] == pytest.approx(4 * short["bytes"], rel=0.01)


def test_what_is_held_is_counted():
    problem = Module(height=64, width=64, channels=64, key_channels=32, value_channels=32)
    found = measure(problem, ONCE, among=["in place", "authors"])["entries"]
    assert found["in place"]["bytes"] < found[OURS]["bytes"] - problem.input_bytes // 2
    # Keys, queries, values, attended values, each half a map; their softmax; the output and its sum with the input.
    assert found["authors"]["bytes"] > 3 * problem.input_bytes


def test_torch_compile_says_that_it_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="needs a C\\+\\+ compiler"):
        compiled(plain_attention, "cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(("allocator", "faults"), [("default", True), ("warm", False)])
def test_memory_is_cleared_again_by_default_and_used_again_where_it_is_warm(
    allocator, faults, monkeypatch
):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    usage = "__import__('resource').getrusage(0).ru_minflt"
    pages = in_process(allocator, eval, f"[len(b'x' * (64 << 20)) * 0 + {usage} for _ in range(3)]")
    # 64 MiB are 16,384 pages.
    assert (pages[2] - pages[1] > 1000) == faults
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "123"


def test_the_operator_is_measured_with_both_settings(tmp_path, capsys):
    sizes = ["--positions", "16", "--heads", "1", "--key-channels", "4", "--modes", "forward"]
    arguments = ["--peers", "plain", "SDPA", "copy", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "operator", *sizes, *arguments, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "operator_cpu.json").read_text())
    assert [case["allocator"] for case in record["cases"]] == ["default", "warm"]
    assert [*record["cases"][0]["entries"]] == ["ours", "plain", "SDPA", "copy"]
    assert record["provenance"]["threads"] == 1
    assert {"commit", "processor", "torch", "time"} <= set(record["provenance"])
    assert (
        "**Forward, float32, 1 head, 4 key and 4 value channels each**" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["operator", "--peers", "plan"], "peers must be among ours, triton, native, plain"),
        (
            ["module", "--heads", "3"],
            "heads must divide key and value channels, 128 and 128; got 3",
        ),
        (["module", "--maps", "3x0"], "must be HxW or a number; got '3x0'"),
        (["document", "nothing.md"], "nothing.md must be a file that can be read"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(arguments, message, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_gpu_that_is_not_here_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("it is here")
    assert main(["bench", "operator", "--device", "cuda"]) == 2
    assert "device must be one that is here" in capsys.readouterr().err
    assert not Path("benchmarks/results/speed/operator_cuda.json").exists()
