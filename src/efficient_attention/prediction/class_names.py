"""What the numbers that a network gives mean: names of classes, and the ids of the data that it learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

__all__ = ["ClassNames", "find_class_names", "number_of_labels", "read_class_names"]

# What torchvision's lists of names call the label 0 of a detector.
_BACKGROUND = "__background__"
# What a run leaves beside its network.
_BESIDE = "classes.json"


class ClassNames(NamedTuple):
    """Names by label.

    Attributes:
        names: of labels.
        ids: the category's id in the json by label; empty without a json.
        images: the id of each picture that the json lists, by its file's name.
    """

    names: dict[int, str]
    ids: dict[int, int]
    images: dict[str, int]


def find_class_names(
    given: str | Path | None, network: str | Path | None, labels: int, *, background: bool
) -> ClassNames:
    """The names in a file that is given, or else those that a run left beside its network, if any.

    Args:
        given: see :func:`read_class_names`.
        network: the folder of the network; None, or a repository: there is nothing beside it.
        labels: see :func:`read_class_names`.
        background: see there.

    Raises:
        InputError: as :func:`read_class_names`.

    Example:
        >>> entries = [{"label": 1, "id": 18, "name": "dog"}]
        >>> _ = Path(folder, "classes.json").write_text(json.dumps(entries))
        >>> find_class_names(None, folder, 2, background=True).ids
        {1: 18}
    """
    if given is None and network is not None and Path(network, _BESIDE).is_file():
        given = Path(network, _BESIDE)
    return read_class_names(given, labels, background=background)


def read_class_names(path: str | Path | None, labels: int, *, background: bool) -> ClassNames:
    r"""Read the names of classes from a json as COCO has it or as a run writes it, or from a text with a name a line.

    The categories of a json have labels without gaps in the order of their ids, as in training here; but where a
    detector has a label for every id up to the highest, as torchvision's of 91 labels for the 80 categories of COCO,
    the labels are the ids. A run's json has label, id and name of each. The lines of a text count from the first label
    on; a detector's may begin with ``__background__``.

    Args:
        path: the file; None: no names.
        labels: that the network has, a detector's background included.
        background: whether label 0 is the background.

    Raises:
        InputError: there is no such file, it is neither, or has another number of names than the network has classes.

    Example:
        >>> _ = Path(folder, "names.txt").write_text("cat\ndog\n")
        >>> read_class_names(Path(folder, "names.txt"), 3, background=True).names
        {1: 'cat', 2: 'dog'}
    """
    if path is None:
        return ClassNames({}, {}, {})
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--classes must be a json or a file of text; got '{path}': {error}"
        ) from error
    first = int(background)
    if Path(path).suffix.lower() == ".json":
        return _of_json(text, path, labels, first)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if background and names[:1] == [_BACKGROUND]:
        names = names[1:]
    if len(names) != labels - first:
        raise _wrong_count(path, f"{len(names)} names", labels - first)
    return ClassNames(dict(enumerate(names, first)), {}, {})


def _of_json(text: str, path: str | Path, labels: int, first: int) -> ClassNames:
    try:
        content = json.loads(text)
        if isinstance(content, list) and content:
            ids = {int(entry["label"]): int(entry["id"]) for entry in content}
            names = {int(entry["label"]): str(entry["name"]) for entry in content}
            images = {}
        else:
            categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            distinct = len(categories) == len(content["categories"])
            images = {str(i["file_name"]): int(i["id"]) for i in content.get("images", ())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "--classes must be a json with categories that have an id and a name, as COCO has it, or a run's; "
            f"got '{path}': {type(error).__name__}: {error}"
        ) from error
    if isinstance(content, list):
        if not set(ids) <= set(range(first, labels)):
            raise _wrong_count(path, f"labels from {min(ids)} to {max(ids)}", labels - first)
        return ClassNames(names, ids, images)
    if not distinct:
        raise InputError(f"--classes must have categories of different ids; got '{path}'")
    ids = _ids_of_labels(sorted(categories), path, labels, first)
    return ClassNames({label: categories[id_] for label, id_ in ids.items()}, ids, images)


def _ids_of_labels(ids: list[int], path: str | Path, labels: int, first: int) -> dict[int, int]:
    if len(ids) == labels - first:
        return dict(enumerate(ids, first))
    if first and ids and ids[0] > 0 and ids[-1] == labels - 1:
        return {id_: id_ for id_ in ids}
    raise _wrong_count(path, f"{len(ids)} categories", labels - first)


def _wrong_count(path: str | Path, got: str, classes: int) -> Exception:
    return InputError(f"--classes must name the network's {classes} classes; '{path}' has {got}")


def number_of_labels(network: Any) -> int:
    """How many labels a detector or a classifier has, the background included."""
    head = getattr(network, "fc", None)
    return (
        network.roi_heads.box_predictor.cls_score.out_features
        if head is None
        else head.out_features
    )
