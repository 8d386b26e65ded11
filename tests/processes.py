"""Processes of their own that tests start: all of them end with the test."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

TIME_LIMIT = 150
"""Seconds until a process that hangs is ended; none takes a fifth of that on an idle core."""

LARGE = ["lightning", "peft", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt"]
"""What takes seconds to import."""


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
    forks = prepared()
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


def run_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[tuple[int, str]]:
    """Call a function in two processes, which Lightning takes for those that it has started.

    Args:
        function: Of a module that is found on the path.
        folder: For their standard error.
        arguments: Of the function.
        count: Another number of processes.

    Returns:
        As :func:`run_forked`.
    """
    port = str(free_port())
    return run_forked(_as_rank, folder, *((rank, port, function, *arguments) for rank in range(count)))


def prepared() -> Any:
    """How to start processes that unpickle what they do, as spawned ones, but have imported the large libraries."""
    context = get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    return context


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


def _as_rank(rank: int, port: str, function: Callable[..., Any], *arguments: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    function(*arguments)


def _with_errors_in(file: Path, function: Callable[..., Any], *arguments: Any) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_TRUNC), 2)
    function(*arguments)
