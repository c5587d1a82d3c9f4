"""What the commands for people take on the command line; light, as help is shown without anything else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["COMMANDS"]


def _add_stereo(parser: argparse.ArgumentParser) -> None:
    for name in ("left", "right"):
        parser.add_argument(
            name,
            metavar=name.upper(),
            help=f"{name} view: a picture, a folder or a quoted pattern; views are paired in the order of their names",
        )
    _add_common(parser)
    parser.add_argument(
        "--scale",
        type=_number(0.01, 1.0),
        default=1.0,
        metavar="X",
        help="of the views that the network sees: 0.5 takes a quarter of the memory and reaches twice the disparity",
    )
    parser.add_argument(
        "--truth", metavar="FILE", help="true disparity (.pfm, .png, .npy), likewise: tells errors"
    )
    parser.add_argument(
        "--truth-scale",
        type=_number(1e-6, 1e6),
        metavar="X",
        help="what its numbers are for a pixel (default: 256 in a PNG of 16 bits, else 1)",
    )
    geometry = parser.add_argument_group("geometry, for depth and points in space")
    geometry.add_argument(
        "--calibration", metavar="FILE", help="calib.txt of Middlebury, or calibration of KITTI"
    )
    for name, metavar, least, meaning in (
        ("focal", "PX", 1e-6, "focal length"),
        ("baseline", "M", 1e-6, "distance of the cameras in metres"),
        ("doffs", "PX", -1e6, "right principal point's column less the left one's (default: 0)"),
        ("cx", "PX", -1e6, "left principal point's column (default: the middle)"),
        ("cy", "PX", -1e6, "left principal point's row (default: the middle)"),
    ):
        geometry.add_argument(f"--{name}", type=_number(least, 1e6), metavar=metavar, help=meaning)


def _add_detect(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    _add_common(parser)
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes: a json as COCO has it, or a text with one a line",
    )
    parser.add_argument(
        "--score",
        type=_number(0.0, 1.0),
        default=0.5,
        metavar="X",
        help="of objects that are drawn, at least; the json has all (default: %(default)s)",
    )


def _add_classify(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    _add_common(parser)
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the classes: a text with one a line, or a json"
    )
    parser.add_argument(
        "--top",
        type=_whole(1, 1_000_000),
        default=5,
        metavar="N",
        help="classes that are told of each picture (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=_whole(16, 4096),
        default=224,
        metavar="PX",
        help="of the square that the network sees (default: %(default)s)",
    )


#: What each command is for, and what adds its arguments.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "stereo": ("predict disparity, depth and points in space from pairs of pictures", _add_stereo),
    "detect": ("find objects in pictures: boxes, masks, classes", _add_detect),
    "classify": ("tell what pictures show", _add_classify),
}


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a picture, a folder or a quoted pattern"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="out",
        metavar="DIR",
        help="folder of results (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="do anew what was done before; else it is skipped"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--network",
        metavar="FOLDER",
        help="of a run or save_pretrained, or NAMESPACE/NAME on the Hub",
    )
    network.add_argument("--model", metavar="NAME", help="instead: a network of this package, with")
    network.add_argument(
        "--weights", metavar="FILE", help="its weights: .pth, .tar, .ckpt, .safetensors"
    )
    network.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help='of their keys that count: "network." of a run\'s .ckpt',
    )
    network.add_argument(
        "--options",
        type=_mapping,
        metavar="JSON",
        help="""of the network, such as '{"num_classes": 4, "norm": "frozen"}'""",
    )
    network.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU, if any)"
    )
    network.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: faster and half the memory, less precise",
    )


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with suppress(ValueError):
            number = float(text)
            if low <= number <= high:
                return number
        raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}; got {text!r}")

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with suppress(ValueError):
            number = int(text)
            if low <= number <= high:
                return number
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {low} to {high}; got {text!r}"
        )

    return parse


def _mapping(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise argparse.ArgumentTypeError(
        f"""must be options in JSON, such as '{{"num_classes": 4}}'; got {text!r}"""
    )
