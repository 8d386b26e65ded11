"""Perplexity of a causal language model."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.likelihood import next_token_nll
from fasp_lightning.pruning.inputs import ModelInputs, check_at_hand
from fasp_lightning.structure.causal_lm import require_language_model
from fasp_lightning.structure.modes import evaluating, own_modes
from fasp_lightning.text.batches import TokenBatch, each_batch, read_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, with all that it takes to compare it with another.

    Attributes:
        perplexity: exp(nll / tokens).
        nll: Summed negative log-likelihood, in nats.
        tokens: Predicted tokens: T − 1 of a sequence of T tokens, padding and labels of −100 aside.
        sequences: Number of sequences.
        seq_len: Tokens of the longest sequence, padding included.
        seconds: Time it took.
        tokens_per_second: tokens / seconds.
    """

    perplexity: float
    nll: float
    tokens: int
    sequences: int
    seq_len: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, float | int]:
        """The fields as plain data."""
        return dataclasses.asdict(self)


def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """Perplexity of a model on token ids; see :func:`measure_perplexity`, which also says on how many.

    Args:
        model: A causal language model of transformers.
        batches: (batch, seq) int64 token ids, or mappings with ``input_ids`` and optionally ``attention_mask``,
            ``position_ids`` and ``labels``; read once. Or a single one.

    Returns:
        exp(Σ NLL / predicted tokens).

    Raises:
        FaspError: If there is no token to predict, an id is outside the vocabulary, a sequence is longer than a table
            of learned positions, or a batch has a weight or an input that is not passed on.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, perplexity

        before = perplexity(model, batches)
        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)  # other text than what is measured on is better
        print(f"{before:.2f} -> {perplexity(model, batches):.2f}")
    """
    return measure_perplexity(model, batches).perplexity


@own_modes()
def measure_perplexity(model: nn.Module, batches: Iterable[Any]) -> PerplexityResult:
    """Measure the perplexity of a model: exp(Σ NLL / predicted tokens), both summed over all sequences.

    The model is evaluated in eval mode, without gradients and without a cache, on the device where it is; the
    modes of its modules are as before afterwards. Padding on either side changes nothing. ``labels`` say what is
    predicted, as in the model's own loss: packed sequences have −100 where one begins. A beginning-of-text token is
    context alone, never predicted.

    Args:
        model: A causal language model of transformers.
        batches: (batch, seq) int64 token ids, or mappings with ``input_ids`` and optionally ``attention_mask``,
            ``position_ids`` and ``labels``; read once. Or a single one.

    Returns:
        The perplexity, and what it was measured on. It is infinite or NaN if the model's logits are.

    Raises:
        FaspError: If there is no token to predict, an id is outside the vocabulary, a sequence is longer than a table
            of learned positions, or a batch has a weight or an input that is not passed on, or the
            model gives no logits over the vocabulary.
    """
    require_language_model(model)
    counted, started = Counted(), time.perf_counter()
    inputs, batches = ModelInputs(model), each_batch(batches)
    check_at_hand(inputs, batches)
    with evaluating(model):
        for batch in batches:
            given = read_batch(batch)
            require_unweighted(given)
            counted.see(given)
            counted.add(*batch_nll(model, inputs.checked(given), given.targets))
    return counted.result(started)


@dataclass
class Counted:
    """What is summed up over batches.

    Attributes:
        nll: Summed negative log-likelihood, in nats.
        tokens: Predicted tokens.
        sequences: Number of sequences.
        seq_len: Tokens of the longest one.
    """

    nll: float = 0.0
    tokens: int = 0
    sequences: int = 0
    seq_len: int = 0

    def see(self, batch: TokenBatch) -> None:
        """Count the sequences of a batch."""
        self.sequences += len(batch.input_ids)
        self.seq_len = max(self.seq_len, batch.input_ids.shape[1])

    def add(self, nll: float, tokens: int) -> None:
        """Add what a batch gave."""
        self.nll += nll
        self.tokens += tokens

    def result(self, started: float) -> PerplexityResult:
        """The perplexity.

        Args:
            started: When the measuring began, on ``time.perf_counter``.

        Raises:
            FaspError: If there is no token to predict.
        """
        seconds = time.perf_counter() - started
        if self.tokens == 0:
            raise FaspError(
                f"batches must hold at least one token to predict, got {self.sequences} sequences of {self.seq_len} "
                "tokens at most; give sequences of two tokens or more that aren't masked"
            )
        perplexity, speed = exp_nll(self.nll / self.tokens), self.tokens / seconds
        return PerplexityResult(perplexity, self.nll, self.tokens, self.sequences, self.seq_len, seconds, speed)


def require_unweighted(batch: TokenBatch) -> None:
    """Refuse a weight: passing it over would report another perplexity than was asked for.

    Raises:
        FaspError: If a batch has one.
    """
    if batch.weight != 1:
        raise FaspError(
            f"weight of a batch must be 1 where perplexity is measured, got {batch.weight}: every token counts "
            "alike; leave the weight out"
        )


def batch_nll(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> tuple[float, int]:
    """Summed NLL and predicted tokens of one batch."""
    logits = model(**inputs, use_cache=False).logits
    nll, tokens = next_token_nll(logits, targets.to(logits.device))  # a model over devices answers on its last one
    return float(nll), int(tokens)


def exp_nll(mean_nll: float) -> float:
    """exp, infinite where a float ends; a NaN stays one, and is said."""
    if math.isnan(mean_nll):
        log.warning("the perplexity is NaN: the model's logits hold NaN or infinite values")
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
