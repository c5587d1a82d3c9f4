"""The examples of prediction print what they say, and its public functions say what they take."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import efficient_attention
from efficient_attention import files, prediction

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
MODULES = [
    *(
        importlib.import_module(f"efficient_attention.prediction.{path.stem}")
        for path in sorted(Path(prediction.__path__[0]).glob("*.py"))
        if path.stem != "__init__"
    ),
    files,
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in (*module.__all__, "image_ids")
    if callable(getattr(module, name, None))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_example_prints_what_it_says(name, tmp_path):
    thing = PUBLIC[name]
    scope = {
        "torch": torch,
        "Path": Path,
        "create_model": efficient_attention.create_model,
        **vars(inspect.getmodule(thing)),
        "folder": tmp_path,
    }
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, name, None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", prediction.__all__)
def test_what_is_public_has_an_example_and_documents_its_arguments(name):
    thing = getattr(prediction, name)
    doc = inspect.getdoc(thing)
    if inspect.isfunction(thing):
        assert ">>> " in doc
    for argument in inspect.signature(thing).parameters:
        assert f"\n    {argument}:" in doc, argument


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="predict_nothing"):
        prediction.predict_nothing  # noqa: B018
