"""Files as people name them on a command line: by themselves, by their folder, by a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import InputError

__all__ = ["PICTURES", "TRUTHS", "find_files", "find_pictures", "short_names"]

# What a folder is searched for.
PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TRUTHS = (".npy", ".pfm", ".png")


def find_files(argument: str | Path, endings: Collection[str] = PICTURES) -> list[Path]:
    """The files that an argument names, sorted by name.

    Args:
        argument: a file; a folder, for the files in it that are not hidden and end so; or a pattern with ``*``, ``?``,
            ``[...]``, and ``**`` for folders at any depth.
        endings: of files in a folder, in small letters.

    Returns:
        At least one path.

    Raises:
        InputError: there is nothing of that name.

    Example:
        >>> for name in ("b.png", "a.JPG", "notes.txt"):
        ...     Path(folder, name).touch()
        >>> [path.name for path in find_files(folder)]
        ['a.JPG', 'b.png']
        >>> [path.name for path in find_files(f"{folder}/*.png")]
        ['b.png']
    """
    path = Path(argument)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in endings and p.is_file()]
        found = [p for p in found if not p.name.startswith(".")]
        if not found:
            raise InputError(f"'{path}' must hold files that end in {', '.join(endings)}; got none")
        return sorted(found)
    if path.exists():
        return [path]
    if not glob.has_magic(str(argument)):
        raise InputError(f"files must be there; got '{argument}': no such file or folder")
    # Path.glob would find hidden files, and takes no absolute pattern.
    matches = glob.glob(str(argument), recursive=True)  # noqa: PTH207
    found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise InputError(f"a pattern must match files; got '{argument}', which matches none")
    return sorted(found)


def find_pictures(arguments: Sequence[str]) -> dict[str, Path]:
    """The pictures that several arguments name, each once, by short names of their own.

    Raises:
        InputError: there is nothing of a name.
    """
    found = {path.resolve(): path for argument in arguments for path in find_files(argument)}
    paths = list(found.values())
    return dict(zip(short_names(paths), paths, strict=True))


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name of its own for each of several files, to name what is made of them.

    It is the file's name without its ending; where folders differ, behind theirs, up to the one that all are in; where
    two files differ in the ending alone, with it.

    Raises:
        InputError: a file is named twice.

    Example:
        >>> short_names([Path("a/1.png"), Path("a/2.png")]), short_names([Path("a/im0.png"), Path("b/im0.png")])
        (['1', '2'], ['a_im0', 'b_im0'])
    """
    places = [path.absolute() for path in paths]
    common = Path(os.path.commonpath([place.parent for place in places]))
    for whole in (False, True):
        inside = [place.relative_to(common) for place in places]
        parts = [(p if whole else p.with_suffix("")).parts for p in inside]
        names = ["_".join(part) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
    raise InputError(f"files must each have a name of their own; got '{twice}' twice")
