"""The entry point: commands, exit codes, and which errors keep their traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fasp_lightning import __version__
from fasp_lightning.cli import evaluate
from fasp_lightning.cli.main import COMMANDS
from fasp_lightning.pruning.batches import as_inputs


def test_help_names_every_command(fasp) -> None:
    outcome = fasp("--help")
    assert outcome.code == 0
    assert all(f"  {command} " in outcome.out for command in COMMANDS)


def test_version(fasp) -> None:
    assert fasp("--version").out == f"fasp_lightning {__version__}\n"


@pytest.mark.parametrize("argv", [(), ("prunes",), ("--sparsity", "0.2")])
def test_unknown_command_is_refused(fasp, argv: tuple[str, ...]) -> None:
    outcome = fasp(*argv)
    assert outcome.code == 2
    assert outcome.err.startswith(f"fasp: command must be one of {', '.join(COMMANDS)}, got ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_exits_with_zero(fasp, command: str) -> None:
    outcome = fasp(command, "--help")
    assert outcome.code == 0
    assert f"usage: fasp {command}" in outcome.out


def test_interrupt_is_one_line(fasp, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run", interrupt)
    outcome = fasp("evaluate", "--model.name_or_path", "x")
    assert (outcome.code, outcome.err) == (130, "fasp: interrupted\n")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, KeyError])
def test_bug_keeps_its_traceback(fasp, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def bug(job: object) -> int:
        raise error("a bug")  # raised here, outside the package

    monkeypatch.setattr(evaluate, "run", bug)
    with pytest.raises(error, match="a bug"):
        fasp("evaluate", "--model.name_or_path", "x")


def test_refusal_of_the_package_is_one_line(fasp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "run", lambda job: as_inputs({}))  # raises a ValueError in the package
    outcome = fasp("evaluate", "--model.name_or_path", "x")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_system_error_names_the_file(fasp, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(job: object) -> int:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(evaluate, "run", deny)
    outcome = fasp("evaluate", "--model.name_or_path", "x")
    assert (outcome.code, outcome.err) == (2, "fasp: Permission denied: /some/file\n")


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fasp_lightning", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "got 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr
