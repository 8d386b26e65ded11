"""Greedy continuations by one loader, in the environment that has it; this file needs nothing of this package.

    ENVIRONMENT/bin/python examples/benchmarks/loader_answers.py transformers FOLDER…
    ENVIRONMENT/bin/python examples/benchmarks/loader_answers.py vllm FOLDER…

prints a line of JSON a folder: its name, the loader's version, and the token ids, or the error. The prompt is
``--text``, which the folder's tokenizer reads, or else the ids in the folder's ``prompt.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def transformers_greedy(folder: str, ids: list[int] | None, text: str | None, tokens: int) -> list[int]:
    """By ``AutoModelForCausalLM``, in fp32, whatever the end-of-text token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if ids is None:
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    capped = getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None)  # which sdpa leaves out
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager" if capped else None).float().eval()
    found, past, step = [], None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(tokens):
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(step))
    return found


def vllm_greedy(folder: str, ids: list[int] | None, text: str | None, tokens: int) -> list[int]:
    """By ``vllm.LLM``, in fp32."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        folder,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        trust_remote_code=True,
        max_num_seqs=1,
        gpu_memory_utilization=0.05,  # on a CPU it is that of the memory, of which others need the rest
    )
    prompt: Any = text if ids is None else TokensPrompt(prompt_token_ids=ids)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return list(model.generate(prompt, sampling, use_tqdm=False)[0].outputs[0].token_ids)


GREEDY = {"transformers": transformers_greedy, "vllm": vllm_greedy}


def main() -> None:
    """Print an answer a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", choices=GREEDY)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=40)
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, whose errors are then seen here
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    version = __import__(asked.loader).__version__
    for folder in asked.folders:
        answer: dict[str, Any] = {"folder": folder, "version": version}
        try:
            ids = None if asked.text else json.loads((Path(folder) / "prompt.json").read_text(encoding="utf-8"))
            answer["greedy"] = GREEDY[asked.loader](folder, ids, asked.text, asked.tokens)
        except Exception as error:  # whatever the loader says of a model that it does not take
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
