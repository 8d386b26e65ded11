"""A part of the calibration set that stands for all of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fasp_lightning.pruning.processes import Processes

EVERY = 4
"""One sample in so many is held back: few enough to estimate an error, many enough to choose by it."""

Stored = Tensor | Path


@dataclass
class Sample:
    """One (micro-)batch on its way through the blocks.

    Attributes:
        tokens: Real tokens in it.
        mask: (batch · seq,) true where a token is real, or ``None`` if all are.
        input_ids: (batch, seq) int64 token ids, on the CPU.
        weight: How much each of its tokens counts.
        held_back: It serves to choose the damping by, and is no part of the first gram.
        calls: For each block, the arguments it was called with: positional ones after the hidden states, and named.
        hidden: (batch, seq, hidden) input of the next block.
        attention: Finished output of the attention module in the present block.
        form: Form of that output (a tensor or a tuple).
        inputs: (…, columns) recorded consumer inputs in the present block.
        named_hidden: The hidden states are passed by name.
    """

    tokens: int
    mask: Tensor | None
    input_ids: Tensor
    weight: float = 1.0
    held_back: bool = False
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden: Stored | None = None
    attention: Stored | None = None
    form: Any = None
    inputs: Stored | None = None
    named_hidden: bool = False


def spread_samples(samples: list[Sample], tokens: int, processes: Processes | None = None) -> list[Sample]:
    """Take whole samples, evenly spread, of each kind the same fraction, and at least one of each kind.

    A kind is what has the same weight, such as calibration text or own text. The weights of those taken grow so that
    each kind counts as much as all of it did.

    Args:
        samples: The calibration set in this process; it stays as it is.
        tokens: How many tokens to take in all, over all processes; the last sample of a kind may go beyond.
        processes: Those that call this together; by default this process alone.

    Returns:
        Samples in the order of the set, sharing their tensors.
    """
    processes = processes or Processes()
    kinds: dict[float, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        kinds[sample.weight].append(index)
    whole = _tokens_by_kind(samples, processes)
    total = max(1, sum(whole.values()))
    taken = sorted(index for kind in kinds.values() for index in _spread(kind, -(-len(kind) * tokens // total)))
    chosen = [samples[index] for index in taken]
    part = _tokens_by_kind(chosen, processes)
    return [
        replace(sample, weight=sample.weight * whole[sample.weight] / max(1, part[sample.weight])) for sample in chosen
    ]


def _tokens_by_kind(samples: list[Sample], processes: Processes) -> dict[float, int]:
    """Weight → tokens of that weight, over all processes."""
    counted: dict[float, int] = defaultdict(int)
    for sample in samples:
        counted[sample.weight] += sample.tokens
    total: dict[float, int] = defaultdict(int)
    for counts in processes.gather(dict(counted)):
        for weight, count in counts.items():
            total[weight] += count
    return total


def _spread(indices: list[int], number: int) -> list[int]:
    """So many of some indices, each from the middle of an equal share."""
    count, number = len(indices), min(number, len(indices))
    return [indices[(2 * place + 1) * count // (2 * number)] for place in range(number)]


def hold_back(samples: list[Sample]) -> None:
    """Mark one sample in ``EVERY`` of each kind, evenly spread; a kind, as own text, is what has the same weight.

    Args:
        samples: The calibration set. A kind with fewer samples than that goes into the gram as a whole.
    """
    seen: dict[float, int] = defaultdict(int)
    for sample in samples:
        seen[sample.weight] += 1
        sample.held_back = seen[sample.weight] % EVERY == 0
