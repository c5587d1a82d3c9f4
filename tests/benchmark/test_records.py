"""What the documentation says is what was recorded."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")

from efficient_attention.benchmark.capacity import capacity_table
from efficient_attention.benchmark.loading import loading_table
from efficient_attention.benchmark.speed.document import show
from efficient_attention.benchmark.spread import differences, spread
from efficient_attention.benchmark.tables import comparison_table

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "experiments.md"
# Pages, and the folders of their records.
SPEED = {
    "speed.md": RESULTS / "speed",
    "speed_amx.md": RESULTS / "speed" / "amx",
    "speed_avx2.md": RESULTS / "speed" / "avx2",
}
COMPARISONS = sorted(p for p in RESULTS.glob("experiments/*.json") if p.stem != "capacity")
pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="not a checkout")


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_tables_of_comparisons_are_those_of_their_records(path):
    assert comparison_table(read(path)) in DOCUMENT.read_text()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_records_sum_up_the_scores_of_their_runs(path):
    record = read(path)
    scores = {
        name: {str(run["seed"]): run["scores"][record["score"]] for run in variant["runs"]}
        for name, variant in record["variants"].items()
    }
    for name, variant in record["variants"].items():
        assert variant["score"] == spread(scores[name])._asdict()
        if name != record["baseline"]:
            apart = differences(scores[name], scores[record["baseline"]])
            assert variant["minus_baseline"] == apart._asdict()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_records_are_of_committed_code_and_several_seeds(path):
    record = read(path)
    runs = [run for variant in record["variants"].values() for run in variant["runs"]]
    assert {run[stage]["changed"] for run in runs for stage in ("fit", "test")} == {False}
    assert len(record["seeds"]) >= 3


def test_the_table_of_what_fits_is_that_of_its_record():
    assert capacity_table(read(RESULTS / "experiments" / "capacity.json")) in DOCUMENT.read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("loading/*.json")), ids=lambda path: path.stem)
def test_tables_of_loading_are_those_of_their_records(path):
    assert loading_table(read(path)) in DOCUMENT.read_text()


def test_the_documentations_program_gives_what_it_says():
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    scope = {}
    exec(program, scope)
    assert scope["error"].item() == pytest.approx(4.29, abs=0.01)


def test_the_rate_of_scenes_is_that_of_its_record():
    rate = read(RESULTS / "samples" / "GeneratedStereo.json")["samples_per_cpu_second"]
    assert rate >= 20
    assert f"{rate} pairs" in DOCUMENT.read_text()


@pytest.mark.parametrize(("page", "folder"), SPEED.items())
def test_tables_of_speed_are_those_of_their_records(page, folder):
    text = (ROOT / "docs" / page).read_text()
    records = set(folder.glob("*.json"))
    named = re.findall(r"<!-- record: (\S+) -->", text)
    assert {ROOT / name for name in named} == records
    assert all(show(read(path)) in text for path in records)
    pictures = re.findall(r"!\[.*?\]\((\S+)\)", text)
    assert pictures
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)


def test_tables_over_an_entry_are_those_of_their_records():
    text = (ROOT / "docs" / "native.md").read_text()
    places = re.findall(r"<!-- record: (\S+) over (\S+) -->", text)
    assert places
    assert all(show(read(ROOT / path), base) in text for path, base in places)
