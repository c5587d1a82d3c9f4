"""What has been done, on disk, so that a run that ended early goes on: a line for every picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Journal", "file_mark"]


def file_mark(path: Path) -> list[Any]:
    """What tells a file from what it was: its path, its size in bytes and the time when it was changed."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]


class Journal:
    """The list of what was made in a folder, of what, and how: a file of JSON lines that is only ever added to.

    Something is done if it was made of the same files, unchanged by size and time, by the same network under the same
    settings, and if all files that it left are still there, of the same size. A line is added when they are: what a
    kill left half done is done again. A line that is cut short does not count, and of several for one name the last.

    Args:
        path: of the file.
        settings: all that the results depend on, beside the files.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        # As it comes back from the file.
        self._settings = json.loads(json.dumps(settings))
        self._records: dict[str, dict[str, Any]] = {}
        self._torn = False
        if path.exists():
            self._read()

    def result(self, name: str, sources: Sequence[Path]) -> Any | None:
        """What was noted for a name, if that is done; else None."""
        record = self._records.get(name)
        if record is None or record.get("settings") != self._settings:
            return None
        if record.get("sources") != [file_mark(path) for path in sources]:
            return None
        for output, size in record["outputs"].items():
            path = self._path.parent / output
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record["result"]

    def add(
        self, name: str, sources: Sequence[list[Any]], outputs: Sequence[Path], result: Any
    ) -> None:
        """Note that something is done.

        Args:
            name: of it.
            sources: the marks of the files that it was made of, from before they were read.
            outputs: the files that were made, in the journal's folder.
            result: what JSON can hold, and is not None.
        """
        record = {
            "name": name,
            "settings": self._settings,
            "sources": list(sources),
            "outputs": {path.name: path.stat().st_size for path in outputs},
            "result": result,
        }
        with self._path.open("a", encoding="utf-8") as file:
            # Behind a line that was cut short.
            file.write("\n" * self._torn + json.dumps(record) + "\n")
        self._torn = False
        self._records[name] = record

    def _read(self) -> None:
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            self._torn = not line.endswith("\n")
            try:
                record = json.loads(line)
                self._records[record["name"]] = record
            except (ValueError, KeyError, TypeError):
                continue
