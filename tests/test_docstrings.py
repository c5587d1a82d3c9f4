"""The documentation of every public name is complete, and its examples are true."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import efficient_attention
from efficient_attention import memory
from efficient_attention.models import disparity, psmnet
from efficient_attention.ops import planner

README = Path(__file__).parent.parent / "README.md"
PUBLIC = {
    **{name: getattr(efficient_attention, name) for name in efficient_attention.__all__},
    "Context.merge": efficient_attention.Context.merge,
    **{
        name: getattr(efficient_attention.modules, name)
        for name in ("DiffusionEfficientAttention", "EfficientNonLocal")
    },
    **{f"memory.{name}": getattr(memory, name) for name in memory.__all__},
    **{f"disparity.{name}": getattr(disparity, name) for name in disparity.__all__},
    "psmnet.PSMNet": psmnet.PSMNet,
    **{
        f"planner.{name}": getattr(planner, name)
        for name in ("cheapest", "crossover", "module_costs", "operator_costs")
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_print_what_they_say(name):
    thing = PUBLIC[name]
    scope = {
        "torch": torch,
        **vars(inspect.getmodule(thing)),
        "efficient_attention": efficient_attention,
    }
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), scope, name, None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.skipif(not README.exists(), reason="not a checkout")
def test_the_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope = {}
    exec(example, scope)
    assert scope["y"].shape == (1, 256, 128, 128)
    torch.testing.assert_close(torch.cat(scope["outputs"], 3), scope["y"])


@pytest.mark.parametrize("name", efficient_attention.__all__)
def test_docstrings_have_example_and_source_or_point_to_one_that_has(name):
    doc = inspect.getdoc(PUBLIC[name])
    refers = "; see :class:`" in doc.splitlines()[0]
    assert refers or (">>> " in doc and "paper" in doc.lower())


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isfunction(PUBLIC[n])])
def test_every_argument_is_documented(name):
    doc = inspect.getdoc(PUBLIC[name])
    for argument in inspect.signature(PUBLIC[name]).parameters:
        if argument not in ("self", "costs", "among", "key_channels", "value_channels"):
            assert f"\n    {argument}:" in doc, argument
