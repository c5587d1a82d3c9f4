"""The commands ``fit``, ``validate``, ``test`` and ``predict``: a recipe, and what the command line changes of it."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

from ..errors import InputError
from .checkpointing import BEST, LAST, AtomicCheckpointIO, Checkpoints, read_checkpoint
from .classification import Classification
from .data import ClassificationData, Data, DetectionData, StereoData
from .detection import Detection
from .history import History, provenance
from .mistakes import in_one_line
from .predictions import Predictions
from .progress import Summary, progress
from .stereo import Stereo
from .task import Task

__all__ = ["Command", "run"]

# What a recipe may name without its module.
TASKS = (Classification, Detection, Stereo)
DATA = (ClassificationData, DetectionData, StereoData)

# 128 + the signal, as shells have it.
TERMINATED = 143
_CHECKPOINTS = "checkpoints"
_KEYWORDS = {"best": BEST, "last": LAST}
# What a disk may say in the middle of a run.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Options of the classes that a recipe names.
_IN_A_CLASS = re.compile(r"--(model|data)\.[\w.]+$")

# About Lightning's own code, of which a user can change nothing.
_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"\s*``instantiate_classes`` was deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"The number of training batches .* is smaller than the logging interval",
)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        command: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        arguments: behind it on the command line: ``--config recipes/x.yaml``, and what is to be other than there.

    Raises:
        InputError: arguments, files or checkpoints that cannot be used.
        SystemExit: with code 0, after help or the printed configuration; with 143, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
    """
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_news)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    try:
        with _told_in_one_line(MisconfigurationException), _told_of_disks(*_FULL):
            Command(command, arguments)
    except InputError as error:
        raise InputError(_said_first(error)) from error
    # Lightning ends as if all were done, or with a code of its own.
    except SIGTERMException:
        raise SystemExit(TERMINATED) from None
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise exit_.__context__ from None
        raise


class Command(LightningCLI):
    """One command: parses, builds and runs it.

    A checkpoint brings the state of a run and none of its options: those are the recipe's and the command line's.

    Args:
        command: see :func:`run`.
        arguments: see :func:`run`.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self._command = command
        super().__init__(
            Task,
            Data,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[command, *arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={
                "prog": "efficient-attention",
                "exit_on_error": False,
                # What is short for one option today may be for two tomorrow.
                "allow_abbrev": False,
                command: {"exit_on_error": False},
            },
        )

    # Not the other commands' parsers, which take their time to build; and not the options that have one right value.
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command, and which arguments of the trainer's method are not the user's."""
        ours = {"model", "datamodule", "weights_only", "return_predictions", "verbose"}
        return {self._command: ours | {"dataloaders", "train_dataloaders", "val_dataloaders"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed."""
        parser.add_argument("--seed", type=int, default=0, help="of all random numbers")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where things are written, and when."""
        parser.add_argument("--output", type=str, default="run", help="folder of the run")
        parser.add_argument(
            "--tensorboard", type=bool, default=False, help="write events for TensorBoard, too"
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.link_arguments("output", "checkpoint.folder", compute_fn=_checkpoints)
        parser.link_arguments("seed", "model.init_args.seed")
        parser.link_arguments("seed", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and tell of what cannot be parsed in one line."""
        known = [action.dest for action in self._parser(self._command)._actions]
        mistakes = argparse.ArgumentError, ValueError, TypeError, OSError
        with _told_in_one_line(*mistakes, options=known):
            self.config = parser.parse_args(_with_nulls(args))

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, and see that no other run is overwritten."""
        options = self.config[self._command]
        folder = Path(options.output)
        given, network = options.ckpt_path, options.model.init_args.network
        if options.data.init_args.val is None:
            # Lightning would warn of an empty loader.
            options.trainer.limit_val_batches = 0
        if given is not None:
            options.ckpt_path = self._checkpoint(str(given), folder)
        elif self._command != "fit" and not (network.weights or network.pretrained):
            raise InputError(
                "ckpt_path must be best, last or a file, as the recipe's network has no weights by itself; got none"
            )
        if options.ckpt_path is not None:
            # It has all weights: those that the run began with may not even be there any more.
            network.weights, network.weights_prefix, network.weights_into = None, "", ""
            network.ignore = []
        elif given is None and self._begins_a_run() and (folder / History.FILE).exists():
            raise InputError(
                f"output must be a new folder; {folder} holds a run. Add --ckpt_path last to go on with it"
            )

    def instantiate_classes(self) -> None:
        """Build, and tell of what cannot be built in one line."""
        with _told_in_one_line(MisconfigurationException, ValueError, TypeError, OSError):
            super().instantiate_classes()
        folder = Path(self.config_init[self._command].output)
        with _told_of_disks():
            folder.mkdir(parents=True, exist_ok=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with our history, checkpoints and progress, and what the user adds."""
        options = self.config_init[self._command]
        folder, given = Path(options.output), options.trainer
        callbacks = [progress()] if given.enable_progress_bar is not False else []
        if given.enable_model_summary is not False:
            callbacks.append(Summary(folder))
        if self._command == "fit":
            callbacks.append(Beginning(options.ckpt_path))
        if self._command == "predict":
            callbacks.append(Predictions(folder / "predictions"))
        self.trainer_defaults["callbacks"] = callbacks
        plugins = _as_list(given.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        kwargs = {"logger": self._loggers(folder), "plugins": plugins, **kwargs}
        # Ours says it shorter.
        kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(default_root_dir=str(folder), **kwargs)

    def after_validate(self) -> None:
        """Note the scores."""
        self._note_scores()

    def after_test(self) -> None:
        """Note the scores."""
        self._note_scores()

    def predict(self, **arguments: Any) -> None:
        """Predict; what is predicted is on the disk and not kept."""
        self.trainer.predict(return_predictions=False, **arguments)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's options do not count."""

    def _set_seed(self) -> None:
        seed_everything(self.config[self._command].seed, verbose=False)

    def _checkpoint(self, given: str, folder: Path) -> str | None:
        path = folder / _CHECKPOINTS / _KEYWORDS[given] if given in _KEYWORDS else Path(given)
        if given == "last" and self._command == "fit" and not path.exists():
            rank_zero_info(f"There is no {path}: a new run begins")
            return None
        with _told_in_one_line(ValueError, OSError):
            read_checkpoint(path)
        return str(path)

    def _begins_a_run(self) -> bool:
        options = self.config[self._command]
        return self._command == "fit" and not options.trainer.fast_dev_run and _is_first_process()

    def _loggers(self, folder: Path) -> list[Logger] | bool:
        options = self.config_init[self._command]
        given = options.trainer.logger
        if given is False or self._command != "fit":
            return False
        own: list[Logger] = [History(folder)]
        if options.tensorboard:
            own.append(
                TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
            )
        return own + ([] if given is True else _as_list(given))

    def _note_scores(self) -> None:
        options = self.config_init[self._command]
        History(Path(options.output), f"{self._command}.jsonl").add(
            {"from": options.ckpt_path, **self.model.scores, **provenance()}
        )


class Beginning(Callback):
    """Notes in the history that a run begins or goes on; what fails before, by its data for one, has begun nothing.

    Args:
        checkpoint: from which it goes on.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the line."""
        for logger in trainer.loggers:
            if isinstance(logger, History):
                place = {"step": trainer.global_step, "from": self.checkpoint}
                logger.add({"event": "start", **place, **provenance()})


class SaveConfig(SaveConfigCallback):
    """Writes the configuration of a run; of a run that is resumed with another one, beside the first."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing, as the run may not begin."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, as the run begins."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``, or ``config-2.yaml``..., unless the last of them says the same."""
        text = self.parser.dump(self.config)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        number, path = 1, folder / "config.yaml"
        while path.exists():
            if path.read_text() == text:
                return
            number += 1
            path = folder / f"config-{number}.yaml"
        path.write_text(text)


def _with_nulls(arguments: Sequence[str]) -> list[str]:
    """Arguments in which ``--a.b null`` is a piece of a recipe, in its place: ``--config '{"a": {"b": null}}'``.

    On the command line jsonargparse hands a null on to the options of a class as the text None.
    """
    found: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if argument == "null" and found and _IN_A_CLASS.match(found[-1]):
            option = found.pop()
        elif not (equals and value == "null" and _IN_A_CLASS.match(option)):
            found.append(argument)
            continue
        piece: Any = None
        for part in reversed(option.removeprefix("--").split(".")):
            piece = {part: piece}
        found += ["--config", json.dumps(piece)]
    return found


@contextmanager
def _told_in_one_line(*kinds: type[Exception], options: Sequence[str] = ()) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise InputError(in_one_line(str(error), options)) from error


def _said_first(error: InputError) -> str:
    """What an error says; of one in a process that loads samples, without the traceback that comes with it."""
    return str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2].strip()


@contextmanager
def _told_of_disks(*numbers: int) -> Iterator[None]:
    """Of errors with these numbers, or of all."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        told = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        raise InputError(f"output must be a folder with room; {told}") from error


def _checkpoints(output: str) -> str:
    return str(Path(output) / _CHECKPOINTS)


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _is_news(record: logging.LogRecord) -> bool:
    """Neither an advertisement nor what the machine does not have."""
    return not re.match(r".*Tip: For seamless cloud|[GT]PU available:", str(record.msg))
