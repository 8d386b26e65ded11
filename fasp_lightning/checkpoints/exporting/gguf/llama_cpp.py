"""What llama.cpp makes of a GGUF file, by the prebuilt library of the package ``xllamacpp``."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.exporting.exported import LoaderCheck, Reference, compared
from fasp_lightning.errors import FaspError

PACKAGE = "xllamacpp"


def installed() -> str | None:
    """The version of ``xllamacpp``, or ``None`` if it is not there."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def require_installed() -> str:
    """The version of ``xllamacpp``.

    Raises:
        FaspError: If it is not there.
    """
    found = installed()
    if found is None:
        raise FaspError(f"llama.cpp must be there as package {PACKAGE!r}; pip install 'fasp-lightning[serve]'")
    return found


def ask(
    file: Path,
    requests: list[tuple[str, dict[str, Any]]],
    context: int = 512,
    threads: int = 1,
    cache: str = "F32",
    warmup: bool = False,
) -> list[Any]:
    """Load a file with llama.cpp's server in another process, and ask it.

    Args:
        file: The GGUF file.
        requests: Path and body each, such as ``("/completion", {"prompt": [1, 2], "n_predict": 8})``; the answer to
            one tells under ``timings`` the tokens a second of prefill and decode.
        context: Tokens of its context.
        threads: Threads to compute with.
        cache: Dtype of its keys and values: ``"F32"`` for comparing, ``"F16"`` is llama.cpp's default.
        warmup: Compute once before the first request.

    Returns:
        The answers, in the order of the requests.

    Raises:
        FaspError: If ``xllamacpp`` is not there, or llama.cpp does not load the file; its first error is told.
    """
    require_installed()
    job = {"file": str(file), "context": context, "threads": threads, "cache": cache, "warmup": warmup}
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_process.py"))],
        input=json.dumps({**job, "requests": requests}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        words = next((line.partition(" E ")[2] for line in lines if " E " in line), lines[-1])
        raise FaspError(f"llama.cpp must load {str(file)!r}, but it says: {' '.join(words.split())}")
    return list(json.loads(process.stdout))


def answer(file: Path, expected: Reference, threads: int = 1) -> LoaderCheck:
    """llama.cpp's greedy continuation of a prompt, and its logits, beside those of ``transformers``.

    It is asked for each token after those that ``transformers`` has found, until they differ its own continuation.

    Its logits are known up to a number that is the same for all tokens, which no probability depends on; it is chosen
    so that the sum of all probabilities is that of the reference.

    Args:
        file: The GGUF file.
        expected: The answer of ``transformers``; llama.cpp must split its text into the same tokens.
        threads: Threads to compute with.

    Raises:
        FaspError: As :func:`ask`.
        RuntimeError: If llama.cpp splits the text otherwise.
    """
    release, prompt, count = require_installed(), list(expected.prompt), len(expected.greedy)
    everything = "/completion", {"prompt": prompt, "n_predict": 1, "n_probs": expected.logits.numel(), "temperature": 0}
    steps = [_step(prompt + list(expected.greedy[:done])) for done in range(count)]
    text, ids = expected.split or ("", ())
    tokenized = "/tokenize", {"content": text, "add_special": True}
    found, first, *rest = ask(file, [tokenized, everything, *steps], context=len(prompt) + count + 1, threads=threads)
    if expected.split and found["tokens"] != list(ids):
        raise RuntimeError(f"llama.cpp must split {text!r} into the tokens {ids}, but it makes {found['tokens']}")
    greedy = [_token(found) for found in rest]
    return compared(expected, "llama.cpp", f"{PACKAGE} {release}", greedy, _logits(first, expected.logits))


def _step(tokens: list[int]) -> tuple[str, dict[str, Any]]:
    """The request for one more token, whatever ends a text."""
    body = {"prompt": tokens, "n_predict": 1, "n_probs": 1, "temperature": 0, "return_tokens": True}
    return "/completion", body


def _token(found: Any) -> int:
    """The most probable token; the server holds probabilities back while a character is not whole."""
    for token in found.get("completion_probabilities", ()):
        return int(token["top_logprobs"][0]["id"])
    return int(found["tokens"][0])


def _logits(found: Any, expected: Tensor) -> Tensor | None:
    """Logits from the logarithms of all probabilities, where the server gives them."""
    if "completion_probabilities" not in found:
        return None
    logits = torch.full_like(expected, -torch.inf)
    for token in found["completion_probabilities"][0]["top_logprobs"]:
        logits[token["id"]] = token["logprob"]
    return logits + expected.logsumexp(0)
