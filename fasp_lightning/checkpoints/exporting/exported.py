"""What an export wrote, and how a loader's answer compares with that of ``transformers``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.structure.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_TOKENS = 40


@dataclass(frozen=True)
class LoaderCheck:
    """What came of loading an export with the program that it is for.

    Attributes:
        loader: The program, such as ``"llama.cpp"``.
        version: Its version.
        tokens: Greedy tokens that were compared.
        same: How many of them, from the first on, are those of ``transformers``.
        logit_difference: Largest difference of the prompt's last logits, ``None`` where the loader gives none.
    """

    loader: str
    version: str
    tokens: int
    same: int
    logit_difference: float | None = None


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: The file or folder.
        target: ``"gguf"``, ``"vllm"`` or ``"onnx"``.
        architecture: Name under which the loader builds it, such as ``"llama"``, ``"deci"`` or ``"DeciLMForCausalLM"``.
        bytes: Size of the file or of the folder's files.
        check: What its loader made of it, ``None`` where it is not installed or was not asked.
    """

    path: Path
    target: str
    architecture: str
    bytes: int
    check: LoaderCheck | None = None


@dataclass(frozen=True)
class Reference:
    """The answer of ``transformers`` to a prompt.

    Attributes:
        prompt: Token ids, at least one.
        greedy: Ids of the greedy continuation, whatever the end-of-text token.
        logits: fp32 [vocabulary], after the prompt's last token.
        split: The text that the prompt begins, and all its token ids; ``None`` where it is no text.
    """

    prompt: tuple[int, ...]
    greedy: tuple[int, ...]
    logits: Tensor
    split: tuple[str, tuple[int, ...]] | None = None


TEXTS = (
    'The café\'s 1,024 guests asked: "Is naïveté free?"\n\nThe capital of France is',
    "The capital of France, as everybody knows, is",
)
"""Prompts to compare with: the first whose characters the tokenizer knows."""


def expected_of(model: PreTrainedModel, tokenizer: Any = None, context: int | None = None) -> Reference:
    """The answer of ``transformers`` to a text, no longer than the context has room for.

    Args:
        model: The model.
        tokenizer: Its tokenizer; without one the prompt is some ids of its vocabulary.
        context: Tokens that the loader has room for; by default those of the model.
    """
    if tokenizer is None:
        embeddings: Any = model.get_input_embeddings()
        split, ids = None, [index * 37 % embeddings.weight.shape[0] for index in range(1, 9)]
    else:
        unknown = tokenizer.unk_token_id
        text = next((text for text in TEXTS if unknown not in tokenizer(text)["input_ids"]), TEXTS[-1])
        ids = list(tokenizer(text)["input_ids"])
        split = text, tuple(ids)
    room = context or getattr(model.config, "max_position_embeddings", None) or len(ids) + COMPARED_TOKENS
    prompt = ids[: max(1, room - COMPARED_TOKENS)]
    return replace(reference(model, prompt, min(COMPARED_TOKENS, room - len(prompt))), split=split)


def reference(model: PreTrainedModel, prompt: list[int], tokens: int = COMPARED_TOKENS) -> Reference:
    """Greedy continuation of a prompt by ``transformers``, in the model's dtype.

    Args:
        model: The model.
        prompt: Token ids.
        tokens: Length of the continuation.
    """
    ids = torch.tensor([prompt], device=model.device)
    greedy: list[int] = []
    first = torch.empty(0)
    past = None
    with evaluating(model):
        for step in range(tokens):
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
            logits, past = output.logits[0, -1].float(), output.past_key_values
            first = logits if step == 0 else first
            greedy.append(int(logits.argmax()))
            ids = logits.argmax().view(1, 1)
    return Reference(tuple(prompt), tuple(greedy), first.cpu())


def compared(
    expected: Reference, loader: str, version: str, greedy: list[int], logits: Tensor | None = None
) -> LoaderCheck:
    """A loader's answer beside that of ``transformers``.

    Args:
        expected: The answer of ``transformers``.
        loader: The program.
        version: Its version.
        greedy: Its greedy continuation.
        logits: Its logits [vocabulary] after the prompt's last token, if it gives them.
    """
    same = next(
        (index for index, pair in enumerate(zip(expected.greedy, greedy, strict=False)) if pair[0] != pair[1]),
        min(len(expected.greedy), len(greedy)),
    )
    difference = None if logits is None else (logits.float() - expected.logits).abs().max().item()
    return LoaderCheck(loader, version, len(expected.greedy), same, difference)
