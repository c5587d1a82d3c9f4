"""What is done is known by its files, settings and outputs, and what a kill has cut short is not."""

import json
import os

import pytest

from efficient_attention.errors import InputError
from efficient_attention.prediction.journal import Journal, file_mark
from efficient_attention.prediction.work import Item, Made, output_folder, work_through


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "out").mkdir()
    return tmp_path


def add(folder, settings, result="well"):
    output = folder / "out" / "a.pfm"
    output.write_bytes(b"result")
    journal = Journal(folder / "out" / "j.jsonl", settings)
    journal.add("a", [file_mark(folder / "a.png")], [output], result)


def result(folder, settings):
    return Journal(folder / "out" / "j.jsonl", settings).result("a", [folder / "a.png"])


def test_what_is_done_is_known(folder):
    assert result(folder, {"scale": 1}) is None
    add(folder, {"scale": 1, "geometry": (1, 2)})
    assert result(folder, {"scale": 1, "geometry": [1, 2]}) == "well"


@pytest.mark.parametrize("change", ["size", "time", "settings", "output gone", "output cut"])
def test_any_change_means_that_it_is_not_done(folder, change):
    add(folder, {"scale": 1})
    picture, output = folder / "a.png", folder / "out" / "a.pfm"
    if change == "size":
        stat = picture.stat()
        picture.write_bytes(b"other picture")
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(picture, ns=(0, 12345))
    elif change == "output gone":
        output.unlink()
    elif change == "output cut":
        output.write_bytes(b"resul")
    assert result(folder, {"scale": 2 if change == "settings" else 1}) is None


def test_the_last_line_counts(folder):
    add(folder, {}, "first")
    add(folder, {}, "second")
    assert result(folder, {}) == "second"


def test_line_that_is_cut_short_does_not_count_nor_spoil_the_next(folder):
    add(folder, {}, "first")
    path = folder / "out" / "j.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # Without its end of line alone it is whole.
        assert result(folder, {}) == ("first" if length == len(whole) - 1 else None)
        add(folder, {}, "second")
        assert result(folder, {}) == "second"


def run(folder, make, names, **options):
    items = [Item(name, (folder / f"{name}.png",)) for name in names]
    journal = Journal(folder / "out" / "j.jsonl", {})
    reports = []
    options = {"overwrite": False, **options}
    outcome = work_through(
        items, make, journal, title="test", report=lambda *given: reports.append(given), **options
    )
    return outcome, reports


def test_work_goes_on_behind_what_fails_and_does_nothing_twice(folder):
    for name in "bc":
        (folder / f"{name}.png").touch()
    made = []

    def make(item):
        made.append(item.name)
        if item.name == "b" and len(made) < 4:
            raise InputError("b is bad")
        return Made([], f"{item.name} done")

    outcome, reports = run(folder, make, "abc")
    assert outcome == ({"a": "a done", "c": "c done"}, {"b": "b is bad"}, 0)
    assert reports == [("a", "a done"), ("c", "c done")]
    # What failed is tried again.
    outcome, reports = run(folder, make, "abc")
    assert outcome == ({"a": "a done", "b": "b done", "c": "c done"}, {}, 2)
    assert reports == [("b", "b done")]
    assert made == ["a", "b", "c", "b"]
    outcome, _ = run(folder, make, "abc", overwrite=True)
    assert (outcome.skipped, made[4:]) == (0, ["a", "b", "c"])


def test_defects_are_not_failures_of_a_picture(folder):
    def make(item):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(folder, make, "aa")


def test_single_failure_and_a_full_disk_end_the_work(folder):
    def bad(item):
        raise InputError("bad")

    def full(item):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="bad"):
        run(folder, bad, "a")
    with pytest.raises(InputError, match=r"place to be written to; .*No space left"):
        run(folder, full, "aa")


def test_results_do_not_go_where_pictures_come_from(folder):
    with pytest.raises(InputError, match="must be another folder than that of the pictures"):
        output_folder(folder / "out" / "..", [folder / "a.png"])
    with pytest.raises(InputError, match="must be a folder that can be written"):
        output_folder(folder / "a.png" / "deep", [])
    assert output_folder(folder / "new" / "deep", [folder / "a.png"]).is_dir()
    line = json.dumps({"name": "a"})
    (folder / "out" / "j.jsonl").write_text(f"{line}\n[]\n")
    assert result(folder, {}) is None
