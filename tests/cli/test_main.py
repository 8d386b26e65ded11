"""The entry point: commands, exit codes, and which errors keep their traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fasp_lightning import FaspError, __version__, errors
from fasp_lightning.cli.commands import evaluate
from fasp_lightning.cli.main import COMMANDS
from fasp_lightning.structure import plan
from fasp_lightning.text.batches import read_batch


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


def assert_reported(outcome, error: str) -> None:
    """A traceback, then where to report it, with exit code 1."""
    assert outcome.code == 1, outcome
    assert "Traceback (most recent call last)" in outcome.err
    *_, named, report = outcome.err.strip().splitlines()
    assert named.startswith(error)
    assert report.startswith(f"fasp: this is a bug of fasp_lightning {__version__}")
    assert "please report it" in report


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, KeyError, AssertionError])
def test_bug_keeps_its_traceback_and_says_where_to_report_it(
    fasp, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def bug(job: object) -> int:
        raise error("a bug")

    monkeypatch.setattr(evaluate, "run", bug)
    assert_reported(fasp("evaluate", "--model.name_or_path", "x"), error.__name__)


def test_broken_invariant_inside_the_package_is_a_bug(prune, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``zip(strict=True)`` of the package that does not come out even is no mistake of the user."""
    targets = plan.targets
    monkeypatch.setattr(plan, "targets", lambda *given: [*targets(*given)[:-1], (1, 2, 3)])
    assert_reported(prune(tiny_folder("llama")), "ValueError")


@pytest.mark.parametrize("given", [{}, "text"])
def test_refusal_of_the_package_is_one_line(fasp, monkeypatch: pytest.MonkeyPatch, given: object) -> None:
    monkeypatch.setattr(evaluate, "run", lambda job: read_batch(given))
    outcome = fasp("evaluate", "--model.name_or_path", "x")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_every_refusal_is_a_value_error() -> None:
    refusals = [kind for name, kind in vars(errors).items() if name.startswith("Fasp")]
    assert len(refusals) > 1
    assert all(issubclass(kind, FaspError) and issubclass(kind, ValueError) for kind in refusals)


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
