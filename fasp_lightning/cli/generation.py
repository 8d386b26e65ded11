"""How a model continues a text."""

from __future__ import annotations

from typing import Any

import torch

from fasp_lightning.errors import FaspError


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt, with the KV cache.

    Args:
        model: A causal LM in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Any text with at least one token.
        new_tokens: Length of the continuation at most.

    Returns:
        The new text only, on one line.

    Raises:
        FaspError: If the prompt has no token.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.get_input_embeddings().weight.device)
    if ids.shape[1] == 0:
        raise FaspError(f"prompt must hold at least one token, got {prompt!r}")
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
