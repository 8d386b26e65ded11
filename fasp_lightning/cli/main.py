"""The entry point ``fasp``: which command, and what its errors look like."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import fasp_lightning
from fasp_lightning.cli.errors import REPORT, is_user_error, told
from fasp_lightning.cli.startup import without_collection
from fasp_lightning.errors import FaspError

COMMANDS = {
    "prune": "prune a model and save it",
    "sweep": "prune a model to several sparsities, with one table and one picture",
    "plan": "say what a pruning would give; reads no weights",
    "evaluate": "perplexity of a model, and tasks of the evaluation harness",
    "export": "write a model for llama.cpp, vLLM or ONNX Runtime, and compare its answer",
    "fit": "train a model, and prune it on the way",
    "validate": "one pass over the validation text",
    "test": "one pass over the test text",
    "predict": "likelihood of each sequence of a text",
    "report": "one HTML page of a pruned model, a training run or a sweep",
    "schedule": "write the schedule of a training's pruning as a YAML file to edit",
}
"""Name → help. A command with options of its own is a module of ``commands`` with ``JOB`` (a dataclass) and
``run(job)``; one of :data:`TRAINING` takes those of a Lightning run."""

TRAINING = {
    "fit": "lightning",
    "validate": "lightning",
    "test": "lightning",
    "predict": "lightning",
    "schedule": "schedule",
}
"""Name → module of ``commands`` with ``run(command, argv)``."""

USAGE = f"""\
usage: fasp COMMAND [options]

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

fasp COMMAND --help shows the options of a command; fasp --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0; 2 for a mistake of the user, which one line on stderr names; 130 after Ctrl-C; 1 for any
        other error, which is ours: its traceback is printed, and where to report it.
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # --help and --print_config end this way, and a Trainer after Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if is_user_error(error):
            sys.stderr.write(f"fasp: {told(error)}\n")
            return 2
        traceback.print_exception(error)
        sys.stderr.write(f"fasp: {REPORT.format(version=fasp_lightning.__version__)}\n")
        return 1


def _interrupted() -> int:
    sys.stderr.write("fasp: interrupted\n")
    return 130


def _dispatch(argv: list[str]) -> int:
    command, *rest = argv or [""]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(USAGE + "\n")
        return 0
    if command == "--version":
        sys.stdout.write(f"fasp_lightning {fasp_lightning.__version__}\n")
        return 0
    if command not in COMMANDS:
        got = repr(command) if command else "none"
        raise FaspError(f"command must be one of {', '.join(COMMANDS)}, got {got}; see fasp --help")
    with without_collection():
        # imported here: the other commands' modules, and what they need, stay out of the process
        module = import_module(f"fasp_lightning.cli.commands.{TRAINING.get(command, command)}")
    if command in TRAINING:
        return module.run(command, rest)
    from fasp_lightning.cli.parsing import parse

    return module.run(parse(module.JOB, f"fasp {command}", rest))
