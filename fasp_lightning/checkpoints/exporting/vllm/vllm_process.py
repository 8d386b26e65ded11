"""A process of its own that serves a folder with vLLM, which may be installed in another environment.

It is started by its path and imports nothing of this package. It reads a job as JSON from its input (see
:func:`fasp_lightning.checkpoints.exporting.vllm.answering.answer`), and writes the answer as JSON into a file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens after a prompt, and the log-probabilities of the first of them."""
    import vllm

    length = len(job["prompt"]) + job["tokens"]
    model = vllm.LLM(
        job["folder"],
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    prompt = {"prompt_token_ids": job["prompt"]}
    options = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    (first,) = model.generate([prompt], vllm.SamplingParams(max_tokens=1, logprobs=-1, **options), use_tqdm=False)
    (whole,) = model.generate([prompt], vllm.SamplingParams(max_tokens=job["tokens"], **options), use_tqdm=False)
    said = {token: entry.logprob for token, entry in first.outputs[0].logprobs[0].items()}
    return {"version": vllm.__version__, "greedy": list(whole.outputs[0].token_ids), "logprobs": said}


def cause(error: BaseException) -> str:
    """What was behind an error: libraries wrap it in one that says that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Answer the job, or say why there is no answer."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default it takes half of the memory
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine in another process dies there with its reason
    job = json.load(sys.stdin)
    try:
        found = answered(job)
    except Exception as error:  # of any class, as of vLLM, torch and transformers
        found = {"error": cause(error)}
    Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
