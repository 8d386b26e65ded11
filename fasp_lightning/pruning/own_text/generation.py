"""Sampling token by token from a causal LM, many sequences at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.finite import bad_parameter
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES = 128
"""Sequences sampled at once, at most; more make a step hardly faster, and their logits take memory."""

CACHE_BYTES = 2**30
"""What their keys and values may take up; fewer are sampled at once where they would take more."""


def first_tokens(model: PreTrainedModel, sequences: int, generator: torch.Generator) -> Tensor:
    """What sequences start with: the model's beginning-of-text token, else end-of-text, else padding, else any token.

    Args:
        model: The model.
        sequences: How many.
        generator: Draws them where the model has no such token.

    Returns:
        (sequences,) int64.
    """
    vocabulary = _embeddings(model).weight.shape[0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for source in (getattr(model, "generation_config", None), text_config(model.config)):
            found = getattr(source, name, None)
            token = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(token, int) and 0 <= token < vocabulary:  # defaults of configs can lie beyond
                return torch.full((sequences,), token)
    return torch.randint(vocabulary, (sequences,), generator=generator)


def sample(model: PreTrainedModel, starts: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Sample sequences by the inverse of the cumulative distribution, with a cache of keys and values.

    The memory it takes is that cache, and the logits of one token a sequence.

    Args:
        model: A causal LM, where it is.
        starts: (sequences,) int64 first tokens.
        draws: (sequences, seq_len − 1) uniform numbers in [0, 1), float32: what decides on each further token.
        temperature: Divides the logits.

    Returns:
        (sequences, seq_len) int64 token ids on the CPU.

    Raises:
        FaspError: If the logits are not finite.
    """
    if not len(starts):  # a process's part of fewer sequences than there are processes
        return draws.new_empty((0, draws.shape[1] + 1), dtype=torch.long)
    at_once = _at_once(model, len(starts), draws.shape[1] + 1)
    with evaluating(model):
        parts = [
            _sample_batch(model, *part, temperature)
            for part in zip(starts.split(at_once), draws.split(at_once), strict=True)
        ]
    return torch.cat(parts)


def _at_once(model: PreTrainedModel, sequences: int, seq_len: int) -> int:
    """How many of so many sequences are sampled at once, in batches of about the same size."""
    config: Any = text_config(model.config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * _embeddings(model).weight.element_size()
    most = max(1, min(SEQUENCES, CACHE_BYTES // (token * seq_len)))
    return -(-sequences // -(-sequences // most))


def _sample_batch(model: PreTrainedModel, starts: Tensor, draws: Tensor, temperature: float) -> Tensor:
    device = _embeddings(model).weight.device
    tokens, past = [starts.to(device)], None
    finite = torch.ones((), dtype=torch.bool, device=device)
    for column in draws.T:
        given = torch.stack(tokens, 1) if past is None else tokens[-1][:, None]  # all, where a model keeps no cache
        output = model(input_ids=given, past_key_values=past, use_cache=True)
        past = getattr(output, "past_key_values", None)
        chosen, whole = choose(output.logits[:, -1], column, temperature)
        tokens.append(chosen.to(device))
        finite &= whole.to(device)  # looked at once: each look would wait for the device
    if not finite:
        raise FaspError(_not_finite(model))
    return torch.stack(tokens, dim=1).cpu()


def choose(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token at which the cumulative distribution exceeds a number.

    Args:
        logits: (batch, vocabulary), any floating dtype.
        draws: (batch,) float32 in [0, 1).
        temperature: Divides the logits.

    Returns:
        (batch,) int64 tokens, and whether all logits could be used: −∞ is a probability of 0, NaN and ∞ cannot.
    """
    # softmax without its division, p_j ∝ exp((z_j − max z) / temperature): nothing overflows, however low it is
    likely = (logits.float() - logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    if torch.are_deterministic_algorithms_enabled():
        likely = likely.cpu()  # cumsum on CUDA would refuse: its order of summation varies
    cumulative = likely.cumsum(-1, dtype=torch.float64)  # in float32 the tail of a large vocabulary would be lost
    total = cumulative[:, -1:]
    # right: a token without probability adds nothing, so the sum first exceeds the number at another one
    chosen = torch.searchsorted(cumulative, draws[:, None].to(total) * total, right=True)[:, 0]
    return chosen.clamp_max(logits.shape[-1] - 1), total.isfinite().all()  # clamped where all are NaN


def _not_finite(model: PreTrainedModel) -> str:
    """Say what is wrong, and where, if it is a parameter."""
    return (
        f"the logits must be finite to sample own text, got NaN or Inf{bad_parameter(model)}; "
        "check the checkpoint, or run the model in float32 or bfloat16"
    )


def _embeddings(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()
