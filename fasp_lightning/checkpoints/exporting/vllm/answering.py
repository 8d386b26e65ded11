"""What vLLM makes of a folder, asked in a process of its own, in whichever environment it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fasp_lightning.checkpoints.exporting.exported import LoaderCheck, Reference, compared
from fasp_lightning.errors import FaspError, one_line

PYTHON = "FASP_VLLM_PYTHON"
"""Variable of the environment that names the python in which vLLM is installed, if it is not this one."""


def python_with_vllm() -> str | None:
    """The python to ask vLLM with, ``None`` if there is none.

    Raises:
        FaspError: If the environment names one that is not there.
    """
    named = os.environ.get(PYTHON)
    if named and not Path(named).is_file():
        raise FaspError(f"{PYTHON} must be the path of a python in which vLLM is installed, got {named!r}")
    # absolute, as its process works in a folder of its own; not resolved, as an environment's python is a link
    return str(Path(named).absolute()) if named else (sys.executable if find_spec("vllm") else None)


def answer(folder: Path, expected: Reference, python: str, dtype: torch.dtype, trusted: bool) -> LoaderCheck:
    """vLLM's greedy continuation of a prompt, and its logits, beside those of ``transformers``.

    Args:
        folder: What to serve.
        expected: The answer of ``transformers``.
        python: Where vLLM is installed.
        dtype: To compute in.
        trusted: Whether the folder brings code that must run.

    Raises:
        FaspError: If vLLM does not serve it; the reason that it gives is told.
    """
    with TemporaryDirectory() as place:
        said = Path(place) / "answer.json"
        job = {
            "folder": str(folder.absolute()),
            "prompt": expected.prompt,
            "tokens": len(expected.greedy),
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trusted,
            "answer": str(said),
        }
        process = subprocess.run(
            [python, str(Path(__file__).with_name("vllm_process.py"))],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=place,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            check=False,
        )
        ended = [f"exit code {process.returncode}", *process.stderr.splitlines()]
        found: Any = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {"error": ended[-1]}
    if "error" in found:
        words = one_line(RuntimeError(found["error"]))
        raise FaspError(f"vLLM must serve what was written, but it says: {words}; check=False (--check false) keeps it")
    logits = torch.full_like(expected.logits, -torch.inf)
    for token, logprob in found["logprobs"].items():
        logits[int(token)] = logprob
    shift = expected.logits.logsumexp(0)  # probabilities do not depend on it
    return compared(expected, "vLLM", found["version"], found["greedy"], logits + shift)
