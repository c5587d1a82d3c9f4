"""What the documentation of detection's and classification's data and metrics shows is true."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

MODULES = [
    importlib.import_module(f"efficient_attention.{name}")
    for name in (
        "data.batches",
        "data.coco",
        "data.coco_checks",
        "data.draws",
        "data.fashion_mnist",
        "data.generated_cues",
        "data.generated_shapes",
        "data.image_folders",
        "data.outlines",
        "data.packing",
        "data.segmentations",
        "data.textures",
        "metrics.classification",
        "metrics.detection",
    )
]
NAMES = [(module, name) for module in MODULES for name in module.__all__]


@pytest.mark.parametrize(
    ("module", "name"), NAMES, ids=[f"{m.__name__.split('.', 1)[1]}.{n}" for m, n in NAMES]
)
def test_examples_print_what_they_say(module, name, tmp_path):
    scope = {"torch": torch, "Path": Path, "folder": str(tmp_path), **vars(module)}
    thing = getattr(module, name)
    documented = thing if inspect.isclass(thing) or inspect.isfunction(thing) else object
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(documented), scope, name, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
