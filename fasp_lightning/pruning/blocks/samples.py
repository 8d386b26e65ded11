"""The calibration set on its way through the engine: samples, the part held back, and a part that stands for all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fasp_lightning.pruning.processes import Processes

HELD_BACK_EVERY = 4
"""One sample in so many is held back: few enough to estimate an error, many enough to choose by it."""

Stored = Tensor | Path
"""What a :class:`~fasp_lightning.pruning.blocks.store.TensorStore` made of a tensor."""


class Call(NamedTuple):
    """How the model calls one block, hidden states aside.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Named arguments.
        named_hidden: The hidden states are passed by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named_hidden: bool


@dataclass(frozen=True)
class Sample:
    """One (micro-)batch of the calibration set. What becomes of its hidden states is kept apart, by its ``number``.

    Attributes:
        number: Its place in the calibration set of this process.
        source: Name of the text it comes from: calibration texts are told apart by it, and own text from them.
        inputs: What the model is called with, on the CPU: (batch, seq) ``input_ids`` (int64), and ``attention_mask``
            and ``position_ids`` where they are given.
        weight: How much each of its tokens counts.
        calls: How each block is called on it.
        held_back: Whether it serves to choose the damping by, and enters the first gram not at all.
        targets: (batch, seq) int64 labels of the loss whose sensitivity is measured, −100 where nothing is predicted;
            ``None`` are the token ids. Statistics do not ask for them: what a layer reads counts at every real token.
    """

    number: int
    source: str
    inputs: dict[str, Tensor]
    weight: float = 1.0
    calls: tuple[Call, ...] = ()
    held_back: bool = False
    targets: Tensor | None = None

    @property
    def input_ids(self) -> Tensor:
        """(batch, seq) int64 token ids."""
        return self.inputs["input_ids"]

    @property
    def mask(self) -> Tensor | None:
        """(batch, seq) true where a token is real; ``None`` if all are."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        mask = self.mask
        return self.input_ids.numel() if mask is None else int(mask.sum())


def hold_back(samples: Iterable[Sample]) -> list[Sample]:
    """Mark one sample in ``HELD_BACK_EVERY`` of each source, evenly spread.

    Args:
        samples: The calibration set. A source with fewer samples than that enters the gram as a whole.
    """
    seen: Counter[str] = Counter()
    marked = []
    for sample in samples:
        seen[sample.source] += 1
        marked.append(replace(sample, held_back=seen[sample.source] % HELD_BACK_EVERY == 0))
    return marked


def spread_samples(samples: list[Sample], tokens: int, processes: Processes | None = None) -> list[Sample]:
    """Take whole samples, evenly spread, the same fraction of each source, and at least one of each.

    The weights of those taken grow so that each source counts as much as all of it did: a token of the part stands for
    (tokens of the source / tokens taken of it) tokens.

    Args:
        samples: The calibration set in this process; it stays as it is.
        tokens: How many tokens to take in all, over all processes; the last sample of a source may go beyond.
        processes: Those that call this together; by default this process alone.

    Returns:
        Samples in the order of the set, sharing their tensors.
    """
    processes = processes or Processes()
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_source[sample.source].append(sample)
    whole = _mass_by_source(samples, processes)
    total = max(1, sum(count for count, _ in whole.values()))
    chosen = [one for group in by_source.values() for one in _spread(group, -(-len(group) * tokens // total))]
    part = _mass_by_source(chosen, processes)
    chosen.sort(key=lambda sample: sample.number)
    return [replace(one, weight=one.weight * _growth(whole[one.source], part[one.source])) for one in chosen]


Mass = tuple[int, float]
"""Tokens, and Σ weight over them."""


def _mass_by_source(samples: list[Sample], processes: Processes) -> dict[str, Mass]:
    """What each source has, over all processes."""
    mine: dict[str, Mass] = {}
    for sample in samples:
        count, weight = mine.get(sample.source, (0, 0.0))
        mine[sample.source] = count + sample.tokens, weight + sample.weight * sample.tokens
    total: dict[str, Mass] = {}
    for found in processes.gather(mine):
        for source, (count, weight) in found.items():
            before = total.get(source, (0, 0.0))
            total[source] = before[0] + count, before[1] + weight
    return total


def _growth(whole: Mass, part: Mass) -> float:
    """By how much the weights of a part grow to count as much as the whole; 1 where nothing is left out."""
    if whole[0] == part[0] or not part[1]:
        return 1.0
    return whole[1] / part[1]


def _spread(samples: list[Sample], number: int) -> list[Sample]:
    """So many of some samples, each from the middle of an equal share."""
    count, number = len(samples), min(number, len(samples))
    return [samples[(2 * place + 1) * count // (2 * number)] for place in range(number)]
