"""The command line says what is wrong in one line, and hands on what it was given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import efficient_attention
from efficient_attention import demo
from efficient_attention.cli import main

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder to work in, with a small photo, a text and a file that is in the way."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("photo.png")
    Path("notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What the demo was asked for, instead of doing it."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(demo, "show_depth", lambda **options: calls.append(((), options)))
    return calls


def code(*arguments):
    """The exit code, however it is given."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize(
    ("arguments", "names", "got"),
    [
        (["demo", "nothing.png"], "image must be", "nothing.png"),
        (["demo", "notes.txt"], "image must be", "notes.txt"),
        (["demo", "."], "image must be", "a folder"),
        (["demo", "photo.png", "--pixel", "40", "2"], "pixel must be X from 0 to 39", "got 40 2"),
        (["demo", "--pixel", "1"], "argument --pixel", "expected 2 arguments"),
        (["demo", "--pixel", "-1", "2"], "argument --pixel: must be an integer", "got '-1'"),
        (["demo", "--pixel", "a", "2"], "argument --pixel: must be an integer", "got 'a'"),
        (["demo", "--steps", "0"], "argument --steps: must be an integer from 1", "got '0'"),
        (["demo", "--steps", "1.5"], "argument --steps: must be an integer", "got '1.5'"),
        (["demo", "--seed", "-1"], "argument --seed: must be an integer from 0", "got '-1'"),
        (["demo", "--seed", str(2**32)], "argument --seed: must be", f"got '{2**32}'"),
        (["demo", "photo.png", "--output", "notes.txt"], "output must be", "notes.txt"),
        (["demo", "--colour"], "unrecognized arguments", "--colour"),
        (["dance"], "argument COMMAND: invalid choice", "'dance'"),
        ([], "required", "COMMAND"),
    ],
)
def test_user_error_is_one_line_on_stderr_and_code_2(small, capsys, arguments, names, got):
    assert code(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("efficient-attention")
    assert ": error: " in err
    assert names in err
    assert got in err
    assert {p.name for p in small.iterdir()} == {"photo.png", "notes.txt"}


def test_demo_is_given_every_option(calls):
    arguments = [
        "demo",
        "a.jpg",
        "--output",
        "there",
        "--pixel",
        "3",
        "4",
        "--steps",
        "7",
        "--seed",
        "8",
    ]
    assert main(arguments) == 0
    (((image,), options),) = calls
    options.pop("report")
    assert image == "a.jpg"
    assert options == {"output": "there", "pixel": (3, 4), "steps": 7, "seed": 8}


def test_demo_has_the_defaults_of_its_function(calls):
    assert main(["demo"]) == 0
    ((), depth), ((image,), options) = calls
    depth.pop("report")
    options.pop("report")
    assert depth == {"output": "out"}
    assert image is None
    assert options == {"output": "out", "pixel": None, "steps": 400, "seed": 0}


def test_demo_reports_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *args, report, **options: report("a line"))
    assert main(["demo", "a.jpg"]) == 0
    assert capsys.readouterr().out == "a line\n"


def test_interrupt_ends_with_130_and_without_a_traceback(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo", "a.jpg"]) == 130
    assert capsys.readouterr().err == "\nefficient-attention demo: interrupted\n"


def test_missing_extra_is_told_in_one_line(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.delattr("PIL.Image")
    assert main(["demo", "photo.png"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'efficient-attention[plot]'" in err
    assert err.count("\n") == 1


def test_defect_keeps_its_traceback(monkeypatch):
    def fail(*args, **options):
        raise ValueError("a defect")

    monkeypatch.setattr(demo, "run", fail)
    with pytest.raises(ValueError, match="a defect"):
        main(["demo", "a.jpg"])


def test_version_is_that_of_the_package(capsys):
    assert code("--version") == 0
    assert capsys.readouterr().out == f"efficient-attention {efficient_attention.__version__}\n"


def test_help_lists_the_commands(capsys):
    assert code("--help") == 0
    assert "demo" in capsys.readouterr().out


def test_module_runs_as_the_command_and_survives_a_reader_that_leaves(small):
    source = Path(efficient_attention.__file__).parent.parent
    command = [sys.executable, "-m", "efficient_attention.cli", "demo", "photo.png", "--steps", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(source)}
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
