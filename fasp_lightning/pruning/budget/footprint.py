"""What a model takes up before and after pruning, from its widths alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasp_lightning.ops.statistics import DOUBLE_LIMIT
from fasp_lightning.pruning.blocks.sensitivity import PIECE_TOKENS
from fasp_lightning.pruning.budget.budget import Budget, PairWidth
from fasp_lightning.pruning.budget.chunks import experts_at_once, gram_bytes
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

GRAM_BYTES = 16
"""Bytes per entry of an n × n gram, up to ``DOUBLE_LIMIT`` columns: its fp64 sum, and what is factorised, in fp64 if it
must be, with what is computed of the weight's rows; the fp32 sum is gone by then."""

HELD_BYTES = 12
"""The same for the gram of the tokens that damping is chosen by: sums in fp32 and fp64."""

WIDE_GRAM_BYTES = 16
"""The same as the first beyond it: the fp32 sum, what is factorised, and the rows (measured at 11,008 columns)."""

RUNTIME_BYTES = 600_000_000
"""Resident size of Python with torch and transformers before a model is loaded (measured: 0.5-0.6 GB)."""


@dataclass(frozen=True)
class Footprint:
    """Size and cost of one model.

    Attributes:
        parameters: All parameters; tied ones count once.
        active: Those of them that a token meets: of experts only those that it is sent to.
        weight_bytes: Their size in the model's dtype.
        flops_per_token: Floating-point operations of its matrices for one token, 2 per parameter of the
            blocks' linear layers and of the head that it meets. Attention over the context comes on top.
        kv_bytes_per_token: KV cache of one token; ``None`` if the family's row has no value pair.
    """

    parameters: int
    active: int
    weight_bytes: int
    flops_per_token: int
    kv_bytes_per_token: int | None


@dataclass(frozen=True)
class PeakMemory:
    """Estimated highest use of memory while pruning, in bytes.

    Attributes:
        weights: The model.
        calibration: Hidden states, attention outputs and recorded consumer inputs of the calibration set.
        solve: The gram of the widest pair, and its solve; of experts, the grams of as many as are measured at once.
        sensitivity: What a backward pass through the whole model keeps, and the hidden states of the calibration set.
        logits: Logits of the batch that is evaluated.
        reload: Second copy of the model that is loaded to verify what was saved, or to compare with.
    """

    weights: int
    calibration: int
    solve: int
    sensitivity: int
    logits: int
    reload: int

    @property
    def total(self) -> int:
        """Peak, if all lives on one device: the parts that come one after the other do not add up."""
        return (
            RUNTIME_BYTES
            + self.weights
            + max(self.calibration + self.solve, self.sensitivity, self.logits, self.reload)
        )


def footprints(model: Any, budget: Budget, bytes_per_value: int) -> tuple[Footprint, Footprint]:
    """Footprint before and after.

    Args:
        model: The causal LM, on any device, ``meta`` included; as it is before this pruning.
        budget: Its widths.
        bytes_per_value: Of the model's dtype.
    """
    head = model.get_output_embeddings()
    head_parameters = 0 if head is None else head.weight.numel()
    pairs = [pair for block in budget.pairs for pair in block]

    def of(parameters: int, idle: int, cached: int) -> Footprint:
        linear = budget.linear_parameters - (budget.original_parameters - parameters)
        flops, size = 2 * (linear - idle + head_parameters), parameters * bytes_per_value
        return Footprint(parameters, parameters - idle, size, flops, cached * bytes_per_value or None)

    idle, idle_after = sum(pair.idle for pair in pairs), sum(pair.idle_after for pair in pairs)
    before = of(budget.parameters_before, idle, sum(pair.cached(pair.before) for pair in pairs))
    return before, of(budget.parameters_after, idle_after, sum(pair.cached(pair.after) for pair in pairs))


def _grams(pair: PairWidth, config: PruningConfig) -> int:
    """Bytes of the grams of experts that are in memory together, and of the solve of one."""
    if pair.kind != "experts":
        return 0
    held = experts_at_once(pair.columns, config.damping, pair.parts)
    return held * gram_bytes(pair.columns, config.damping) + GRAM_BYTES * pair.columns**2


def peak_memory_estimate(
    model: Any,
    budget: Budget,
    config: PruningConfig,
    *,
    tokens: int,
    evaluated_tokens: int,
    bytes_per_value: int,
    verify: bool,
    streamed: bool = False,
) -> PeakMemory:
    """Estimate the peak memory of a pruning.

    The recorded consumer inputs of the calibration set are the largest part, tokens · columns · bytes: 9 GB
    for the FFN of a 30B model with 262k tokens.

    Args:
        model: The causal LM, on any device.
        budget: Its widths.
        config: ``restoration``, ``damping``, ``score``, ``allocation``, ``sensitivity_tokens`` and ``learning`` are
            read.
        tokens: Calibration tokens.
        evaluated_tokens: Tokens of the largest batch of which logits are computed; 0 for none.
        bytes_per_value: Of the model's dtype.
        verify: Whether a second model is loaded afterwards, to check what was saved or to compare with.
        streamed: Whether a block at a time is read from the model's files: the next one is read meanwhile.
    """
    before, after = footprints(model, budget, bytes_per_value)
    widest = max((pair.columns for pair in budget.cut if not pair.sent), default=0)
    hidden = model.get_input_embeddings().weight.shape[1]
    # of experts what they are called with is recorded: choices and weights take up to 3 values each
    recorded = max([widest, *(hidden + 3 * pair.sent for pair in budget.cut if pair.sent)])
    calibration = (
        (2 * hidden + recorded) * tokens * bytes_per_value
    )  # hidden states, attention outputs, consumer inputs
    vocabulary = model.get_input_embeddings().num_embeddings
    entry = GRAM_BYTES if widest <= DOUBLE_LIMIT else WIDE_GRAM_BYTES
    if config.restoration == "none":
        entry = 12 if widest <= DOUBLE_LIMIT else 4
    elif config.damping == "auto":
        entry += HELD_BYTES
    sensitivity = 0
    if config.needs_sensitivity:
        piece = min(tokens, config.sensitivity_tokens, PIECE_TOKENS)
        if config.score == "learned":
            piece = max(piece, min(tokens, config.learning.tokens))
        # about what autograd keeps of a block whose weights are frozen: measured 0.5 to 1.3 times this, by family
        at_once = 1 if streamed else len(budget.pairs)
        kept = at_once * (7 * hidden + 4 * widest)
        states = tokens * hidden
        if streamed and config.offload != "disk":  # the backward pass needs what each block was given
            states += len(budget.pairs) * min(tokens, config.sensitivity_tokens) * hidden
        sensitivity = bytes_per_value * (states + piece * (kept + 3 * vocabulary))
    return PeakMemory(
        weights=bytes_per_value * streamed_parameters(model) if streamed else before.weight_bytes,
        calibration=calibration,
        solve=max([entry * widest**2, *(_grams(pair, config) for pair in budget.cut)]),
        sensitivity=sensitivity,
        logits=2 * evaluated_tokens * vocabulary * bytes_per_value,
        reload=after.weight_bytes if verify and not streamed else 0,
    )


def streamed_parameters(model: Any) -> int:
    """Parameters in memory at once where a model is streamed: two blocks, or one and the largest layer around them.

    Args:
        model: The causal LM, on any device.
    """
    blocks = find_blocks(model, spec_for(model))
    block = max(sum(parameter.numel() for parameter in one.parameters()) for one in blocks)
    around = max(layer.weight.numel() for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return block + max(block, around)
