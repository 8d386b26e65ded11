"""Scripts that tests start as processes of their own: all of them end with the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fasp_lightning

TIME_LIMIT = 150
"""Seconds until a script that hangs is ended; none takes a fifth of that on an idle core."""


def run_script(script: Path, *arguments: Any, ranks: int | None = None) -> list[tuple[int, str]]:
    """Run a script, or so many copies of it at once, and wait for the end.

    Args:
        script: The script.
        arguments: Its arguments.
        ranks: Number of copies, which find theirs in ``RANK``; by default one without it.

    Returns:
        Exit status and standard error of each; a status is negative if the time was up.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = _environment()
    started = [
        subprocess.Popen(
            command,
            env=environment if ranks is None else environment | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what it starts can be ended along with it
        )
        for rank in range(ranks or 1)
    ]
    try:
        return [_outcome(process) for process in started]
    finally:
        for process in started:
            _end(process)


def raised_elsewhere(message: str) -> str:
    """The class of error that the other processes raise: a refusal stays a refusal, a bug a bug."""
    return "FaspProcessError" if message.startswith("Fasp") else "RuntimeError"


def free_port() -> int:
    """A port that no other worker of pytest is given at the same time: theirs leave other remainders.

    Those of half the port, since Linux gives odd ones only.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port // 2 % workers == worker % workers:
            return port


def _environment() -> dict[str, str]:
    tests = Path(__file__).parent
    paths = [Path(fasp_lightning.__file__).parents[1], tests, tests / "training", tests / "training" / "trainer"]
    ours = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return os.environ | ours


def _outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        _end(process)
        _, errors = process.communicate()
    return process.returncode, errors


def _end(process: subprocess.Popen[str]) -> None:
    """End a script and what it started, if any of them still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
