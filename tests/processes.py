"""Processes of their own that tests start: all of them end with the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fasp_lightning

TIME_LIMIT = 150
"""Seconds until a script that hangs is ended; none takes a fifth of that on an idle core."""

LARGE = ["lightning", "peft", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt"]
"""What takes seconds to import."""


def run_script(script: Path, *arguments: Any) -> tuple[int, str]:
    """Run a script and wait for the end.

    Args:
        script: The script.
        arguments: Its arguments.

    Returns:
        Its exit status, which is negative if the time was up, and its standard error.
    """
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it starts can be ended along with it
    )
    try:
        return _outcome(process)
    finally:
        _end(process)


def run_forked(function: Callable[..., Any], folder: Path, *calls: Sequence[Any]) -> list[tuple[int, str]]:
    """Call a function once in each of some processes at once, and wait for the end.

    They are forked from a server that has imported the large libraries and used none of them, so that they start in
    a tenth of a script's time.

    Args:
        function: Of a module that is found on the path, as test files are not.
        folder: For their standard error.
        calls: Arguments of each call.

    Returns:
        Exit status and standard error of each; a status is negative if the time was up.
    """
    forks = get_context("forkserver")
    forks.set_forkserver_preload(LARGE)
    files, started = [folder / f"stderr-{index}.txt" for index in range(len(calls))], []
    try:
        for file, call in zip(files, calls, strict=True):
            file.touch()
            process: Any = forks.Process(target=_with_errors_in, args=(file, function, *call))
            process.start()
            started.append(process)
        for process in started:
            process.join(TIME_LIMIT)
    finally:
        for process in started:
            process.terminate()
            process.join()
    return [(process.exitcode, file.read_text()) for process, file in zip(started, files, strict=True)]


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


def _with_errors_in(file: Path, function: Callable[..., Any], *arguments: Any) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_TRUNC), 2)
    function(*arguments)


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
