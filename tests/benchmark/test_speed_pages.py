"""Records of speed are shown as they are, the planner is judged by what was measured, and advice follows from it."""

import json
import re

import pytest

from efficient_attention.benchmark.speed import advice
from efficient_attention.benchmark.speed.advice import Findings, crossover_length, in_words
from efficient_attention.benchmark.speed.entries import OURS
from efficient_attention.benchmark.speed.orders import GRID, measure_orders, orders_table
from efficient_attention.benchmark.speed.problems import Module, Operator
from efficient_attention.benchmark.speed.tables import over_table, speed_tables
from efficient_attention.benchmark.speed.timing import Effort
from efficient_attention.cli import main
from efficient_attention.ops import native_build


def operator_case(positions, allocator, entries, **others):
    return {
        "allocator": allocator,
        **Operator(positions=positions).describe(),
        "input_bytes": 1,
        "disturbed": False,
        "entries": entries,
        **others,
    }


def times(median, **others):
    return {"times_ours": [median / 2, median, median * 2], **others}


@pytest.fixture
def record():
    """Of two lengths, with a quadratic entry that was computed at the second, and one that is not installed."""
    missing = {"reason": "not installed"}
    return {
        "name": "operator",
        "device": "cpu",
        "entries": {name: {} for name in (OURS, "plain", "SDPA", "peer", "copy")},
        "cases": [
            operator_case(n, allocator, {**entries, "peer": missing}, disturbed=n == 64)
            for allocator, factor in (("default", 2), ("warm", 1))
            for n, entries in (
                (
                    64,
                    {
                        OURS: times(1, bytes=1024),
                        "plain": times(0.456 * factor, bytes=2048),
                        "SDPA": times(0.5, bytes=512),
                        "copy": times(0.1),
                    },
                ),
                (
                    65536,
                    {
                        OURS: times(1, bytes=2**20),
                        "plain": times(1.2 * factor, bytes=2**21),
                        "SDPA": times(1234.5, bytes=2**20, computed=True),
                        "copy": times(0.2),
                    },
                ),
            )
        ],
        "provenance": {
            "processor": "Abacus 3",
            "torch": "2.14.1",
            "time": "2026-11-26T01:02:03+00:00",
            "commit": "0123456789abcdef",
            "changed": False,
            "threads": 2,
        },
    }


def test_tables_are_those_of_the_record(record):
    assert speed_tables(record) == (
        "**Forward, float32, 8 heads, 64 key and 64 value channels each**\n\n"
        "| positions; times of ours | allocator | plain | SDPA | copy |\n"
        "|---|--:|--:|--:|--:|\n"
        "| 64 | default* | 0.91 | 0.50 | 0.10 |\n"
        "| 64 | warm* | 0.46 | 0.50 | 0.10 |\n"
        "| 65,536 | default | 2.40 | ≈ 1,234 | 0.20 |\n"
        "| 65,536 | warm | 1.20 | ≈ 1,234 | 0.20 |\n\n"
        "| positions; memory | ours | plain | SDPA |\n"
        "|---|--:|--:|--:|\n"
        "| 64 | 1.00 KiB | 2.00 KiB | 512 B |\n"
        "| 65,536 | 1.00 MiB | 2.00 MiB | 1.00 MiB |\n\n"
        "Not measured:\n"
        "- peer, in all cases: not installed\n"
        "- \\* other processes took more than a tenth of the processors"
    )


def test_memory_of_modules_is_in_maps(record):
    problem = Module(height=4, width=4)
    case = {
        **record["cases"][0],
        **problem.describe(),
        "input_bytes": problem.input_bytes,
        "entries": {OURS: times(1, bytes=problem.input_bytes * 5 // 4)},
    }
    table = speed_tables({**record, "cases": [case]})
    assert "| map; memory in maps | ours |\n|---|--:|\n| 4 x 4 | 1.25 |" in table


def test_on_a_gpu_there_are_times_too(record):
    case = {**record["cases"][0], "device": "cuda"}
    case["entries"] = {OURS: times(1, microseconds=[8, 9.4, 11]), "plain": times(2)}
    table = speed_tables({**record, "cases": [case]})
    assert (
        "| positions; times of ours | ours, µs | plain |\n|---|--:|--:|\n| 64 | 9 | 2.00 |" in table
    )


def test_a_document_has_what_its_records_say(record, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "docs"
    folder.mkdir()
    (tmp_path / "some.json").write_text(json.dumps(record))
    (tmp_path / "other.json").write_text(json.dumps(record))
    document = folder / "speed.md"
    empty = "<!-- record: other.json -->\n<!-- end -->\n"
    document.write_text(f"# A\n<!-- record: some.json -->\nold\n<!-- end -->\n{empty}B\n")
    assert main(["bench", "document", str(document)]) == 0
    assert capsys.readouterr().out == "some.json\nother.json\n"
    text = document.read_text()
    assert text.startswith(
        "# A\n<!-- record: some.json -->\n![Times of ours over positions](speed/some.svg)\n\n"
        "*Abacus 3, 2 threads, torch 2.14.1, 2026-11-26, commit 0123456789ab.*\n\n**Forward"
    )
    assert text.endswith("\n<!-- end -->\nB\n")
    assert "old" not in text
    assert text.count("**Forward") == 2
    picture = (folder / "speed" / "some.svg").read_text()
    assert "forward, float32, 8 heads" in picture
    # In words, as letters.
    assert {"plain", "SDPA"} <= set(re.findall(r">(\w+)</text>", picture))
    # The second time it is the same, to the bit.
    main(["bench", "document", str(document)])
    assert (document.read_text(), (folder / "speed" / "some.svg").read_text()) == (text, picture)


def test_a_place_may_ask_what_others_take_over_one_of_them(tmp_path, record, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    (tmp_path / "some.json").write_text(json.dumps(record))
    document = folder / "kernels.md"
    document.write_text("<!-- record: some.json over SDPA -->\n<!-- end -->\n")
    assert main(["bench", "document", str(document)]) == 0
    table = (
        "| positions; times of SDPA, default / warm | ours | plain | copy |\n|---|--:|--:|--:|\n"
        "| 64 | 2.00 / 2.00 | 1.82 / 0.91 | 0.20 / 0.20 |\n"
        "| 65,536 | ≈ 0.00 / ≈ 0.00 | ≈ 0.00 / ≈ 0.00 | ≈ 0.00 / ≈ 0.00 |\n<!-- end -->"
    )
    assert table in document.read_text()
    assert not (folder / "kernels").exists()
    record["entries"]["copy"]["formula"] = "floor"
    for case in record["cases"]:
        case["mode"] = case["allocator"]
    assert "| positions; times of plain, default / warm | ours | SDPA |" in over_table(
        record, "plain"
    )
    assert "| 64, warm |  / 2.19 |  / 1.10 |" in over_table(record, "plain")
    document.write_text("<!-- record: some.json over nobody -->\n<!-- end -->\n")
    assert main(["bench", "document", str(document)]) == 2
    assert "must have the entry nobody; it has ours, plain" in capsys.readouterr().err


def test_a_document_without_a_place_is_told(tmp_path, capsys):
    (tmp_path / "a.md").write_text("# A\n")
    assert main(["bench", "document", str(tmp_path / "a.md")]) == 2
    assert "must have a line <!-- record: FILE -->" in capsys.readouterr().err


def test_the_planner_is_judged_by_the_best_order(tmp_path):
    problems = [
        Operator(positions=16, heads=1, key_channels=8, value_channels=8),
        Operator(positions=16384, heads=1, key_channels=4, value_channels=4),
        Module(height=4, width=4, channels=8, key_channels=4, value_channels=8, heads=1),
    ]
    effort = Effort(rounds=1, shortest=0)
    path = measure_orders(problems, effort=effort, threads=1, output=tmp_path)
    record = json.loads(path.read_text())
    short, long, module = record["cases"]
    assert set(short["times"]) == {"linear", "quadratic"}
    # A map of a GiB.
    assert set(long["times"]) == {"linear"}
    assert (long["planned"], long["best"], long["distance"], long["near"]) == (
        "linear",
        "linear",
        1,
        True,
    )
    assert len(module["times"]) == 5
    for case in record["cases"]:
        best = min(case["times"].values())
        assert case["times"][case["best"]] == best
        taken = min(1, case["times"][case["planned"]])
        assert case["distance"] == pytest.approx(taken / min(1, best), abs=1e-3)
        assert case["near"] == (taken / min(1, best) <= 1.1)


def test_the_shapes_where_the_planner_is_wrong_are_named():
    case = {
        **operator_case(64, "default", {}),
        "planned": "linear",
        "best": "quadratic",
        "distance": 1.5,
        "near": False,
    }
    right = {**case, "near": True, "distance": 1.0}
    table = orders_table({"near": 1.1, "cases": [right, case, right]})
    assert "| operator | default | 3 | 2 | 66.7 % |" in table
    wrong = "| 64 positions, 1 x 8 heads, 64 / 64 | default | linear | quadratic | 1.50 times the best |"
    assert table.endswith(wrong)


def test_the_grid_goes_from_a_few_positions_to_many_in_both_subjects():
    operators = [p for p in GRID if p.subject == "operator"]
    assert {16, 65536} <= {p.positions for p in operators}
    assert any(p.key_channels != p.value_channels for p in operators)
    assert {(8, 8), (128, 128)} <= {(p.height, p.width) for p in GRID if p.subject == "module"}


@pytest.mark.parametrize(
    ("curve", "length"),
    [
        ({16: 2.0, 64: 3.0}, 0),
        ({16: 0.5, 64: 0.9}, None),
        ({16: 0.5, 64: 2.0}, 32),
        # At a quarter of the way, in logarithms: 0.5 to 8 is four doublings, 16 to 256 too.
        ({256: 8.0, 16: 0.5}, 32),
        # The last time counts.
        ({16: 0.5, 32: 2.0, 64: 0.25, 256: 4.0}, 128),
    ],
)
def test_the_crossover_is_where_the_curve_passes_one(curve, length):
    assert crossover_length(curve) == length


@pytest.mark.parametrize(
    ("times_there", "warm", "says"),
    [
        (
            40.0,
            1.5,
            "Take efficient attention: it is 40 times as fast at 100 positions, and 1.5 times",
        ),
        (40.0, 1.0, "Take efficient attention: it is 40 times as fast at 100 positions."),
        (40.0, None, "Take efficient attention: it is 40 times as fast at 100 positions."),
        (1.1, 1.0, "Take either"),
        (0.9, 1.0, "Take either"),
        (0.5, 1.0, "Keep dot-product attention: it is 2 times as fast at 100 positions."),
    ],
)
def test_advice_follows_from_what_was_measured(times_there, warm, says):
    curve = {16: 0.5, 64: 2.0}
    found = Findings(curve, times_there, False, (100, 250), "linear", warm)
    lines = in_words(Operator(positions=100), found)
    assert lines[-1].startswith(says)
    assert lines[1] == "crossover: about 32 positions"
    assert "2.5 times the memory" in lines[2]
    assert ("MALLOC_MMAP_THRESHOLD_" in "".join(lines)) == (warm is not None)


def test_whoever_could_have_kernels_is_told_how():
    found = Findings({16: 2.0}, 4.0, False, (1, 1), "linear", 1.0)
    for kernels in (None, True, False):
        lines = in_words(Operator(positions=100), found._replace(kernels=kernels))
        assert ("efficient_attention.build_native()" in "".join(lines)) == (kernels is False)


def test_whoever_has_no_products_of_a_dtype_is_told():
    found = Findings({16: 2.0}, 4.0, False, (1, 1), "linear", 1.0)
    for slow in (True, False):
        lines = in_words(Operator(positions=100, dtype="bfloat16"), found._replace(slow=slow))
        assert any("no products of bfloat16" in line for line in lines) == slow


@pytest.mark.parametrize("where", [["--positions", "300"], ["--map", "20x10", "--channels", "8"]])
def test_a_user_is_advised(where, monkeypatch, capsys):
    monkeypatch.setattr(advice, "in_process", lambda _, function, *arguments: function(*arguments))
    monkeypatch.setattr(advice, "_LENGTHS", (16, 64))
    monkeypatch.setattr(native_build, "why_not", lambda: "it is not for this test")
    monkeypatch.setattr(advice, "_QUICK", Effort(rounds=1, shortest=0))
    assert main(["advise", *where, "--heads", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6
    assert re.match("time of dot-product attention.*: 16: .*, 64: ", out[0])
    assert re.match(r'order that the planner takes there: "(linear|folded)"', out[3])
    assert out[5].startswith(("Take", "Keep"))


def test_tensors_that_do_not_fit_are_told_before_they_are_made(capsys):
    assert main(["advise", "--positions", str(10**9)]) == 2
    assert "positions must be so many that their tensors fit" in capsys.readouterr().err
