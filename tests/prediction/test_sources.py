"""Files are found by name, folder and pattern, in one order, and get names of their own."""

from pathlib import Path

import pytest

from efficient_attention.errors import InputError
from efficient_attention.prediction.sources import TRUTHS, find_files, find_pictures, short_names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.png",
        "b/1.JPG",
        "b/.hidden.png",
        "b/notes.txt",
        "b/1.pfm",
        "b/deep/1.png",
        "c/1.png",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("b", ["b/1.JPG", "b/2.png"]),
        ("b/2.png", ["b/2.png"]),
        ("b/notes.txt", ["b/notes.txt"]),
        ("b/*", ["b/1.JPG", "b/1.pfm", "b/2.png", "b/notes.txt"]),
        ("*/1.png", ["c/1.png"]),
        ("**/*.png", ["b/2.png", "b/deep/1.png", "c/1.png"]),
    ],
)
def test_argument_names_files_in_order(folder, argument, found):
    assert [str(path) for path in find_files(argument)] == found


def test_folder_is_searched_for_other_endings_too(folder):
    assert [path.name for path in find_files("b", TRUTHS)] == ["1.pfm", "2.png"]


def test_brackets_in_a_name_that_is_there_are_no_pattern(folder):
    Path("a[1].png").touch()
    assert find_files("a[1].png") == [Path("a[1].png")]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("no.png", "no such file or folder"),
        ("*.gif", "matches none"),
        ("b/deep/../../e", "no such"),
    ],
)
def test_what_is_not_there_is_told(folder, argument, expected):
    with pytest.raises(InputError, match=expected) as caught:
        find_files(argument)
    assert f"got '{argument}'" in str(caught.value)


def test_empty_folder_is_told(folder):
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"'empty' must hold files that end in \.bmp.*; got none"):
        find_files("empty")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["b/1.png"], ["1"]),
        (["b/1.png", "b/2.png"], ["1", "2"]),
        (["b/1.png", "c/1.png"], ["b_1", "c_1"]),
        (["b/1.png", "b/deep/1.png"], ["1", "deep_1"]),
        (["b/1.png", "b/1.JPG"], ["1.png", "1.JPG"]),
        (["b/1.x.png", "b/1.y.png"], ["1.x", "1.y"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_picture_that_is_named_twice_counts_once(folder):
    assert find_pictures(["b", "b/2.png", "c"]) == {
        "b_1": Path("b/1.JPG"),
        "b_2": Path("b/2.png"),
        "c_1": Path("c/1.png"),
    }


def test_view_that_is_named_twice_has_no_name():
    with pytest.raises(InputError, match=r"got 'a\.png' twice"):
        short_names([Path("a.png"), Path("a.png")])
