"""What an export wrote, and how a loader's answer compares with that of ``transformers``."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    prompt: tuple[int, ...]
    greedy: tuple[int, ...]
    logits: Tensor


TEXT = "The capital of France, as everybody knows, is"


def sample(model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """A prompt to compare with, no longer than leaves room for the tokens after it.

    Args:
        model: The model.
        tokenizer: Its tokenizer; without one, some ids of its vocabulary.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids = tokenizer(TEXT)["input_ids"] if tokenizer else [index * 37 % vocabulary for index in range(1, 9)]
    room = getattr(model.config, "max_position_embeddings", None) or len(ids) + COMPARED_TOKENS
    return list(ids[: max(1, room - COMPARED_TOKENS)])


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
