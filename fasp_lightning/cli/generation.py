"""How a model continues a text."""

from __future__ import annotations

from typing import Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.text.batches import check_vocabulary


def check_prompt(model: Any, tokenizer: Any, prompt: str | None, new_tokens: int) -> None:
    """Refuse a prompt that the model cannot continue, before its weights are read.

    Args:
        model: The causal LM, on any device.
        tokenizer: Its tokenizer.
        prompt: The text; ``None`` passes.
        new_tokens: Length of the continuation at most.

    Raises:
        FaspError: If it has no token, one without an embedding, or is, continued, longer than a table of learned
            positions.
    """
    if prompt is None:
        return
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()  # of no token it makes floats
    if ids.shape[1] == 0:
        raise FaspError(f"prompt must hold at least one token, got {prompt!r}")
    inputs = ModelInputs(model)
    check_vocabulary(ids, inputs.vocabulary, "the prompt")
    inputs.check_length(ids.shape[1] + new_tokens - 1, "the prompt and its new_tokens")  # the last is no input


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt, with the KV cache.

    Args:
        model: A causal LM in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: A text that :func:`check_prompt` has let pass.
        new_tokens: Length of the continuation at most.

    Returns:
        The new text only, on one line.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
