"""A part of the calibration set that stands for all of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from fasp_lightning.pruning.capture import Sample
from fasp_lightning.pruning.processes import Processes


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
