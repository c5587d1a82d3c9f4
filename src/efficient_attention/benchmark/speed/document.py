"""A document with the tables and curves of the records that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import replacing
from .curves import draw_speed
from .orders import orders_table
from .tables import over_table, speed_tables

__all__ = ["fill", "show"]

# A place for a record, and what stands there.
_PLACE = re.compile(
    r"(<!-- record: (?P<file>\S+)(?: over (?P<base>\S+))? -->\n)(?:.*?\n)??(<!-- end -->)",
    re.DOTALL,
)


def fill(document: str | Path, *, report: Callable[[str], None] = lambda line: None) -> None:
    """Put into a document what its records say, between ``<!-- record: FILE -->`` and ``<!-- end -->``.

    Curves are drawn into a folder beside it that has its name. ``<!-- record: FILE over ENTRY -->`` stands for one
    short table instead, of how many times as long as that entry others take.

    Args:
        document: a Markdown file; paths in it are from the folder above its own.
        report: called with each record that was shown.

    Raises:
        InputError: a file that cannot be read, or a document that names none.

    Not part of the paper.
    """
    document = Path(document)

    def filled(place: re.Match) -> str:
        path = document.resolve().parent.parent / place["file"]
        record = json.loads(_read(path))
        text = show(record, place["base"])
        if record["name"] != "orders" and place["base"] is None:
            picture = document.with_suffix("") / f"{path.stem}.svg"
            draw_speed(record, picture)
            text = f"![Times of ours over positions]({document.stem}/{picture.name})\n\n{text}"
        report(place["file"])
        return f"{place[1]}{text}\n{place[4]}"

    text, count = _PLACE.subn(filled, _read(document))
    if not count:
        raise InputError(f"{document} must have a line <!-- record: FILE -->; got none")
    with replacing(document) as file:
        file.write(text.encode())


def show(record: Mapping[str, Any], base: str | None = None) -> str:
    """Where a record is from, and its tables; or the one of what others take over ``base``."""
    here = record["provenance"]
    machine = here["processor"] if record["device"] == "cpu" else record["device"]
    changed = ", with changes" if here["changed"] else ""
    threads = f"{here['threads']} thread{'s' if here['threads'] > 1 else ''}"
    origin = (
        f"*{machine}, {threads}, torch {here['torch']}, {here['time'][:10]}, "
        f"commit {(here['commit'] or 'unknown')[:12]}{changed}.*"
    )
    if record["name"] == "orders":
        tables = orders_table(record)
    else:
        tables = speed_tables(record) if base is None else over_table(record, base)
    return f"{origin}\n\n{tables}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read; got {error.strerror}") from error
