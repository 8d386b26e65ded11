"""``fasp fit``, ``validate``, ``test`` and ``predict``: LightningCLI over the module and the data of this package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import fasp_lightning.training.callback  # noqa: F401  # its callback is then known by its bare name
from fasp_lightning.cli.checks import tokenizer_name
from fasp_lightning.cli.errors import is_user_error, reworded
from fasp_lightning.cli.parsing import with_paths
from fasp_lightning.cli.quiet import quiet_libraries, quiet_lightning
from fasp_lightning.errors import FaspError, one_line
from fasp_lightning.training.data import CausalLMDataModule
from fasp_lightning.training.module import CausalLMModule

PARSER = {"exit_on_error": False, "allow_abbrev": False}
"""A misspelt option is refused, by an exception."""

CHECKPOINT_WORDS = ("best", "last", "hpc")
"""What Lightning takes for ``ckpt_path`` beside a path."""


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
        except (argparse.ArgumentError, TypeError, KeyError) as error:
            raise FaspError(f"{reworded(error)}; see {self.program} --help") from error

    def before_instantiate_classes(self) -> None:
        """The tokenizer is the model's where no other is named, and a checkpoint must be there.

        Raises:
            FaspError: If ``ckpt_path`` is no file.
        """
        settings = self.config[self.command]
        settings.data.tokenizer = tokenizer_name(settings.data.tokenizer, settings.model.name_or_path)
        _check_checkpoint(settings.get("ckpt_path"))

    def instantiate_classes(self) -> None:
        """Construct module, data, callbacks and trainer.

        Raises:
            FaspError: If one of this package's classes refuses its arguments, or the tokenizer has more tokens than
                the model.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (refusal := _refusal(error)) is None:
                raise
            raise refusal from None
        embeddings = self.model.model.get_input_embeddings().num_embeddings
        if self.datamodule.vocab_size > embeddings:  # a token without an embedding would be an error of some batch
            self.datamodule.check_vocabulary(embeddings)


def _refusal(error: BaseException | None) -> BaseException | None:
    """The user's mistake in a chain of errors: jsonargparse wraps what a callback's constructor raises."""
    while error is not None and not is_user_error(error):
        error = error.__cause__ or error.__context__
    return error


def _check_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that is not there before the model is loaded."""
    if path is None or path in CHECKPOINT_WORDS or ":" in str(path):  # a registry or a URL
        return
    if not Path(path).expanduser().exists():
        raise FaspError(f"ckpt_path must be a checkpoint, or one of {', '.join(CHECKPOINT_WORDS)}, got {path!r}")
