"""The command ``classify``: pictures to classes with their probabilities."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from ..files import replacing
from .class_names import find_class_names, number_of_labels
from .classes import predict_classes
from .forward import DTYPES, check_memory, find_device, pictures_like
from .journal import Journal
from .networks import digest, load_network
from .pictures import picture_size, read_picture
from .sources import find_pictures
from .work import Item, Made, output_folder, work_through

__all__ = ["run"]


def run(options: argparse.Namespace, report: Callable[[str], None]) -> list[str]:
    """Classify pictures.

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
    for path in pictures.values():
        picture_size(path)
    folder = output_folder(options.output, pictures.values())
    network = load_network(
        "classify",
        options.network,
        model=options.model,
        weights=options.weights,
        prefix=options.prefix,
        options=options.options,
    ).to(find_device(options.device))
    classes = find_class_names(
        options.classes, options.network, number_of_labels(network), background=False
    )
    dtype, top = DTYPES[options.dtype], min(options.top, number_of_labels(network))
    check_memory(
        network,
        pictures_like((options.size, options.size)),
        dtype=dtype,
        device=next(network.parameters()).device,
        what=f"a square of {options.size} pixels",
        way_out=lambda share: f"--size {max(16, int(options.size * share**0.5))}",
    )

    def make(item: Item) -> Made:
        picture = read_picture(item.sources[0])
        try:
            probabilities = predict_classes(network, picture, size=options.size, dtype=dtype)
        except ValueError as error:
            raise InputError(f"'{item.sources[0]}': {error}") from error
        best = probabilities.topk(top)
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Made([], [_record(label, classes.names, share) for label, share in found])

    settings = {
        "version": __version__,
        "network": digest(network),
        "dtype": options.dtype,
        "size": options.size,
        "top": top,
        "names": classes.names,
    }
    outcome = work_through(
        [Item(name, (path,)) for name, path in pictures.items()],
        make,
        Journal(folder / "classify.jsonl", settings),
        title="classify",
        overwrite=options.overwrite,
        report=lambda name, result: report(f"{pictures[name]}  {_in_words(result[0])}"),
    )
    done = {
        str(pictures[name]): outcome.results[name] for name in pictures if name in outcome.results
    }
    _write_results(folder, done)
    report(outcome.summary("pictures", folder))
    return list(outcome.failures.values())


def _record(label: int, names: Mapping[int, str], probability: float) -> dict[str, Any]:
    name = {"class": names[label]} if label in names else {}
    return {"label": label, **name, "probability": probability}


def _in_words(best: Mapping[str, Any]) -> str:
    name = best.get("class", f"class {best['label']}")
    return f"{name}  {100 * best['probability']:.1f} %"


def _write_results(folder: Path, done: Mapping[str, list[dict[str, Any]]]) -> None:
    """All pictures in a json, and in a table with a line for each of their classes."""
    listed = [{"file": path, "classes": found} for path, found in done.items()]
    with replacing(folder / "classes.json") as file:
        file.write(json.dumps(listed, indent=1, ensure_ascii=False).encode())
    table = io.StringIO(newline="")
    rows = csv.DictWriter(table, ["file", "rank", "label", "class", "probability"], restval="")
    rows.writeheader()
    for path, found in done.items():
        rows.writerows({"file": path, "rank": rank, **one} for rank, one in enumerate(found, 1))
    with replacing(folder / "classes.csv") as file:
        file.write(table.getvalue().encode())
