"""The command ``detect``: pictures to COCO results, and to pictures with what was found in them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import InputError
from ..files import replacing
from .class_names import ClassNames, find_class_names, number_of_labels
from .forward import DTYPES, check_memory, find_device
from .journal import Journal
from .networks import digest, load_network
from .object_picture import draw_objects
from .objects import FoundObjects, coco_results, predict_objects
from .pictures import picture_size, read_picture
from .sources import find_pictures
from .work import Item, Made, output_folder, work_through

__all__ = ["run"]

_QUALITY = 92  # of JPEG


def run(options: argparse.Namespace, report: Callable[[str], None]) -> list[str]:
    """Detect in pictures.

    Args:
        options: as the command line has them.
        report: is given each line of results.

    Returns:
        Why pictures failed, one by one.

    Raises:
        InputError: what can be known to be wrong before the first picture is looked at; or the only picture.
        ImportError: an extra is not installed.
    """
    pictures = find_pictures(options.images)
    sizes = {picture_size(path) for path in pictures.values()}
    folder = output_folder(options.output, pictures.values())
    network = load_network(
        "detect",
        options.network,
        model=options.model,
        weights=options.weights,
        prefix=options.prefix,
        options=options.options,
    ).to(find_device(options.device))
    classes = find_class_names(
        options.classes, options.network, number_of_labels(network), background=True
    )
    dtype = DTYPES[options.dtype]
    _check_memory(network, sizes, dtype)

    def make(item: Item) -> Made:
        picture = read_picture(item.sources[0])
        try:
            found = predict_objects(network, picture, dtype=dtype)
        except ValueError as error:
            raise InputError(f"'{item.sources[0]}': {error}") from error
        path = folder / f"{item.name}_objects.jpg"
        with replacing(path) as file:
            drawn = draw_objects(picture, found, classes.names, score=options.score)
            drawn.save(file, format="JPEG", quality=_QUALITY, subsampling=0)
        records = coco_results(found, 0, str(item.sources[0]), classes.ids, classes.names)
        return Made([path], {"said": _in_words(found, classes, options.score), "objects": records})

    settings = {
        "version": __version__,
        "network": digest(network),
        "dtype": options.dtype,
        "score": options.score,
        "names": classes.names,
        "ids": classes.ids,
    }
    outcome = work_through(
        [Item(name, (path,)) for name, path in pictures.items()],
        make,
        Journal(folder / "detect.jsonl", settings),
        title="detect",
        overwrite=options.overwrite,
        report=lambda name, result: report(f"{pictures[name]}  {result['said']}"),
    )
    ids = image_ids(list(pictures.values()), classes.images)
    _write_results(folder / "results.json", outcome.results, pictures, ids)
    report(outcome.summary("pictures", folder))
    return list(outcome.failures.values())


def image_ids(paths: Sequence[Path], listed: Mapping[str, int]) -> dict[Path, int]:
    """The id of each picture: that of a json that lists it by the end of its path, or else a number behind those.

    Args:
        paths: of the pictures.
        listed: ids by file name, of a COCO json.

    Example:
        >>> list(image_ids([Path("a/7.png"), Path("a/8.png")], {"7.png": 3}).values())
        [3, 4]
    """
    ids = {}
    free = max(listed.values(), default=0)
    for path in paths:
        ends = ("/".join(path.parts[-length:]) for length in range(1, len(path.parts) + 1))
        known = next((listed[end] for end in ends if end in listed), None)
        if known is None:
            known = free = free + 1
        ids[path] = known
    return ids


def _check_memory(network: Any, sizes: set[tuple[int, int]], dtype: torch.dtype) -> None:
    # The network scales pictures to a size of its own; long ones stay the largest.
    for height, width in {max(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=max)}:
        check_memory(
            network,
            ([torch.empty(3, height, width, device="meta")],),
            dtype=dtype,
            device=next(network.parameters()).device,
            what=f"a picture of {width} x {height} pixels",
            way_out=lambda _: (
                "--dtype bfloat16"
                if dtype == torch.float32
                else "a network with a smaller min_size"
            ),
        )


def _in_words(found: FoundObjects, classes: ClassNames, score: float) -> str:
    """How many objects of each class reach the score that is drawn."""
    labels = found.labels[found.scores >= score].tolist()
    names = Counter(classes.names.get(label, f"class {label}") for label in labels)
    counts = ", ".join(f"{count} {name}" for name, count in names.most_common())
    return f"{len(labels)} objects of score {score:g} or more" + (f": {counts}" if counts else "")


def _write_results(
    path: Path, results: Mapping[str, Any], pictures: Mapping[str, Path], ids: Mapping[Path, int]
) -> None:
    records = [
        {**record, "image_id": ids[pictures[name]]}
        for name in pictures
        if name in results
        for record in results[name]["objects"]
    ]
    with replacing(path) as file:
        file.write(json.dumps(records).encode())
