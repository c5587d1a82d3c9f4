"""What is wrong with a recipe or a command line, in one line, and the nearest word that would be right.

The parser's own messages say where they come from; here they are read, and said as a user of recipes would say them.
One that is not recognized is told as it is, in one line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, get_type_hints

from .data import Data
from .optimization import Optimizer, Schedule
from .task import Task

__all__ = ["in_one_line"]

# What a recipe may name without its module, by the last part of the key.
_SHORT = {"model": Task, "data": Data, "optimizer": Optimizer, "schedule": Schedule}
# Where the parser is, from the outside in.
_KEY = re.compile(r'Parser key "([\w.]+)": *')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)': *")
_FACTORY = re.compile(r"Type collections\.abc\.Callable\[.*?\] expects a .*?class: *")
_FACTORY_CLASS = re.compile(r"\.? Got value: Namespace\(class_path='([\w.]+)'.*")
# What it finds there.
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option '|Subcommand '\w+' does not accept option '"
    r"|Option '|unrecognized arguments: (?:--)?)"
    r"(?P<key>[\w.-]+)"
)
_NO_CLASS = re.compile(r"Expected a dot import path string: ([\w.]+)")
_NO_PAIR = re.compile(r"Not a valid subclass of|Expected an instantiatable class")
_PAIR = ("class_path", "init_args")
_NOT_IN_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CHOICE = re.compile(
    r"(?:must be (?:among|one of) [(\[]|expected )(?P<words>.*'.*'.*)[)\]]?; got \[?'?(?P<got>[\w.-]+)"
)
# What it says around the reason.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Expected a <class 'NoneType'>"
    r"|Expected a path but .*|Given value type: .*|Given value: (?:Namespace|NestedArg|\{).*"
)
_WORDS = (
    (r"Expected an? typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"Expected an? <class '(\w+)'>", r"expected \1"),
    (r"\.? (?:Given|Got) value: ", "; got "),
    (r" expected ", " or "),
    (r"are required:", "are required, as a recipe (--config recipes/...) has them:"),
)
# Of more options, only the nearest is told.
_SHOWN = 16


def in_one_line(message: str, options: Iterable[str] = ()) -> str:
    """A message about a recipe, a command line or what is built from them, in one line.

    Args:
        message: of the parser or of a class that refuses its arguments.
        options: that the command has, dotted.

    Example:
        >>> in_one_line("Group 'trainer' does not accept option 'max_epoch'", ["trainer.max_epochs"])
        "trainer has no option 'max_epoch'; the nearest is 'max_epochs'"
        >>> in_one_line("norm must be one of ('batch', 'group'); got 'grop'")
        "norm must be one of ('batch', 'group'); got 'grop'; the nearest is 'group'"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if not _NOISE.fullmatch(line))
    place = ".".join(_KEY.findall(text))
    kinds = _CLASS.findall(text)
    made = _FACTORY_CLASS.search(text)
    if made and _FACTORY.search(text):
        kinds.append(made[1])
    for around in (_KEY, _CLASS, _FACTORY, _FACTORY_CLASS):
        text = around.sub("", text)
    text = text.strip()
    if unknown := _UNKNOWN.match(text):
        return _of_unknown(place, unknown["group"], unknown["key"], kinds, list(options))
    if no_class := _NO_CLASS.search(text):
        return _of_class(place, no_class[1])
    if _NO_PAIR.match(text) and place:
        return _of_pair(place, lines[-1])
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return (f"{place}: " if place else "") + text + _nearest_in(text)


def _of_unknown(
    place: str, group: str | None, key: str, kinds: list[str], options: list[str]
) -> str:
    """Of an option that the innermost class, or without one the command, does not have."""
    parts = [part for part in key.split(".") if part not in ("init_args", "class_path")]
    parts = [*(group.split(".") if group else []), *parts]
    owner = kinds[-1].rpartition(".")[2] if kinds else None
    while True:
        known = _options_of(kinds[-1], parts[:-1]) if kinds else _below(options, parts[:-1])
        if known or len(parts) == 1:
            break
        # What is below an unknown option is unknown because of it.
        parts.pop()
    whose = ".".join(part for part in (place, *parts[:-1]) if part) or "the command"
    told = f"{whose} has no option {parts[-1]!r}{_nearest(parts[-1], known)}"
    if owner and 0 < len(known) <= _SHOWN:
        told += f"; {'there are' if parts[:-1] else f'{owner} has'} {', '.join(sorted(known))}"
    return told


def _options_of(path: str, parts: list[str]) -> set[str]:
    """The arguments of a class, or of the class of one of its arguments; none if there is no such argument."""
    kind: Any = _imported(path)
    for part in parts:
        kind = get_type_hints(kind.__init__).get(part)
        if not inspect.isclass(kind):
            return set()
    parameters = inspect.signature(kind).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _below(options: list[str], parts: list[str]) -> set[str]:
    split = (option.split(".") for option in options)
    return {o[len(parts)] for o in split if o[: len(parts)] == parts and len(o) > len(parts)}


def _of_class(place: str, name: str) -> str:
    base = _SHORT.get(place.rpartition(".")[2])
    known = sorted(kind.__name__ for kind in _kinds_of(base)) if base else []
    choice = f"one of {known} or a class" if known else "a class"
    return f"{place} must be {choice} by module and name; got {name!r}{_nearest(name, known)}"


def _of_pair(place: str, given: str) -> str:
    keys = re.findall(r"(?:^|, )'(\w+)': ", re.sub(r"\{.*\}", "{}", given.partition("{")[2][:-1]))
    wrong = [key for key in keys if key not in _PAIR]
    told = f"{place} must have class_path, and init_args with the arguments of that class"
    return told + (f"; got {wrong[0]!r}{_nearest(wrong[0], _PAIR)}" if wrong else "")


def _kinds_of(base: Any) -> Iterator[type]:
    """Ours, not those of a program that derives from them."""
    for kind in base.__subclasses__():
        if kind.__module__.startswith(f"{__package__}."):
            yield kind
        yield from _kinds_of(kind)


def _nearest_in(text: str) -> str:
    """The nearest of what a message says there is."""
    if missing := _NOT_IN_MODULE.search(text):
        module = import_module(missing[1])
        names = {name for name in dir(module) if not name.startswith("_")}
        names |= {part.name for part in iter_modules(getattr(module, "__path__", ()))}
        return _nearest(missing[2], names)
    if choice := _CHOICE.search(text):
        return _nearest(choice["got"], re.findall(r"'([^']*)'", choice["words"]))
    return ""


def _nearest(word: str, words: Iterable[str]) -> str:
    found = get_close_matches(word, list(words), 1)
    return f"; the nearest is {found[0]!r}" if found else ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
