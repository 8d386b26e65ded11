"""Arguments and YAML files → the dataclass of a command."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser

from fasp_lightning.cli.configs import find_config
from fasp_lightning.cli.errors import refusal_in, reworded
from fasp_lightning.errors import FaspError

CONFIG_OPTIONS = ("-c", "--config")


def parse(job: type, program: str, argv: list[str]) -> Any:
    """Parse a command's arguments.

    Args:
        job: The command's dataclass; its fields, nested ones included, are the options. Where its ``POSITIONAL`` is
            true, those without a default are given by their place.
        program: Name for the usage line.
        argv: Arguments. ``-c`` takes a YAML file or a shipped config's bare name, several times if wanted;
            what comes later wins. A boolean option without a value is true.

    Returns:
        An instance of ``job``.

    Raises:
        FaspError: If an argument or a file does not fit, or a dataclass refuses its values.
        SystemExit: After ``--help`` and ``--print_config``.
    """
    parser = ArgumentParser(prog=program, description=_summary(job), exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file, or a shipped config by its bare name.")
    parser.add_class_arguments(job, as_positional=getattr(job, "POSITIONAL", False))
    arguments = list(_with_values(with_paths(argv), set(_flags(job))))
    try:
        parsed = parser.parse_args(arguments)
    except Exception as error:  # of any class, as of its own parts
        if refusal_in(error) is None:
            raise
        raise FaspError(f"{reworded(error)}; see {program} --help") from error
    parsed.pop("config", None)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
    try:
        return job(**instantiate(parsed).as_dict())
    except Exception as error:  # the parser wraps what a dataclass says that may be null
        if (refusal := refusal_in(error)) is None:
            raise
        raise refusal from None


def _summary(job: type) -> str:
    return (job.__doc__ or "").strip().splitlines()[0]


def with_paths(argv: list[str]) -> Iterator[str]:
    """The arguments with the configs' paths for their names.

    Raises:
        FaspError: If there is no such config.
    """
    named = False
    for argument in argv:
        option, equals, value = argument.partition("=")
        if named:
            yield str(find_config(argument))
        elif equals and option in CONFIG_OPTIONS:
            yield f"--config={find_config(value)}"
        else:
            yield argument
        named = not named and argument in CONFIG_OPTIONS


def _with_values(argv: Iterator[str], flags: set[str]) -> Iterator[str]:
    """The arguments with ``true`` for the value of a boolean option that has none."""
    pending = None
    for argument in argv:
        if pending is not None:
            yield pending if argument.lower() in ("true", "false") else f"{pending}=true"
        pending = argument if argument in flags else None
        if pending is None:
            yield argument
    if pending is not None:
        yield f"{pending}=true"


def _flags(job: type, prefix: str = "--") -> Iterator[str]:
    """Names of the boolean options."""
    hints = typing.get_type_hints(job)
    for field in dataclasses.fields(job):
        kind = hints[field.name]
        if kind is bool:
            yield f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(kind):
            yield from _flags(typing.cast(type, kind), f"{prefix}{field.name}.")
