"""Many pictures, one after another: what is done is skipped, what cannot be read is named, the rest is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..progress import Progress
from .journal import Journal, file_mark

__all__ = ["Item", "Made", "Outcome", "output_folder", "work_through"]


class Item(NamedTuple):
    """Something to predict.

    Attributes:
        name: its own among all.
        sources: the files that it is made of.
    """

    name: str
    sources: tuple[Path, ...]


class Made(NamedTuple):
    """What was made of an item: its files, and what JSON can hold of it."""

    outputs: Sequence[Path]
    result: Any


class Outcome(NamedTuple):
    """What became of items.

    Attributes:
        results: by name, of those that are done, now or before.
        failures: by name, why it was not done.
        skipped: how many had been done before.
    """

    results: dict[str, Any]
    failures: dict[str, str]
    skipped: int

    def summary(self, what: str, folder: Path) -> str:
        """One line on all of them."""
        done = len(self.results)
        before = f", {self.skipped} of them done before" if self.skipped else ""
        return f"{done} of {done + len(self.failures)} {what} are in {folder}{before}"


def work_through(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    journal: Journal,
    *,
    title: str,
    overwrite: bool,
    report: Callable[[str, Any], None],
) -> Outcome:
    """Make all items that are not done, in order.

    Args:
        items: what to do.
        make: does one; an :class:`InputError` of it is about this one alone.
        journal: knows what is done.
        title: stands in the line of progress.
        overwrite: whether to do what is done anew.
        report: is called with the name and the result of each that is made now.

    Raises:
        InputError: there is a single item, and it failed; or results cannot be written.
    """
    results, failures, skipped = {}, {}, 0
    progress = Progress(title, len(items))
    for number, item in enumerate(items):
        progress.show(number, item.name)
        before = None if overwrite else journal.result(item.name, item.sources)
        if before is not None:
            results[item.name] = before
            skipped += 1
            continue
        try:
            marks = [file_mark(path) for path in item.sources]
            made = make(item)
        except (InputError, FileNotFoundError) as error:
            if len(items) == 1:
                progress.show(1)
                raise InputError(str(error)) from error
            failures[item.name] = str(error)
            continue
        except OSError as error:
            raise InputError(f"results must have a place to be written to; {error}") from error
        journal.add(item.name, marks, made.outputs, made.result)
        results[item.name] = made.result
        # What was on the terminal's line makes room for the report.
        progress.show(len(items))
        report(item.name, made.result)
    progress.show(len(items))
    return Outcome(results, failures, skipped)


def output_folder(path: str | Path, sources: Iterable[Path]) -> Path:
    """The folder to write to, made if need be.

    Raises:
        InputError: it cannot be one, or is one that pictures are read from, which would count the next time.
    """
    folder = Path(path)
    parents: Collection[Path] = {source.resolve().parent for source in sources}
    if folder.resolve() in parents:
        raise InputError(
            f"--output must be another folder than that of the pictures; got '{folder}' for both"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output must be a folder that can be written; got '{folder}': {error}"
        ) from error
    return folder
