"""The command line, ``efficient-attention COMMAND``.

Each command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from .errors import InputError

__all__ = ["main"]

PROGRAM = "efficient-attention"
PARTLY_DONE = 1
USAGE_ERROR = 2
# 128 + the signal, as shells have it.
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line, without the program; default: those of this process.

    Returns:
        The exit code: 0; 1 if some of many pictures could not be used, which are named at the end; 2 if what
        the user gave cannot be used, which one line on standard error tells; 130 after Ctrl-C.

    Raises:
        SystemExit: with the exit code, after help or if the command line itself is wrong.

    Example:
        >>> main(["demo", "no-such-photo.jpg"])
        2
    """
    options = _parse(arguments)
    try:
        return options.run(options) or 0
    except (InputError, ImportError) as error:
        print(f"{PROGRAM} {options.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # Who read our output has gone, as `head` does. Python would fail again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    def report(line: str) -> None:
        print(line, flush=True)

    if options.image is None:
        demo.show_depth(output=options.output, report=report)
        report("")
    demo.run(
        options.image,
        output=options.output,
        pixel=options.pixel and tuple(options.pixel),
        steps=options.steps,
        seed=options.seed,
        report=report,
    )


def _plan(options: argparse.Namespace) -> None:
    from .model_sources import find_model, make_inputs
    from .planning import plan

    model = find_model(options.model)
    try:
        planned = plan(
            model.eval(),
            make_inputs(model, options.input),
            places=options.places,
            budget=options.budget,
            key_channels=options.key_channels,
            value_channels=options.value_channels,
            num_heads=options.num_heads,
        )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    print(json.dumps(planned.as_dict(), indent=2) if options.json else planned)


def _advise(options: argparse.Namespace) -> None:
    from .benchmark.speed.arguments import run_advice

    run_advice(options, report=lambda line: print(line, flush=True))


def _train(options: argparse.Namespace) -> None:
    try:
        from .training import command
    except ModuleNotFoundError as error:
        message = f"training needs {error.name}: pip install 'efficient-attention[train]'"
        raise ImportError(message) from error
    command.run(options.command, options.arguments)


def _predict(options: argparse.Namespace) -> int:
    try:
        command = import_module(f".prediction.{options.command}_command", __package__)
        failures = command.run(options, report=lambda line: print(line, flush=True))
    except ModuleNotFoundError as error:
        message = (
            f"{options.command} needs {error.name}: pip install 'efficient-attention[models,plot]'"
        )
        raise ImportError(message) from error
    for failure in failures:
        print(f"{PROGRAM} {options.command}: error: {failure}", file=sys.stderr)
    return PARTLY_DONE if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    # The recipes' own parser knows what may follow, and is built when it is needed.
    if hasattr(options, "arguments"):
        options.arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _build_parser() -> _Parser:
    from . import __version__

    parser = _Parser(
        prog=PROGRAM,
        description="Global attention at linear cost. Shen et al., WACV 2021, arXiv 1812.01243.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_prediction, _add_plan, _add_advise, _add_training, _add_bench):
        add(commands)
    return parser


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "plan",
        _plan,
        "tell where attention could go in a network, what it costs and what fits a memory",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a network of this package, timm:NAME, torchvision:NAME or package.module:function",
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE",
        help="of an input, such as 1x3x800x1333 or 1x77:int64; once for each",
    )
    parser.add_argument("--budget", metavar="SIZE", help='memory that is there, such as "8 GiB"')
    parser.add_argument(
        "--places", nargs="+", metavar="NAME", help="modules, by name or pattern (default: stages)"
    )
    parser.add_argument(
        "--key-channels", type=_integer(1), metavar="N", help="default: half of a place's channels"
    )
    parser.add_argument(
        "--value-channels", type=_integer(1), metavar="N", help="default: a place's channels"
    )
    parser.add_argument(
        "--num-heads", type=_integer(1), default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="numbers for programs, in bytes")


def _add_advise(commands: argparse._SubParsersAction) -> None:
    from .benchmark.speed.arguments import ADVICE, add_advice

    add_advice(_add_command(commands, "advise", _advise, ADVICE), _integer)


def _add_prediction(commands: argparse._SubParsersAction) -> None:
    from .prediction.arguments import COMMANDS

    for name, (summary, add_arguments) in COMMANDS.items():
        add_arguments(_add_command(commands, name, _predict, summary))


def _add_training(commands: argparse._SubParsersAction) -> None:
    for name, summary in (
        ("fit", "train a network as a recipe says"),
        ("validate", "evaluate a network on the validation data of a recipe"),
        ("test", "evaluate a network on the test data of a recipe"),
        ("predict", "write what a network predicts for the data of a recipe"),
    ):
        parser = _add_command(commands, name, _train, summary, add_help=False)
        parser.set_defaults(arguments=())


def _add_bench(commands: argparse._SubParsersAction) -> None:
    from .benchmark.command import add_subjects

    bench = commands.add_parser(
        "bench", help="measure, and record it", description="Measure, and record it."
    )
    add_subjects(bench, integer=_integer, report=lambda line: print(line, flush=True))


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        "see depth in a real pair of pictures; let every pixel of a photo attend to every pixel",
    )
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a photo, for the second part alone; default: both, with pictures from scikit-image",
    )
    parser.add_argument(
        "--output",
        default="out",
        metavar="DIR",
        help="folder for depth.png and demo.png (default: %(default)s)",
    )
    parser.add_argument(
        "--pixel",
        nargs=2,
        type=_integer(0),
        metavar=("X", "Y"),
        help="draw what this pixel attends to, counted from the top left (default: the middle)",
    )
    parser.add_argument(
        "--steps",
        type=_integer(1),
        default=400,
        metavar="N",
        help="steps of the fit (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the fit (default: %(default)s)",
    )


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    *,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary.capitalize() + ".", add_help=add_help
    )
    parser.set_defaults(run=run, command=name)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _integer(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An argument's type: a number in a range, or an error that says what was expected."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            number = int(text)
            if smallest <= number and (largest is None or number <= largest):
                return number
        upwards = "" if largest is None else f" to {largest}"
        raise argparse.ArgumentTypeError(
            f"must be an integer from {smallest}{upwards}; got {text!r}"
        )

    return parse


if __name__ == "__main__":
    sys.exit(main())
