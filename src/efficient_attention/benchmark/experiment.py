"""An experiment, as a file says it: variants of one recipe that are trained alike, and what is compared."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError

__all__ = ["Experiment", "read_experiment"]

_BETTER = ("higher", "lower")
_CHECKPOINTS = ("last", "best")
_DEFAULTS = {"arguments": "", "checkpoint": "last", "seeds": [0, 1, 2]}


@dataclass(frozen=True)
class Experiment:
    """Variants of a recipe, each to be trained and tested under several seeds.

    Args:
        name: of the experiment: its file's, without the suffix.
        question: what it asks.
        recipe: the file that all variants have in common.
        variants: by name, what each has of its own, as arguments of the command line.
        baseline: the variant with which the others are compared.
        score: what is compared, as ``test`` writes it to ``test.jsonl``: ``top1``, ``end_point_error``...
        better: ``"higher"`` or ``"lower"``.
        arguments: of all variants.
        checkpoint: that is tested, ``"last"`` or ``"best"``. The best one is chosen by validation: where the recipe
            validates and tests on the same data, only the last one is fair.
        seeds: of the runs.
    """

    name: str
    question: str
    recipe: str
    variants: dict[str, tuple[str, ...]]
    baseline: str
    score: str
    better: str
    arguments: tuple[str, ...]
    checkpoint: str
    seeds: tuple[int, ...]

    def with_seeds(self, seeds: list[int]) -> Experiment:
        """The same under other seeds."""
        return replace(self, seeds=_seeds(seeds))


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment.

    The file is YAML with the arguments of :class:`Experiment` but ``name``; ``arguments``, ``checkpoint`` and ``seeds``
    may be left out. Arguments are written as on the command line::

        question: Is attention worth its place?
        recipe: recipes/small/resnet.yaml
        arguments: --trainer.max_epochs 2
        variants:
          none: --model.network.at '[]'
          efficient: --model.network.at '[res3]'
        baseline: none
        score: top1
        better: higher

    Args:
        path: of the file. The recipe's is relative to where the command runs, as all of them.

    Raises:
        InputError: what cannot be read, a key that is not one of these, a value that cannot be.

    Not part of the paper.
    """
    path = Path(path)
    given = _mapping(path)
    keys = [field.name for field in fields(Experiment) if field.name != "name"]
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            meant = f"; {near[0]} is one" if near else ""
            raise InputError(f"keys of {path} must be among {keys}; got {key!r}{meant}")
    missing = [key for key in keys if key not in {**given, **_DEFAULTS}]
    if missing:
        raise InputError(f"{path} must have {', '.join(keys)}; {', '.join(missing)} is missing")
    values = {**_DEFAULTS, **given}
    try:
        return Experiment(name=path.stem, **{key: _read(key, values) for key in keys})
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"experiment must be a YAML file; {path}: {reason}") from error
    if not isinstance(given, Mapping):
        raise InputError(f"experiment must be a YAML file of keys and values; got {path}")
    return given


def _read(key: str, values: Mapping[str, Any]) -> Any:
    value = values[key]
    if key == "seeds":
        return _seeds(value)
    if key == "variants":
        return _variants(value)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text; got {value!r}")
    if key == "arguments":
        return tuple(shlex.split(value))
    if key == "recipe" and not Path(value).is_file():
        raise ValueError(f"recipe must be a file; got {value}")
    choices = {"better": _BETTER, "checkpoint": _CHECKPOINTS, "baseline": values["variants"]}
    if key in choices and value not in choices[key]:
        raise ValueError(f"{key} must be one of {list(choices[key])}; got {value!r}")
    return value


def _variants(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"variants must be arguments by name; got {value!r}")
    for name, arguments in value.items():
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise ValueError(
                f"variants must be texts by name, '' for none of its own; got {name!r}: {arguments!r}"
            )
    return {name: tuple(shlex.split(arguments)) for name, arguments in value.items()}


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise ValueError(f"seeds must be a list of integers; got {value!r}")
    if len(set(value)) < len(value) or min(value) < 0:
        raise ValueError(f"seeds must be different and not negative; got {value}")
    return tuple(value)
