"""What the numbers that a network gives mean: names of classes, and the ids of a COCO json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

__all__ = ["ClassNames", "read_class_names"]

# What torchvision's lists of names call the label 0 of a detector.
_BACKGROUND = "__background__"


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


def read_class_names(path: str | Path | None, labels: int, *, background: bool) -> ClassNames:
    r"""Read the names of classes from a json as COCO has it, or from a text with a name a line.

    The categories of a json have labels without gaps in the order of their ids, as in training here; but where a
    detector has a label for every id up to the highest, as torchvision's of 91 labels for the 80 categories of COCO,
    the labels are the ids. The lines of a text count from the first label on; a detector's may begin with
    ``__background__``.

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
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        images = {str(i["file_name"]): int(i["id"]) for i in content.get("images", ())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "--classes must be a json with categories that have an id and a name, as COCO has it; "
            f"got '{path}': {type(error).__name__}: {error}"
        ) from error
    ids = [id_ for id_, _ in categories]
    if len(set(ids)) != len(ids):
        raise InputError(f"--classes must have categories of different ids; got '{path}'")
    if len(ids) == labels - first:
        of_label = dict(enumerate(ids, first))
    elif first and ids and min(ids) > 0 and max(ids) == labels - 1:
        of_label = {id_: id_ for id_ in ids}
    else:
        raise _wrong_count(path, f"{len(ids)} categories", labels - first)
    names = dict(categories)
    return ClassNames({label: names[id_] for label, id_ in of_label.items()}, of_label, images)


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
