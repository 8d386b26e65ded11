"""``fasp fit``, ``validate``, ``test`` and ``predict``: LightningCLI over the module and the data of this package."""

from __future__ import annotations

import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import fasp_lightning.training.callback  # its callback is then known by its bare name
import fasp_lightning.training.trainer.precision  # noqa: F401  # as this one's plugin is
from fasp_lightning.cli.checks import tokenizer_name
from fasp_lightning.cli.commands.rehearsing import check_prunings
from fasp_lightning.cli.errors import refusal_in, reworded
from fasp_lightning.cli.parsing import with_paths
from fasp_lightning.cli.quiet import quiet_libraries, quiet_lightning
from fasp_lightning.errors import FaspError, of_library, one_line
from fasp_lightning.text.reading.files import local_files
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.module import CausalLMModule

PARSER = {"exit_on_error": False, "allow_abbrev": False}
"""A misspelt option is refused, by an exception."""

NEEDED = {"fit": "train", "validate": "validation", "test": "test", "predict": "test"}
"""The role of the text without which a command can do nothing."""

CHECKPOINT_WORDS = ("best", "last", "hpc")
"""What Lightning takes for ``ckpt_path`` beside a path."""

INTERVALS = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
"""Settings of the trainer that it divides by."""


def run(command: str, argv: Sequence[str]) -> int:
    """Run a method of the trainer.

    Args:
        command: Its name.
        argv: The arguments after it. ``-c`` takes a YAML file or a shipped config's bare name, several times if
            wanted; what comes later wins.

    Returns:
        The exit code.

    Raises:
        FaspError: If arguments, files or settings of Lightning do not fit.
        SystemExit: After ``--help`` and ``--print_config``.
    """
    quiet_libraries()
    quiet_lightning()
    try:
        TrainingCLI(command, argv)
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise FaspError(one_line(error)) from error
    except (ValueError, RuntimeError) as error:  # what it has for other settings it cannot use
        if not _is_refusal_of_lightning(error):
            raise
        raise FaspError(one_line(error)) from error
    return 0


class TrainingCLI(LightningCLI):
    """The options of one command; constructing it runs the command.

    Optimizers are arguments of the module: those that LightningCLI adds to the parser itself are built from the
    parameters the model has before a checkpoint has given it its pruned shapes.

    Args:
        command: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        argv: The arguments after it.
        program: Name for the usage line; by default ``fasp`` and the command.
    """

    def __init__(self, command: str, argv: Sequence[str], program: str | None = None) -> None:
        self.command, self.program = command, program or f"fasp {command}"
        super().__init__(
            CausalLMModule,
            CausalLMDataModule,
            save_config_kwargs={"overwrite": True},  # a second run of a config is no mistake
            seed_everything_default=0,
            parser_kwargs={**PARSER, command: dict(PARSER)},
            args=[command, *with_paths(list(argv))],
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a parser for each takes a second
        """The one command."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the program in the parser's usage line."""
        self.options = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a mistake becomes one line.

        Raises:
            FaspError: If an argument or a file does not fit.
        """
        self.options.prog = self.program  # the parser of all commands has put its own name before it
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except Exception as error:  # of any class, as of its own parts
            if refusal_in(error) is None:
                raise
            raise FaspError(f"{reworded(error)}; see {self.program} --help") from error

    def before_instantiate_classes(self) -> None:
        """The tokenizer is the model's where no other is named; a checkpoint must be there.

        Raises:
            FaspError: If ``ckpt_path`` is no checkpoint, or an interval of the trainer is 0.
        """
        settings = self.config[self.command]
        settings.data.tokenizer = tokenizer_name(settings.data.tokenizer, settings.model.name_or_path)
        _check_checkpoint(settings.get("ckpt_path"))
        _check_intervals(settings.trainer)

    def instantiate_classes(self) -> None:
        """Construct module, data, callbacks and trainer.

        Raises:
            FaspError: If one of this package's classes refuses its arguments.
        """
        try:
            self._check_texts()
            if self.command == "fit":
                check_prunings(self.config.fit)
            super().instantiate_classes()
        except Exception as error:
            if (refusal := refusal_in(error)) is None:
                raise
            raise refusal from None

    def _check_texts(self) -> None:
        """Refuse data whose files are not there before weights are read: the parser makes the model first."""
        alone = ArgumentParser()
        alone.add_class_arguments(CausalLMDataModule, "data")
        data = alone.instantiate_classes(Namespace(data=self.config[self.command].data)).data
        for text in data.roles.texts[NEEDED[self.command]]:
            if text.kind == "local":
                local_files(text.source)


def _is_refusal_of_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised an error, and no code of this package that it called had a part in it."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return of_library(error) and last.f_globals.get("__name__", "").startswith("lightning.")


def _check_intervals(trainer: Any) -> None:
    """Refuse a 0 that the training loop would divide by."""
    for name in INTERVALS:
        if trainer.get(name) == 0:
            raise FaspError(f"trainer.{name} must be greater than 0, got {trainer.get(name)}")


def _check_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that is not there, or is none, before the model is loaded."""
    if path is None or path in CHECKPOINT_WORDS or ":" in str(path):  # a registry or a URL
        return
    file = Path(path).expanduser()
    if not file.exists():
        raise FaspError(f"ckpt_path must be a checkpoint, or one of {', '.join(CHECKPOINT_WORDS)}, got {path!r}")
    if file.is_file() and not zipfile.is_zipfile(file):  # a folder is one of several processes
        raise FaspError(f"ckpt_path must be a checkpoint that Lightning wrote whole, got the file {path!r}")
